"""xfa_layer and xfa_block in both forms and with each backend, compared with the reference in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CONFIGS, DTYPES, Config, randn
from layer_cases import LAYER_SHAPES, NAMES, make_layer
from torch.autograd import gradcheck, gradgradcheck

from xformer_kernels.layer import passes
from xformer_kernels.testing import assert_bitwise, assert_close

GRAM_CONFIGS = tuple(config for config in CONFIGS if config.norm == "token")
FORMS = ("gram", "direct")


def check(layer, kernel, ran, form="gram", names=()):
    ops = ("layer_forward", "layer_backward") if form == "gram" else ("xfa_forward", "xfa_backward")
    with ran(*ops):
        result = layer.run(form=form, backend=kernel)
    layer.check(result, names)
    return result


@pytest.fixture
def fewer(slow):
    """Returns a shape of the table, with few tokens for slow kernels."""
    return lambda shape: (min(shape[0], 2), min(shape[1], 300), *shape[2:]) if slow else shape


@pytest.mark.needs(norm=None)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LAYER_SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, block, kernel, device, ran, fewer):
    if block and shape[2] == 1:
        shape = (*shape[:2], 2, 1)  # layer norm of a single feature is 0
    check(make_layer(fewer(shape), dtype=dtype, block=block, device=device), kernel, ran)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("config", GRAM_CONFIGS, ids=str)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_configs(dtype, block, config, masked, kernel, device, ran):
    check(make_layer((2, 131, 24, 3), config, dtype=dtype, block=block, masked=masked, device=device), kernel, ran)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_direct_form(block, config, backend, device, ran):
    layer = make_layer((2, 67, 24, 3), config, block=block, masked=True, device=device)
    if backend == "reference":
        with ran():
            layer.check(layer.run(form="direct", backend=backend))
    else:
        check(layer, backend, ran, "direct")


def test_gram_form_by_the_reference(ran_backend):
    """More features than the kernels support: the passes use torch's products, without a warning."""
    for C, backend in ((24, "reference"), (600, "auto")):
        layer = make_layer((1, 40, C, 4), block=True)
        with ran_backend("reference", "layer_forward", "layer_backward"):
            layer.check(layer.run(form="gram", backend=backend))


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("out", [5, 40])
def test_other_number_of_output_features(out, bias, kernel, device, ran):
    check(make_layer((2, 50, 24, 3), out=out, bias=bias, device=device), kernel, ran)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("missing", [("ln_weight",), ("ln_bias",), ("ln_weight", "ln_bias"), ("layer_scale",)], ids=str)
def test_optional_parts_of_a_block(missing, kernel, device, ran):
    layer = make_layer((2, 50, 24, 3), block=True, bias=False, device=device)
    layer.tensors = tuple(None if name in missing else t for name, t in zip(NAMES, layer.tensors, strict=True))
    check(layer, kernel, ran)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("mean", [10, 100, 1000])
def test_channel_means_far_above_their_spread(mean, block, kernel, device, ran):
    """Without centring, S would contain the squares of the means, and the digits of the spread would be lost."""
    check(make_layer((2, 400, 24, 3), mean=mean, block=block, device=device), kernel, ran)


@pytest.mark.needs(norm=None)
def test_outlier_tokens(kernel, ran):
    """CPU only. The Gram matrix is ill-conditioned, and errors are close to the tolerance."""
    layer = make_layer((1, 700, 24, 3))
    x = layer.tensors[0].clone()
    x[:, ::10] += 20
    layer.tensors = (x, *layer.tensors[1:])
    check(layer, kernel, ran)


@pytest.mark.needs(norm=None)
def test_unrepresentative_sample_of_tokens(kernel, device, ran):
    """The centre is estimated from a sample of tokens. Here the sample's mean is off by one spread, eight times the
    expected error."""
    layer = make_layer((1, 700, 24, 3), device=device)
    x = layer.tensors[0].clone()
    x[:, passes.sampled(700, x.device)] += x.std(1)
    layer.tensors = (x, *layer.tensors[1:])
    check(layer, kernel, ran)


@pytest.mark.needs(norm=None)
def test_layer_norm_with_eps_0(kernel, device, ran):
    """ln_eps=0 is a layer norm with eps 0, not the absence of a layer norm."""
    for form in FORMS:
        for masked in (False, True):
            layer = make_layer((2, 50, 24, 3), block=True, masked=masked, device=device)
            layer.ln_eps = 0.0
            check(layer, kernel, ran, form)


@pytest.mark.parametrize("size", [(0, 30), (2, 0)], ids=["no image", "no token"])
@pytest.mark.parametrize("out", [24, 7])
@pytest.mark.parametrize("form", FORMS)
def test_no_images_or_no_tokens(form, out, size, kernel, device, ran):
    """Forward and backward, also with other numbers of output features. Gradients of weights are 0."""
    for masked in (False, True):
        layer = make_layer((*size, 24, 3), out=out, masked=masked, device=device)
        result = layer.run(form=form, backend=kernel)
        assert result["y"].shape == (*size, out)
        for name in layer.names[1:]:
            assert not result[f"d{name}"].any()


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("features", ["equal", "equal, another number for each token"])
def test_tokens_with_equal_features(features, kernel, device, ran):
    """Layer norm returns exact zeros for them, rather than rounding errors scaled to unit variance."""
    layer = make_layer((1, 900, 48, 4), block=True, device=device)
    x, *rest = layer.tensors
    value = torch.full_like(x[..., :1], 0.1) if features == "equal" else x[..., :1]
    layer.tensors = (value.expand_as(x).contiguous(), *rest)
    for form in FORMS:
        check(layer, kernel, ran, form)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("layout", ["token_contiguous", "batch_contiguous", "padded", "expanded"])
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_layouts(block, layout, kernel, device, ran):
    """x and dy with any strides: channels-first images, slices of larger buffers, an expanded token."""
    layer = make_layer((2, 70, 24, 3), block=block, device=device)

    def lay_out(t):
        if layout == "token_contiguous":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "batch_contiguous":
            return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        if layout == "expanded":
            return t[:, :1].expand(t.shape)
        buffer = torch.full((t.shape[0] + 1, t.shape[1] + 3, 2 * t.shape[2] + 3), float("nan"), device=device)
        return buffer[1:, 2 : t.shape[1] + 2, 1 : 2 * t.shape[2] + 1 : 2].copy_(t)

    x = layer.tensors[0] if layout == "expanded" else lay_out(layer.tensors[0])
    layer.tensors, layer.dy = (x, *layer.tensors[1:]), lay_out(layer.dy)
    check(layer, kernel, ran)


@pytest.mark.needs(norm=None)
def test_weights_in_the_accumulate_dtype(kernel, device, ran):
    """float32 weights are not rounded for bfloat16 tokens; results are no less accurate than with bfloat16 weights."""
    layer = make_layer((2, 90, 24, 3), dtype=torch.bfloat16, weight_dtype=torch.float32, block=True, device=device)
    with ran("layer_forward", "layer_backward"):
        result = layer.run(form="gram", backend=kernel)
    narrow = make_layer((2, 90, 24, 3), dtype=torch.bfloat16, block=True, device=device).eager()
    oracle = layer.oracle()
    for name, got in result.items():
        assert got.dtype == (torch.bfloat16 if name in ("y", "dx") else torch.float32)
        assert_close(got.bfloat16(), narrow[name], oracle[name], name)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_masked_tokens_are_ignored(form, kernel, device, ran):
    layer = make_layer((2, 50, 24, 3), block=True, masked=True, device=device)
    clean = check(layer, kernel, ran, form)
    x = layer.tensors[0].clone()
    x[~layer.token_mask] = float("nan")
    layer.tensors = (x, *layer.tensors[1:])
    dirty = layer.run(form=form, backend=kernel)
    keep = layer.token_mask
    for name in ("y", "dx"):
        assert_bitwise(dirty[name][keep], clean[name][keep], name)
    for name in ("dqkv_weight", "dqkv_bias", "dtemperature", "dproj_weight", "dproj_bias"):
        assert_bitwise(dirty[name], clean[name], name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 5, 8, 2), (2, 0, 8, 2), (0, 0, 8, 2)], ids=str)
def test_empty(shape, form, kernel, device):
    layer = make_layer(shape, block=True, device=device)
    result = layer.run(form=form, backend=kernel)
    assert result["y"].shape == result["dx"].shape == shape[:3]
    for name in layer.names[1:]:
        assert not result[f"d{name}"].any(), name


@pytest.mark.needs(norm=None)
def test_all_tokens_masked(kernel, device):
    layer = make_layer((2, 9, 8, 2), masked=True, device=device)
    layer.token_mask = torch.zeros_like(layer.token_mask)
    result = layer.run(form="gram", backend=kernel)
    assert_bitwise(result["y"], layer.tensors[5].expand(2, 9, 8).contiguous(), "y")
    assert not result["dx"].any() and not result["dqkv_weight"].any()


@pytest.mark.needs(norm=None)
def test_zero_features(kernel, device, ran):
    """Features of q and k that are 0 for all tokens: norms are below eps, gradients are those of the reference."""
    layer = make_layer((2, 60, 12, 3), bias=False, device=device)
    weight = layer.tensors[1].clone()
    weight[1] = weight[12 + 5] = 0
    layer.tensors = (layer.tensors[0], weight, *layer.tensors[2:])
    layer.config = Config(eps=1e-3)
    check(layer, kernel, ran)


@pytest.mark.needs(norm=None)
def test_nan_propagates(kernel, device):
    layer = make_layer((2, 30, 8, 2), device=device)
    x = layer.tensors[0].clone()
    x[0, 17, 3] = float("nan")
    layer.tensors = (x, *layer.tensors[1:])
    y = layer.run(form="gram", backend=kernel)["y"]
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.needs(norm=None)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", GRAM_CONFIGS, ids=str)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_derivatives(block, config, kernel, device, slow):
    layer = make_layer((2, 5, 4, 2), config, block=block, masked=True, dtype=torch.float64, device=device)
    leaves = [t for t in layer.leaves() if t is not None]

    def function(*given):
        numbers = iter(given)
        return layer.call([None if t is None else next(numbers) for t in layer.tensors], form="gram", backend=kernel)

    assert gradcheck(function, leaves, fast_mode=slow)
    if not slow:  # second derivatives are computed by the reference for all backends
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.needs(norm=None)
def test_second_derivatives_of_float32(kernel, device):
    layer = make_layer((2, 40, 8, 2), block=True, device=device)

    def second(function, layer):
        leaves = layer.leaves()
        there = [t for t in leaves if t is not None]
        first = torch.autograd.grad(function(layer, leaves), there, layer.dy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), there)

    ours = second(lambda layer, leaves: layer.call(leaves, form="gram", backend=kernel), layer)
    eager = second(lambda layer, leaves: layer.by_reference(leaves), layer)
    oracle = second(lambda layer, leaves: layer.by_reference(leaves), layer.to(torch.float64))
    for name, a, b, c in zip(layer.names, ours, eager, oracle, strict=True):
        assert_close(a, b, c, name)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dropout_drops_the_same_entries_in_both_forms(config, kernel, device):
    layer = make_layer((2, 40, 12, 3), config, dtype=torch.float64, device=device)
    results = []
    for form in FORMS if config.norm == "token" else ("direct", "auto"):
        torch.manual_seed(3)
        results.append(layer.run(form=form, dropout_p=0.4, backend=kernel))
    without = layer.run(backend=kernel)
    for name, got in results[0].items():
        torch.testing.assert_close(got, results[1][name], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(results[0]["y"], without["y"])


def test_repeated_calls_give_the_same_bits():
    layer = make_layer((2, 2000, 48, 4), block=True)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(layer.run(form="gram", backend="cpp")["y"])
    assert_bitwise(results[1], results[2], "again")
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.needs(norm=None)
def test_gradients_of_single_inputs(kernel, device, ran):
    layer = make_layer((2, 40, 12, 3), block=True, device=device)
    wanted = layer.run(form="gram", backend=kernel)
    for name in layer.names:
        leaves = [t if t is None else t.detach() for t in layer.tensors]
        leaf = leaves[NAMES.index(name)].requires_grad_()
        (grad,) = torch.autograd.grad(layer.call(leaves, form="gram", backend=kernel), leaf, layer.dy)
        assert_bitwise(grad, wanted[f"d{name}"], name)
    with torch.no_grad(), ran("layer_forward"):
        assert_bitwise(layer.call(leaves, form="gram", backend=kernel), wanted["y"], "y")


@pytest.mark.needs(norm=None)
def test_images_of_a_batch_are_independent(kernel, device):
    """Results of an image do not depend on the other images of the batch."""
    layer = make_layer((3, 50, 12, 3), device=device)
    y = layer.run(form="gram", backend=kernel)["y"]
    x = layer.tensors[0].clone()
    x[1] = randn(50, 12, seed=77, device=device)
    layer.tensors = (x, *layer.tensors[1:])
    other = layer.run(form="gram", backend=kernel)["y"]
    for i in (0, 2):
        assert_bitwise(other[i], y[i], f"image {i}")

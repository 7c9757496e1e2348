"""gram and channel_mix: results, and derivatives of any order, which are composed of the same two ops."""

from __future__ import annotations

from itertools import chain, combinations

import pytest
import torch
from cases import DTYPES, LAYOUTS, LOW_PRECISION, randn, random_mask
from torch.autograd import gradcheck, gradgradcheck

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.testing import assert_bitwise, assert_close

pytestmark = pytest.mark.needs(norm=None)

# (B, H, N, Da, Db)
GRAM_SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 17, 5, 9),
    (1, 2, 300, 48, 32),
    (2, 1, 131, 33, 1),
    (1, 1, 70, 257, 130),
    (1, 1, 40, 512, 512),
    (1, 2, 5003, 24, 24),
    (0, 2, 5, 3, 4),
    (2, 2, 0, 3, 4),
)
# (B, H, N, I, O)
MIX_SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 17, 5, 9),
    (1, 2, 300, 48, 32),
    (2, 1, 131, 33, 1),
    (1, 1, 70, 257, 130),
    (1, 1, 40, 512, 512),
    (1, 2, 5003, 24, 24),
    (0, 2, 5, 3, 4),
    (2, 2, 0, 3, 4),
)
OPTIONS = tuple(chain.from_iterable(combinations(("bias", "add", "add_scale", "x2"), r) for r in range(5)))
OPTIONS = tuple(chosen for chosen in OPTIONS if "add" in chosen or "add_scale" not in chosen)


def check_gram(a, b, ran, backend, **kwargs):
    with ran("gram"):
        result = xk.gram(a, b, backend=backend, **kwargs)
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    eager = reference.gram(a, b, **kwargs)
    b64 = b.double()
    oracle = reference.gram(b64 if a is b else a.double(), b64, **kwargs)
    for name, got, other, exact in zip(("G", "ssq_a", "ssq_b"), result, eager, oracle, strict=True):
        assert got.dtype == wide
        assert_close(got, other, exact, name)
    return result


def mix_inputs(shape, chosen=(), dtype=torch.float32, layout="token_major", weight_dtype=None, device="cpu"):
    B, H, N, I, O = shape  # noqa: E741
    weight_dtype = weight_dtype or dtype
    t = {
        "x": LAYOUTS[layout](randn(B, H, N, I, seed=1, dtype=dtype, device=device)),
        "weight": randn(B, H, O, I, seed=2, dtype=weight_dtype, device=device),
    }
    if "bias" in chosen:
        t["bias"] = randn(B, H, O, seed=3, dtype=weight_dtype, device=device)
    if "add" in chosen:
        t["add"] = LAYOUTS[layout](randn(B, H, N, O, seed=4, dtype=dtype, device=device))
    if "add_scale" in chosen:
        t["add_scale"] = randn(B, H, O, seed=5, dtype=weight_dtype, device=device)
    if "x2" in chosen:
        t["x2"] = LAYOUTS[layout](randn(B, H, N, I + 2, seed=6, dtype=dtype, device=device))
        t["weight2"] = randn(B, H, O, I + 2, seed=7, dtype=weight_dtype, device=device)
    return t


def check_mix(t, ran, backend):
    with ran("channel_mix"):
        y = xk.channel_mix(**t, backend=backend)
    assert y.dtype == t["x"].dtype
    oracle = reference.channel_mix(**{name: x.double() for name, x in t.items()})
    assert_close(y, reference.channel_mix(**t), oracle, "y")
    return y


# -------------------------------------------------------------------------------------------------------------- gram


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRAM_SHAPES, ids=str)
def test_gram(shape, dtype, backend, device, ran, need_features):
    need_features(*shape[-2:])
    B, H, N, Da, Db = shape
    a, b = (randn(B, H, N, d, seed=s, dtype=dtype, device=device) for s, d in enumerate((Da, Db)))
    check_gram(a, b, ran, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_layouts_and_masks(layout, masked, dtype, backend, device, ran):
    a, b = (LAYOUTS[layout](randn(2, 3, 67, d, seed=d, dtype=dtype, device=device)) for d in (9, 20))
    mask = random_mask(2, 67, device=device) if masked else None
    check_gram(a, b, ran, backend, token_mask=mask)
    check_gram(a, a, ran, backend, token_mask=mask, symmetric=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [1, 7, 16, 48, 100, 257])
def test_symmetric_gram(D, dtype, backend, device, ran, need_features):
    """With kernels, G is bitwise symmetric, and its diagonal is the sums of squares."""
    need_features(D)
    a = randn(2, 2, 53, D, seed=D, dtype=dtype, device=device)
    G, ssq_a, ssq_b = check_gram(a, a, ran, backend, symmetric=True)
    if backend != "reference":
        assert_bitwise(G, G.transpose(2, 3), "G and its transpose")
        assert_bitwise(ssq_a, ssq_b, "ssq_a and ssq_b")
        assert_bitwise(G.diagonal(dim1=2, dim2=3), ssq_a, "the diagonal")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["", "symmetric"])
def test_gram_derivatives(symmetric, masked, backend, device, ran, slow):
    """Derivatives up to third order: the backward is composed of the same two ops."""
    B, H = (1, 1) if slow else (2, 2)
    a = randn(B, H, 3, 2, seed=1, dtype=torch.float64, device=device).requires_grad_()
    b = randn(B, H, 3, 2, seed=2, dtype=torch.float64, device=device).requires_grad_()
    mask = random_mask(B, 3, seed=1, device=device) if masked else None
    inputs = (a,) if symmetric else (a, b)

    def function(a, b=None):
        return xk.gram(a, a if symmetric else b, symmetric=symmetric, token_mask=mask, backend=backend)

    def gradient(*inputs):
        """The gradient of a function whose derivatives of any order are nonzero."""
        value = sum(x.sin().sum() for x in function(*inputs))
        return torch.autograd.grad(value, inputs, create_graph=True)

    with ran("gram", "channel_mix"):
        assert gradcheck(function, inputs, fast_mode=slow)
        assert gradgradcheck(function, inputs, fast_mode=slow)
    if not slow:
        assert gradgradcheck(gradient, inputs)


def test_gram_of_3d_input(kernel, device, ran):
    a, b = (randn(2, 30, d, seed=d, device=device) for d in (4, 6))
    with ran("gram"):
        result = xk.gram(a, b, backend=kernel)
    for got, expected in zip(result, xk.gram(a[:, None], b[:, None], backend=kernel), strict=True):
        assert_bitwise(got, expected[:, 0], "3-D input")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_gram_gradients(dtype, backend, device, ran):
    a = randn(2, 3, 300, 24, seed=1, dtype=dtype, device=device).requires_grad_()
    b = LAYOUTS["padded"](randn(2, 3, 300, 40, seed=2, dtype=dtype, device=device)).requires_grad_()
    mask = random_mask(2, 300, device=device)

    def grads(function, a, b):
        G, ssq_a, ssq_b = function(a, b, token_mask=mask)
        value = G.sin().sum() + ssq_a.sqrt().sum() + ssq_b.square().mean()
        return torch.autograd.grad(value, (a, b))

    with ran("gram", "channel_mix"):
        ours = grads(lambda *x, **kw: xk.gram(*x, **kw, backend=backend), a, b)
    eager = grads(reference.gram, a, b)
    oracle = grads(reference.gram, *(x.detach().double().requires_grad_() for x in (a, b)))
    for name, x, y, z in zip(("da", "db"), ours, eager, oracle, strict=True):
        assert x.dtype == dtype
        assert_close(x, y, z, name)


# ------------------------------------------------------------------------------------------------------- channel_mix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MIX_SHAPES, ids=str)
def test_channel_mix(shape, dtype, backend, device, ran, need_features):
    need_features(*shape[-2:])
    check_mix(mix_inputs(shape, dtype=dtype, device=device), ran, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chosen", OPTIONS, ids=lambda c: "+".join(c) or "plain")
def test_channel_mix_options_and_layouts(chosen, layout, dtype, backend, device, ran):
    t = mix_inputs((2, 3, 67, 9, 20), chosen, dtype, layout, weight_dtype=torch.float32, device=device)
    y = check_mix(t, ran, backend)
    if backend != "reference":
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_channel_mix_weight_dtypes(dtype, backend, device, ran):
    for weight_dtype in (dtype, torch.float32):
        t = mix_inputs(
            (2, 2, 40, 12, 12), ("bias", "add", "add_scale", "x2"), dtype, weight_dtype=weight_dtype, device=device
        )
        check_mix(t, ran, backend)


@pytest.mark.parametrize("form", ["one matrix", "per head", "transposed", "expanded"])
def test_channel_mix_weight_shapes(form, kernel, device, ran):
    """(O, I) for all heads, (H, O, I) for the whole batch, and any strides."""
    B, H, N, I, O = 3, 2, 50, 6, 7  # noqa: E741
    t = mix_inputs((B, H, N, I, O), ("bias", "add", "add_scale"), device=device)
    full = {name: t[name] for name in ("weight", "bias", "add_scale")}
    if form == "one matrix":
        t.update({name: x[0, 0] for name, x in full.items()})
        full = {name: x[:1, :1].expand(x.shape) for name, x in full.items()}
    elif form == "per head":
        t.update({name: x[0] for name, x in full.items()})
        full = {name: x[:1].expand(x.shape) for name, x in full.items()}
    elif form == "transposed":
        t["weight"] = t["weight"].transpose(2, 3).contiguous().transpose(2, 3)
    else:
        full = {name: x[:, :1].expand(x.shape) for name, x in full.items()}
        t.update(full)
    with ran("channel_mix"):
        y = xk.channel_mix(**t, backend=kernel)
    assert_bitwise(y, xk.channel_mix(**{**t, **{n: x.contiguous() for n, x in full.items()}}, backend=kernel), form)


@pytest.mark.parametrize("what", ["add", "bias"])
def test_added_terms_do_not_reduce_precision(what, kernel, device):
    """A large term is added after many small products, so that these are not rounded to its precision one by one."""
    for product, size in ((0.0013, 69.4), (0.0037, 1000.0)):
        x = torch.full((1, 1, 40, 79), product, device=device)
        large = {"add": torch.full((1, 1, 40, 5), size), "bias": torch.full((1, 1, 5), size)}[what].to(device)
        t = {"x": x, "weight": torch.ones(1, 1, 5, 79, device=device), what: large}
        y, eager = xk.channel_mix(**t, backend=kernel), reference.channel_mix(**t)
        assert_close(y, eager, reference.channel_mix(**{name: v.double() for name, v in t.items()}), what)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_every_value_of_16_bits_is_read_and_rounded_as_torch_does(dtype, need_backend, ran_backend):
    """With one feature: all values, also NaN and infinity, and products of them. With more: rows of all lengths."""
    need_backend("cpp")
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    with ran_backend("cpp", "channel_mix"):
        for factor in (1.0, 1.0 + 2**-9, 3e-5, 7e4):
            y = xk.channel_mix(values.view(1, -1, 1), torch.full((1, 1), factor), backend="cpp")
            torch.testing.assert_close(y.view(-1), (values.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)
        finite = values[values.isfinite()]
        for features in range(2, 20):
            x = finite[: len(finite) // features * features].view(1, -1, features)
            torch.testing.assert_close(xk.channel_mix(x, torch.eye(features), backend="cpp"), x, rtol=0, atol=0)


def test_channel_mix_of_3d_input(kernel, device, ran):
    x, add = randn(2, 30, 4, seed=1, device=device), randn(2, 30, 5, seed=2, device=device)
    weight, bias = randn(2, 5, 4, seed=3, device=device), randn(5, seed=4, device=device)
    with ran("channel_mix"):
        y = xk.channel_mix(x, weight, bias=bias, add=add, backend=kernel)
    assert y.shape == (2, 30, 5)
    expected = xk.channel_mix(x[:, None], weight[:, None], bias=bias, add=add[:, None], backend=kernel)
    assert_bitwise(y, expected[:, 0], "3-D input")
    torch.testing.assert_close(xk.channel_mix(x, weight[0], backend=kernel), x @ weight[0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "chosen",
    [(), ("bias",), ("add",), ("add", "add_scale"), ("x2",), ("bias", "add", "add_scale", "x2")],
    ids=lambda c: "+".join(c) or "plain",
)
def test_channel_mix_derivatives(chosen, backend, device, ran, slow):
    """Derivatives up to third order, for every argument."""
    t = mix_inputs((1 if slow else 2, 1, 2, 2, 2), chosen, torch.float64, device=device)
    inputs = tuple(x.requires_grad_() for x in t.values())

    def function(*inputs):
        return xk.channel_mix(**dict(zip(t, inputs, strict=True)), backend=backend)

    def gradient(*inputs):
        return torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)

    with ran("gram", "channel_mix"):
        assert gradcheck(function, inputs, fast_mode=slow)
        assert gradgradcheck(function, inputs, fast_mode=slow)
    if len(chosen) != 1 and not slow:
        assert gradgradcheck(gradient, inputs)


@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["float32 weights", "own weights"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_channel_mix_gradients(dtype, weight_dtype, backend, device, ran):
    """Gradients have the dtype of the argument; one weight is shared by the batch and the heads."""
    t = mix_inputs(
        (2, 3, 300, 24, 20), ("bias", "add", "add_scale", "x2"), dtype, weight_dtype=weight_dtype, device=device
    )
    t["weight"] = t["weight"][0, 0]
    dy = randn(2, 3, 300, 20, seed=9, dtype=dtype, device=device)

    def grads(function, to=None):
        inputs = {name: x.detach().to(to or x.dtype).requires_grad_() for name, x in t.items()}
        y = function(**inputs)
        return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), dy.to(y.dtype)), strict=True))

    with ran("gram", "channel_mix"):
        ours = grads(lambda **kw: xk.channel_mix(**kw, backend=backend))
    eager, oracle = grads(reference.channel_mix), grads(reference.channel_mix, torch.float64)
    for name, x in ours.items():
        assert x.dtype == t[name].dtype and x.shape == t[name].shape
        assert_close(x, eager[name], oracle[name], f"d{name}")


def test_xfa_composed_of_primitives(backend, device, ran):
    """The formula of xfa in terms of gram and channel_mix, in float64."""
    q, k, v = (randn(2, 3, 40, 8, seed=s, dtype=torch.float64, device=device) for s in range(3))
    t = torch.linspace(1, 2, 3, dtype=torch.float64, device=device)
    with ran("gram", "channel_mix"):
        G, ssq_q, ssq_k = xk.gram(q, k, backend=backend)
        cos = G / (ssq_q.sqrt()[..., :, None] * ssq_k.sqrt()[..., None, :])
        out = xk.channel_mix(v, (t.view(3, 1, 1) * cos).softmax(-1), backend=backend)
    torch.testing.assert_close(out, xk.xfa(q, k, v, t, backend=backend), rtol=1e-12, atol=1e-12)

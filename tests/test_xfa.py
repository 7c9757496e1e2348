"""xfa of each backend, compared with the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONFIGS,
    DOUTS,
    DTYPES,
    EMPTY_SHAPES,
    LOW_PRECISION,
    QKV_LAYOUTS,
    RESULTS,
    SHAPES,
    Problem,
    make_problem,
)
from torch.autograd import gradcheck, gradgradcheck

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise, assert_close

MEDIUM = ((2, 37, 3, 20), (1, 4100, 2, 48))


def check(problem: Problem, backend: str, ran) -> dict[str, torch.Tensor]:
    with ran("xfa_forward", "xfa_backward"):
        result = problem.run(xk.xfa, backend=backend)
    problem.check(result)
    return result


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(shape, dtype, backend, device, ran, need_features, shorter):
    need_features(shape[-1])
    check(make_problem(shorter(shape), dtype=dtype, device=device), backend, ran)


@pytest.mark.one_in(9)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", MEDIUM, ids=str)
def test_low_precision_is_rounded_last(shape, config, dtype, kernel, device, ran, shorter):
    """Sums, norms and maps are float32; besides the result, at most the map is rounded, for products."""
    p = make_problem(shorter(shape), config, dtype=dtype, temperature_dtype=torch.float32, device=device)
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=kernel)
    wide = p.to(torch.float32).run(xk.xfa, backend=kernel)
    for name in RESULTS:
        x, y = result[name].float(), wide[name]
        assert (x - y).abs().max() <= torch.finfo(dtype).eps * y.abs().max(), name


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
# many tokens only with a mask: other tests cover them without
@pytest.mark.parametrize(
    "shape, masked",
    [(MEDIUM[0], False), (MEDIUM[0], True), (MEDIUM[1], True)],
    ids=["", "masked", "many, masked"],
)
def test_configs(shape, config, masked, dtype, backend, device, ran, shorter):
    check(make_problem(shorter(shape), config, dtype=dtype, masked=masked, device=device), backend, ran)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [130, 200])
def test_wide_heads(D, config, backend, device, ran, need_features):
    """Maps and tokens wider than one tile of a kernel."""
    need_features(D)
    check(make_problem((1, 300, 1, D), config, masked=D == 200, device=device), backend, ran)


def pairs_of_layouts():
    """All pairs in float32, and each also in bfloat16 or float64, alternately."""
    for i, (layout, dout) in enumerate(itertools.product(QKV_LAYOUTS, DOUTS)):
        yield layout, dout, torch.float32
        yield layout, dout, (torch.bfloat16, torch.float64)[i % 2]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("layout, dout, dtype", list(pairs_of_layouts()), ids=str)
def test_layouts(layout, dout, dtype, backend, device, ran):
    masked = dtype == torch.float32
    check(
        make_problem((2, 67, 3, 24), dtype=dtype, layout=layout, dout=dout, masked=masked, device=device), backend, ran
    )


def test_mixed_layouts(backend, device, ran):
    layouts = ("padded", "token_contiguous", "contiguous")
    q, k, v = (
        getattr(make_problem((2, 50, 2, 12), layout=name, device=device), x)
        for name, x in zip(layouts, "qkv", strict=True)
    )
    p = make_problem((2, 50, 2, 12), device=device)
    check(Problem(q, k, v, p.temperature, p.dout), backend, ran)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_odd_row_stride(dtype, first, backend, device, ran):
    """Unit stride over features, an odd stride over tokens, and addresses that are odd multiples of the item size."""
    p = make_problem((2, 51, 1, 24), dtype=dtype, device=device)

    def apart(x):
        buffer = torch.full((*x.shape[:3], 25), float("nan"), dtype=x.dtype, device=x.device)
        return buffer[..., first : first + 24].copy_(x)

    check(Problem(*map(apart, (p.q, p.k, p.v)), p.temperature, apart(p.dout)), backend, ran)


def test_expanded_inputs(backend, device, ran):
    """k expanded over the heads and v over the batch, with stride 0: their gradients are sums."""
    p = make_problem((3, 40, 4, 8), device=device)
    k, v = p.k[:, :1].detach().requires_grad_(), p.v[:1].detach().requires_grad_()

    def function(q, k, v, temperature, **kwargs):
        return xk.xfa(q, k.expand(q.shape), v.expand(q.shape), temperature, **kwargs)

    with ran("xfa_forward", "xfa_backward"):
        out = function(p.q, k, v, p.temperature, backend=backend)
        grads = torch.autograd.grad(out, (k, v), p.dout)

    def by_reference(dtype):
        kr, vr = (x.detach().to(dtype).requires_grad_() for x in (k, v))
        out = function(p.q.to(dtype), kr, vr, p.temperature.to(dtype), backend="reference")
        return out, *torch.autograd.grad(out, (kr, vr), p.dout.to(dtype))

    for name, got, eager, oracle in zip(
        ("out", "dk", "dv"), (out, *grads), by_reference(torch.float32), by_reference(torch.float64), strict=True
    ):
        assert_close(got.detach(), eager.detach(), oracle.detach(), name)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES, ids=str)
def test_no_tokens_or_no_batch(shape, masked, backend, device, ran):
    p = make_problem(shape, device=device, masked=masked)
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    for name in ("out", "dq", "dk", "dv"):
        assert result[name].shape == p.q.shape
    assert result["dtemperature"].tolist() == [0.0] * shape[2]


def test_output_is_a_view_of_token_major_memory(backend, device, ran):
    p = make_problem((2, 9, 3, 4), device=device)
    for tensors in ((p.q, p.k, p.v, p.temperature), p.inputs()):
        with ran("xfa_forward"):
            out = xk.xfa(*tensors, backend=backend)
        assert out.shape == (2, 3, 9, 4)
        assert out.transpose(1, 2).is_contiguous()
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("view", [(3,), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_temperature_shapes_and_dtypes(view, dtype, backend, device, ran):
    p = make_problem((2, 21, 3, 6), temperature_dtype=dtype, device=device)
    result = check(p, backend, ran)
    t = p.temperature.view(view).detach().requires_grad_()
    with ran("xfa_forward", "xfa_backward"):
        out = xk.xfa(p.q, p.k, p.v, t, backend=backend)
        (grad,) = torch.autograd.grad(out, t, p.dout)
    assert grad.shape == view and grad.dtype == dtype
    p.check({**result, "out": out.detach(), "dtemperature": grad.view(3)})


@pytest.mark.needs(dtype=torch.float64)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_float64_temperature(dtype, config, backend, device, ran):
    """Type promotion applies, as in PyTorch: the map is computed in float64."""
    problem = make_problem(
        (2, 41, 3, 6), config, dtype=dtype, temperature_dtype=torch.float64, masked=True, device=device
    )
    check(problem, backend, ran)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("map", ["query_key", "key_value"])
def test_shared_temperature_is_summed_in_the_accumulate_dtype(map, dtype, backend, device):
    """Its gradient is a sum over heads whose terms may cancel, and may overflow float16."""
    q = torch.ones(1, 2, 4, 1, device=device)
    v = torch.tensor([1000.0, -999.0], device=device).view(1, 2, 1, 1).expand(1, 2, 4, 1)
    t = torch.ones(1, dtype=dtype, device=device, requires_grad=True)
    xk.xfa(q, q, v, t, map=map, activation="identity", backend=backend).backward(torch.full_like(q, 100.0))
    expected = {"query_key": 400.0, "key_value": 400.0}[map]
    torch.testing.assert_close(t.grad, torch.full_like(t, expected), rtol=1e-3, atol=0)


@pytest.mark.parametrize("map", ["query_key", "key_value"])
@pytest.mark.parametrize("norm", ["token", "feature"])
def test_norm_equal_to_eps(norm, map, backend, device, ran):
    """The gradient is that of F.normalize in the installed torch: for norms below, above and equal to eps."""
    for factor in (0.5, 2.0, 1.0):
        q, k = (torch.full((1, 1, 1, 1), 0.5 * factor, device=device, requires_grad=True) for _ in range(2))
        v, t = torch.full((1, 1, 1, 1), 3.0, device=device), torch.ones(1, device=device)
        with ran("xfa_forward", "xfa_backward"):
            out = xk.xfa(q, k, v, t, map=map, norm=norm, activation="identity", eps=0.5, backend=backend)
            got = torch.autograd.grad(out.sum(), (q, k))
        normed = [F.normalize(x, dim=-2, eps=0.5) for x in (q, k)]
        expected = torch.autograd.grad((normed[0] * normed[1] * v).sum(), (q, k))
        if factor == 1.0 and expected[0].item() == 0:
            pytest.skip("before torch 2.14, F.normalize had the derivative from above if the norm equals eps")
        torch.testing.assert_close(got, expected)


@pytest.mark.needs(dtype=torch.float64)
def test_scalar_temperature(backend, device, ran):
    """A single temperature for all heads; its gradient is the sum over the heads."""
    p = make_problem((2, 21, 3, 6), dtype=torch.float64, device=device)
    p.temperature.fill_(1.7)
    expected = p.run(xk.xfa, backend=backend)
    for shape in ((), (1,)):
        t = torch.full(shape, 1.7, dtype=torch.float64, device=device, requires_grad=True)
        with ran("xfa_forward", "xfa_backward"):
            out = xk.xfa(p.q, p.k, p.v, t, backend=backend)
            (grad,) = torch.autograd.grad(out, t, p.dout)
        assert grad.shape == shape
        torch.testing.assert_close(out, expected["out"], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(grad.sum(), expected["dtemperature"].sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "temperature", "qv"])
def test_only_requested_gradients(wanted, kernel, device):
    names = ("q", "k", "v", "temperature")
    p = make_problem((2, 33, 2, 8), device=device)
    everything = p.run(xk.xfa, backend=kernel)
    chosen = [name for name in names if name == wanted or (name in wanted and wanted == "qv")]
    tensors = {name: getattr(p, name).detach().requires_grad_(name in chosen) for name in names}
    out = xk.xfa(*tensors.values(), backend=kernel)
    out.backward(p.dout)
    for name, tensor in tensors.items():
        if name in chosen:
            assert_bitwise(tensor.grad, everything[f"d{name}"], f"d{name}")
        else:
            assert tensor.grad is None


def test_same_bits_with_and_without_grad(kernel, device, ran):
    p = make_problem((2, 33, 2, 8), device=device)
    expected = p.run(xk.xfa, backend=kernel)["out"]
    tensors = (p.q, p.k, p.v, p.temperature)
    with ran("xfa_forward"):
        assert_bitwise(xk.xfa(*tensors, backend=kernel), expected, "plain tensors")
    with torch.no_grad():
        assert_bitwise(xk.xfa(*p.inputs(), backend=kernel), expected, "no_grad")
    with torch.inference_mode():
        assert_bitwise(xk.xfa(*tensors, backend=kernel), expected, "inference_mode")


@pytest.mark.needs(dtype=torch.float64)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_derivatives(config, masked, backend, device, ran, slow):
    """First and second derivatives, the first computed by the kernels."""
    shape = (1, 4, 1, 2) if slow else (2, 4, 2, 2)
    p = make_problem(shape, config, dtype=torch.float64, masked=masked, device=device)

    def function(q, k, v, temperature):
        return xk.xfa(q, k, v, temperature, token_mask=p.token_mask, **config.kwargs(), backend=backend)

    with ran("xfa_forward", "xfa_backward"):
        assert gradcheck(function, p.inputs(), fast_mode=slow)
        assert gradgradcheck(function, p.inputs(), fast_mode=slow)


@pytest.mark.needs(dtype=torch.float64)
def test_third_derivatives_are_right_or_refused(backend, device):
    p = make_problem((1, 4, 1, 2), dtype=torch.float64, device=device)
    q, k, v, t = p.inputs()

    def third(function):
        (first,) = torch.autograd.grad(function(q, k, v, t).square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q, create_graph=True)
        return torch.autograd.grad(second.square().sum(), q)[0]

    expected = third(lambda *x: xk.xfa(*x, backend="reference"))
    try:
        result = third(lambda *x: xk.xfa(*x, backend=backend))
    except RuntimeError as error:
        assert "differentia" in str(error) or "derivative" in str(error)
    else:
        torch.testing.assert_close(result, expected)


def test_gradient_penalty(backend, device, ran):
    """Double backward in float32: a loss with a gradient penalty."""
    p = make_problem((2, 40, 2, 8), device=device)

    def penalty(problem, name):
        q, k, v, t = problem.inputs()
        out = xk.xfa(q, k, v, t, backend=name)
        grads = torch.autograd.grad(out, (q, k, v), problem.dout, create_graph=True)
        return torch.autograd.grad(out.square().mean() + sum(g.square().sum() for g in grads), (q, k, v, t))

    with ran("xfa_forward", "xfa_backward"):
        ours = penalty(p, backend)
    for name, got, eager, oracle in zip(
        RESULTS[1:], ours, penalty(p, "reference"), penalty(p.to(torch.float64), "reference"), strict=True
    ):
        assert_close(got, eager, oracle, name)


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.needs(dtype=torch.float64)
@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masked_tokens_are_as_if_absent(config, backend, device, ran):
    """Each sequence alone, with its masked tokens removed, has the same results; masked rows are exactly 0."""
    p = make_problem((3, 50, 2, 7), config, dtype=torch.float64, masked=True, device=device)
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    dtemperature = 0
    for b in range(3):
        kept = p.token_mask[b]
        q, k, v, dout = (x[b : b + 1, :, kept] for x in (p.q, p.k, p.v, p.dout))
        alone = Problem(q, k, v, p.temperature, dout, config).run(xk.xfa, backend=backend)
        dtemperature = dtemperature + alone.pop("dtemperature")
        for name, expected in alone.items():
            torch.testing.assert_close(result[name][b : b + 1, :, kept], expected, rtol=1e-12, atol=1e-12)
            assert result[name][b, :, ~kept].abs().max() == 0
    torch.testing.assert_close(result["dtemperature"], dtemperature, rtol=1e-12, atol=1e-12)


@pytest.mark.needs(dtype=torch.float64)
def test_extreme_masks(backend, device):
    """Masks that keep all tokens, or none in one sequence of the batch."""
    p = make_problem((2, 20, 2, 5), dtype=torch.float64, device=device)
    plain = p.run(xk.xfa, backend=backend)
    p.token_mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    for name, x in p.run(xk.xfa, backend=backend).items():
        torch.testing.assert_close(x, plain[name], rtol=1e-12, atol=1e-12)
    p.token_mask[1] = False
    result = p.run(xk.xfa, backend=backend)
    assert result["dtemperature"].isfinite().all()
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(result[name][0], plain[name][0], rtol=1e-12, atol=1e-12)
        assert result[name][1].abs().max() == 0


def test_mask_of_any_strides(kernel, device):
    p = make_problem((4, 30, 2, 5), masked=True, device=device)
    expected = p.run(xk.xfa, backend=kernel)
    mask = p.token_mask
    sliced = torch.zeros(8, 90, dtype=torch.bool, device=device)[::2, 1::3].copy_(mask)
    for view in (mask.t().contiguous().t(), sliced):
        p.token_mask = view
        for name, x in p.run(xk.xfa, backend=kernel).items():
            assert_bitwise(x, expected[name], name)
    p.token_mask = mask[:1].expand(4, 30)
    shared = p.run(xk.xfa, backend=kernel)
    p.token_mask = p.token_mask.contiguous()
    for name, x in p.run(xk.xfa, backend=kernel).items():
        assert_bitwise(x, shared[name], name)


# ---------------------------------------------------------------------------------------------- safety of autograd


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_inputs_changed_before_backward_are_detected(name, backend, device):
    p = make_problem((1, 10, 2, 4), device=device)
    tensors = {x: t * 1.0 for x, t in zip(("q", "k", "v", "temperature"), p.inputs(), strict=True)}
    out = xk.xfa(*tensors.values(), backend=backend)
    with torch.no_grad():
        tensors[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.dout)


def test_backward_twice(kernel, device):
    p = make_problem((2, 33, 2, 8), device=device)
    inputs = p.inputs()
    out = xk.xfa(*inputs, backend=kernel)
    first = torch.autograd.grad(out, inputs, p.dout, retain_graph=True)
    second = torch.autograd.grad(out, inputs, p.dout)
    for a, b in zip(first, second, strict=True):
        assert_bitwise(a, b, "the same graph again")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs, p.dout)


def test_activation_checkpointing(kernel, device):
    p = make_problem((2, 33, 2, 8), device=device)
    expected = p.run(xk.xfa, backend=kernel)

    def checkpointed(*tensors, **kwargs):
        return torch.utils.checkpoint.checkpoint(lambda *x: xk.xfa(*x, **kwargs), *tensors, use_reentrant=False)

    for name, x in p.run(checkpointed, backend=kernel).items():
        assert_bitwise(x, expected[name], name)

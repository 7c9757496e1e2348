"""Uninitialized memory, zeros, clamped norms, huge and tiny numbers, NaN and Inf."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import CONFIGS, Config, Problem, make_problem, randn
from layer_cases import make_layer

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise, assert_close

UNWRITTEN_SHAPES = ((2, 17, 3, 5), (1, 4099, 2, 24), (1, 37, 1, 130), (2, 1, 2, 1), (2, 0, 2, 3))


@pytest.fixture
def nan_filled_allocations():
    """torch.empty returns memory filled with NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_result_is_written_and_no_unwritten_memory_read(
    config, dtype, masked, kernel, device, ran, shorter, interpreted, takes_features, nan_filled_allocations
):
    for shape in map(shorter, UNWRITTEN_SHAPES):
        if not takes_features(shape[3]):
            continue
        if interpreted and shape[1] > 20 and masked != (dtype == torch.bfloat16):
            continue  # shapes with more tokens: with a mask in bfloat16 only, without in float32 only
        p = make_problem(shape, config, dtype=dtype, masked=masked, device=device)
        with ran("xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend=kernel)
        for name, x in result.items():
            assert not x.isnan().any(), f"{name} of {shape}"


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_primitives_write_every_result(masked, kernel, device, ran, shorter, nan_filled_allocations):
    for B, N, H, D in map(shorter, UNWRITTEN_SHAPES):
        a, b = (randn(B, H, N, d, seed=d, device=device) for d in (D, D + 3))
        mask = torch.zeros(B, N, dtype=torch.bool, device=device) if masked else None
        with ran("gram", "channel_mix"):
            results = (
                *xk.gram(a, b, token_mask=mask, backend=kernel),
                *xk.gram(b, b, symmetric=True, token_mask=mask, backend=kernel),
                xk.channel_mix(a, randn(D + 3, D, seed=1, device=device), add=b, backend=kernel),
            )
        for x in results:
            assert not x.isnan().any()


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
def test_layers_write_every_result(block, kernel, device, ran, nan_filled_allocations):
    for shape in ((2, 67, 20, 4), (1, 1, 3, 1), (1, 300, 33, 3)):
        layer = make_layer(shape, block=block, masked=block, device=device)
        with ran("layer_forward", "layer_backward"):
            result = layer.run(form="gram", backend=kernel)
        for name, x in result.items():
            assert not x.isnan().any(), f"{name} of {shape}"


GARBAGE = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
import xformer_kernels as xk
from cases import CONFIGS, make_problem
from layer_cases import make_layer
from test_edge_values import UNWRITTEN_SHAPES
torch.set_num_threads(2)
for shape in UNWRITTEN_SHAPES:
    for config in CONFIGS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for masked in (False, True):
                result = make_problem(shape, config, dtype=dtype, masked=masked).run(xk.xfa, backend="cpp")
                bits = (x.contiguous().view(torch.uint8).numpy().tobytes() for x in result.values())
                print(shape, config, dtype, masked, hashlib.sha256(b"".join(bits)).hexdigest())
for block in (False, True):
    result = make_layer((2, 300, 40, 4), block=block).run(form="gram", backend="cpp")
    bits = (x.contiguous().view(torch.uint8).numpy().tobytes() for x in result.values())
    print("layer", block, hashlib.sha256(b"".join(bits)).hexdigest())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs malloc.perturb of glibc")
@pytest.mark.parametrize("only", ["cpp"])
def test_scratch_memory_of_the_kernels_is_written_before_it_is_read(only, need_backend):
    """Results are bitwise the same if glibc fills allocated memory with huge numbers (0x7f7f...)."""
    need_backend(only)

    def digests(**env):
        command = [sys.executable, "-c", GARBAGE, os.path.dirname(__file__)]
        return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True).stdout

    plain = digests()
    assert len(plain.splitlines()) == len(UNWRITTEN_SHAPES) * len(CONFIGS) * 3 * 2 + 2
    assert digests(GLIBC_TUNABLES="glibc.malloc.perturb=128") == plain


def check(p: Problem, backend: str, ran) -> dict[str, torch.Tensor]:
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    p.check(result)
    return result


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-12, 0.1])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_zero_features_and_zero_tokens(config, eps, dtype, backend, device, ran):
    """Norms of zero, over tokens and over features; their gradients are divided by eps."""
    p = make_problem((2, 40, 2, 6), replace(config, eps=eps), dtype=dtype, layout="token_major", device=device)
    p.q[:, 0, :, 2] = 0
    p.k[:, :, :, 3] = 0
    p.q[1, :, 5] = 0
    p.k[0, :, 7] = 0
    check(p, backend, ran)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_all_zero(config, backend, device, ran):
    p = make_problem((1, 12, 2, 4), config, layout="contiguous", device=device)
    for x in (p.q, p.k, p.v):
        x.zero_()
    result = check(p, backend, ran)
    assert result["out"].abs().max() == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("eps", [1e-36, 1e-30, 1e-6, 3.0, 1e6])
@pytest.mark.parametrize("norm", ["token", "feature"])
def test_eps(norm, eps, backend, device, ran):
    """From close to the smallest eps that float32 can divide by, up to above all norms; some norms are zero."""
    p = make_problem((2, 30, 2, 6), Config(norm=norm, eps=eps), layout="contiguous", device=device)
    p.q[:, :, :, 1] = 0
    p.k[:, :, 4] = 0
    p.k[:, :, :, 2] *= 0.05
    check(p, backend, ran)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scale", [1e-11, 1e-5, 1e6, 1e12])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_magnitudes_of_q_and_k(config, scale, backend, device, ran):
    """q is scaled by `scale` and k by its inverse; both norms stay above eps, so the cosines do not change."""
    p = make_problem((2, 500, 2, 12), config, layout="contiguous", device=device)
    p.q *= scale
    p.k /= scale
    check(p, backend, ran)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, -2.0, 1e-3, 100.0, 1e4])
def test_temperatures(temperature, dtype, backend, device, ran):
    """Up to one-hot maps: the softmax subtracts the maximum first."""
    p = make_problem((2, 64, 2, 12), dtype=dtype, device=device)
    p.temperature.fill_(temperature)
    check(p, backend, ran)


def test_mean_far_above_the_spread(backend, device, ran, shorter):
    """Features nearly constant over the tokens: sums of squares are far larger than the differences."""
    p = make_problem(shorter((1, 4000, 2, 16)), layout="contiguous", device=device)
    for x in (p.q, p.k, p.v):
        x += 20
    check(p, backend, ran)


# -------------------------------------------------------------------------------------------------------- NaN and Inf


@pytest.mark.one_in(9)
# for products of bf16 pairs (of tokens and of features): an even number of features, an odd number of tokens
@pytest.mark.parametrize("dtype, N, D", [(torch.float32, 40, 5), (torch.bfloat16, 41, 6)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_nonfinite_inputs_propagate(config, name, value, dtype, N, D, backend, device, ran):
    """The output is NaN or Inf exactly where the reference's is; gradients are not finite where the reference's are
    not; other heads and sequences do not change.
    """
    p = make_problem((2, N, 2, D), config, dtype=dtype, layout="contiguous", device=device)
    clean = p.run(xk.xfa, backend=backend)
    getattr(p, name)[1, 0, 3, 2] = value
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    p.check(result, ("out",))
    oracle = p.oracle()
    for x in ("dq", "dk", "dv", "dtemperature"):
        hidden = result[x].isfinite() & ~oracle[x].isfinite()
        assert not hidden.any(), f"{x} is finite at {int(hidden.sum())} places where the reference's is not"
    for x in ("out", "dq", "dk", "dv"):
        assert_bitwise(result[x][0], clean[x][0], f"{x} of the other sequence")
        assert_bitwise(result[x][1, 1], clean[x][1, 1], f"{x} of the other head")
    assert result["dtemperature"][1].isfinite()


@pytest.mark.parametrize("dtype, N, D", [(torch.float32, 40, 5), (torch.bfloat16, 41, 6)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_dout(value, dtype, N, D, backend, device, ran):
    p = make_problem((1, N, 2, D), dtype=dtype, layout="contiguous", dout="contiguous", device=device)
    clean = p.run(xk.xfa, backend=backend)
    p.dout[0, 1, 3, 2] = value
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    oracle = p.oracle()
    for x in ("dq", "dk", "dv"):
        assert not (result[x].isfinite() & ~oracle[x].isfinite()).any(), x
        assert_bitwise(result[x][:, 0], clean[x][:, 0], f"{x} of the other head")
    assert not result["dtemperature"][1].isfinite()


def test_nan_temperature_stays_in_its_head(backend, device, ran):
    p = make_problem((2, 40, 3, 5), device=device)
    clean = p.run(xk.xfa, backend=backend)
    p.temperature[1] = float("nan")
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    for x in ("out", "dq", "dk", "dv"):
        assert_bitwise(result[x][:, ::2], clean[x][:, ::2], x)
    assert result["out"][:, 1].isnan().all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_what_masked_tokens_hold_does_not_matter(config, value, backend, device, ran):
    """Values of masked tokens of q, k, v and dout are ignored: padding may contain anything."""
    p = make_problem((2, 40, 2, 5), config, layout="contiguous", dout="contiguous", masked=True, device=device)
    clean = p.run(xk.xfa, backend=backend)
    rows = (~p.token_mask)[:, None, :, None]
    for x in (p.q, p.k, p.v, p.dout):
        x.masked_fill_(rows, value)
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=backend)
    for name, x in result.items():
        assert_bitwise(x, clean[name], name)


@pytest.mark.needs(dtype=torch.float64)
def test_second_derivatives_ignore_masked_tokens(backend, device):
    p = make_problem(
        (2, 10, 2, 3), layout="contiguous", dout="contiguous", dtype=torch.float64, masked=True, device=device
    )

    def second(p):
        inputs = p.inputs()
        out = xk.xfa(*inputs, token_mask=p.token_mask, backend=backend)
        grads = torch.autograd.grad(out, inputs, p.dout, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)

    clean = second(p)
    for x in (p.q, p.k, p.v, p.dout):
        x.masked_fill_((~p.token_mask)[:, None, :, None], float("nan"))
    for got, expected in zip(second(p), clean, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_of_masked_nonfinite_tokens(value, backend, device, ran):
    a, b = (randn(2, 2, 20, 4, seed=s, device=device) for s in (1, 2))
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    clean = xk.gram(a, b, token_mask=mask, backend=backend)
    a, b = (x.masked_fill((~mask)[:, None, :, None], value).requires_grad_() for x in (a, b))
    with ran("gram", "channel_mix"):
        result = xk.gram(a, b, token_mask=mask, backend=backend)
        grads = torch.autograd.grad(sum(x.square().sum() for x in result), (a, b))
    for got, expected in zip(result, clean, strict=True):
        assert_bitwise(got.detach(), expected, "gram")
    for grad in grads:
        assert grad.isfinite().all()
        assert grad[(~mask)[:, None].expand(2, 2, 20)].abs().max() == 0


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "add", "add_scale"])
def test_nonfinite_inputs_of_channel_mix(name, value, backend, device, ran):
    shapes = {"x": (2, 2, 9, 4), "weight": (2, 2, 5, 4), "bias": (2, 2, 5), "add": (2, 2, 9, 5), "add_scale": (2, 2, 5)}
    t = {key: randn(*shape, seed=i, device=device) for i, (key, shape) in enumerate(shapes.items())}
    t[name][1, 0, 3] = value
    with ran("channel_mix"):
        y = xk.channel_mix(**t, backend=backend)
    expected = xk.channel_mix(**{key: x.double() for key, x in t.items()}, backend="reference")
    assert_close(y, expected.float(), expected, "y")

"""xfa with a user-defined function of the map (map_fn), and with dropout of its entries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import RESULTS, Config, make_problem, randn
from torch.autograd import gradcheck

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise

pytestmark = pytest.mark.needs(norm=None)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("norm", ["token", "feature"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_map_fn_softmax_is_the_softmax(norm, masked, dtype, backend, device, ran):
    """map_fn receives the scaled cosines in the accumulate dtype, and is differentiated."""
    p = make_problem((2, 60, 3, 12), Config(norm=norm), dtype=dtype, masked=masked, device=device)
    seen = []

    def rule(S):
        seen.append((S.shape, S.dtype))
        return S.softmax(-1)

    with ran("gram", "channel_mix"):
        result = p.run(xk.xfa, map_fn=rule, backend=backend)
    assert seen == [((2, 3, 12, 12), torch.float32)]
    p.check(result)


def test_map_fn_with_parameters(backend, device, ran):
    """Talking heads: a learnable mix of the maps of all heads; also with the reference."""
    p = make_problem((2, 30, 3, 6), dtype=torch.float64, device=device)
    mix = randn(3, 3, seed=5, dtype=torch.float64, device=device).requires_grad_()

    def function(q, k, v, t, mix):
        def rule(S):
            return torch.einsum("gh,bhij->bgij", mix, S).softmax(-1)

        return xk.xfa(q, k, v, t, map_fn=rule, backend=backend)

    def by_hand(q, k, v, t, mix):
        cos = F.normalize(q, dim=2).transpose(2, 3) @ F.normalize(k, dim=2)
        A = torch.einsum("gh,bhij->bgij", mix, t.view(1, -1, 1, 1) * cos).softmax(-1)
        return v @ A.transpose(2, 3)

    inputs = (*p.inputs(), mix)
    with ran("gram", "channel_mix"):
        out = function(*inputs)
        grads = torch.autograd.grad(out, inputs, p.dout)
    expected = by_hand(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(grads, torch.autograd.grad(expected, inputs, p.dout), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_map_fn_of_key_value(backend, device, ran):
    p = make_problem((2, 30, 3, 6), Config(map="key_value"), dtype=torch.float64, device=device)
    plain = p.run(xk.xfa, backend=backend)
    with ran("gram", "channel_mix"):
        result = p.run(xk.xfa, map_fn=lambda M: M.clone(), backend=backend)
    for name in RESULTS:
        torch.testing.assert_close(result[name], plain[name], rtol=1e-12, atol=1e-12)


def test_dropout_drops_entries_of_the_map(backend, device, ran):
    """If v is the identity matrix, the output is the map: each entry is dropped, or scaled by 1 / (1 - p)."""
    D, rate = 64, 0.25
    p = make_problem((2, D, 2, D), device=device)
    v = torch.eye(D, device=device).expand(2, 2, D, D)
    A = xk.xfa(p.q, p.k, v, p.temperature, backend=backend)
    torch.manual_seed(0)
    with ran("gram", "channel_mix"):
        dropped = xk.xfa(p.q, p.k, v, p.temperature, dropout_p=rate, backend=backend)
    kept = dropped != 0
    assert abs(kept.double().mean().item() - (1 - rate)) < 0.02
    torch.testing.assert_close(dropped[kept], A[kept] / (1 - rate), rtol=1e-5, atol=1e-7)
    torch.manual_seed(0)
    assert_bitwise(xk.xfa(p.q, p.k, v, p.temperature, dropout_p=rate, backend=backend), dropped, "same seed")
    assert not torch.equal(xk.xfa(p.q, p.k, v, p.temperature, dropout_p=rate, backend=backend), dropped)


def test_dropout_gradient(backend, device, slow):
    """The gradient uses the same dropped entries as the forward."""
    p = make_problem((1, 9, 2, 3), dtype=torch.float64, device=device)

    def function(q, k, v, t):
        torch.manual_seed(3)
        return xk.xfa(q, k, v, t, dropout_p=0.4, backend=backend)

    assert gradcheck(function, p.inputs(), fast_mode=slow)

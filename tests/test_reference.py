"""The reference defines the results: it must equal the formulas written as loops, and be twice differentiable."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CONFIGS, Config, make_problem, randn, random_mask
from torch.autograd import gradcheck, gradgradcheck

from xformer_kernels import reference


def xfa_loops(q, k, v, temperature, config: Config, mask) -> np.ndarray:
    """xfa computed element by element; tokens where mask is False are skipped."""
    B, H, N, D = q.shape
    out = np.zeros_like(v)
    for b in range(B):
        tokens = [n for n in range(N) if mask is None or mask[b, n]]
        for h in range(H):
            t = temperature[h]

            def unit(x, n, i, b=b, h=h, tokens=tokens):
                along = [x[b, h, m, i] for m in tokens] if config.norm == "token" else x[b, h, n]
                return x[b, h, n, i] / max(math.sqrt(sum(value * value for value in along)), config.eps)

            for i in range(D):
                if config.map == "query_key":
                    row = [t * sum(unit(q, n, i) * unit(k, n, j) for n in tokens) for j in range(D)]
                    if config.activation == "softmax":
                        total = sum(math.exp(x) for x in row)
                        row = [math.exp(x) / total for x in row]
                    for n in tokens:
                        out[b, h, n, i] = sum(row[j] * v[b, h, n, j] for j in range(D))
                else:
                    row = [t * sum(unit(k, n, i) * v[b, h, n, j] for n in tokens) for j in range(D)]
                    for n in tokens:
                        for j in range(D):
                            out[b, h, n, j] += unit(q, n, i) * row[j]
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_xfa_equals_loops(config, masked):
    p = make_problem((2, 5, 2, 3), config, dtype=torch.float64, masked=masked)
    expected = xfa_loops(
        *(x.numpy() for x in (p.q, p.k, p.v, p.temperature)), config, p.token_mask.numpy() if masked else None
    )
    out = reference.xfa(p.q, p.k, p.v, p.temperature, token_mask=p.token_mask, **config.kwargs())
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("norm", ["token", "feature"])
def test_xfa_clamps_norms_by_eps(norm):
    """Norms below eps are replaced by eps, not increased by it."""
    config = Config(norm=norm, eps=2.0)
    p = make_problem((1, 3, 1, 2), config, dtype=torch.float64)
    p.q[:, :, :1, :1] *= 1e-3
    expected = xfa_loops(*(x.numpy() for x in (p.q, p.k, p.v, p.temperature)), config, None)
    out = reference.xfa(p.q, p.k, p.v, p.temperature, **config.kwargs())
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_xfa_derivatives(config, masked):
    p = make_problem((2, 4, 1, 2), config, dtype=torch.float64, masked=masked)

    def function(q, k, v, temperature):
        return reference.xfa(q, k, v, temperature, token_mask=p.token_mask, **config.kwargs())

    assert gradcheck(function, p.inputs())
    assert gradgradcheck(function, p.inputs())


def test_zero_column_has_the_gradient_of_normalize():
    """A feature that is zero for every token: no NaN, and exactly the gradient of F.normalize."""
    p = make_problem((1, 6, 1, 3), dtype=torch.float64)
    p.q[..., 1] = 0
    q, k, v, t = p.inputs()
    cos = F.normalize(q, dim=2).transpose(2, 3) @ F.normalize(k, dim=2)
    expected_out = v @ (t.view(1, 1, 1, 1) * cos).softmax(-1).transpose(2, 3)
    expected = torch.autograd.grad(expected_out, (q, k, v, t), p.dout)
    result = p.eager()
    torch.testing.assert_close(result["out"], expected_out.detach(), rtol=1e-13, atol=1e-13)
    for name, grad in zip(("dq", "dk", "dv", "dtemperature"), expected, strict=True):
        assert grad.isfinite().all()
        torch.testing.assert_close(result[name], grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gram_equals_loops(masked):
    B, H, N, Da, Db = 2, 2, 5, 3, 4
    a, b = randn(B, H, N, Da, seed=1, dtype=torch.float64), randn(B, H, N, Db, seed=2, dtype=torch.float64)
    mask = random_mask(B, N) if masked else None
    G, ssq_a, ssq_b = reference.gram(a, b, token_mask=mask)
    for index in np.ndindex(B, H, Da, Db):
        s, h, i, j = index
        tokens = [n for n in range(N) if mask is None or mask[s, n]]
        assert math.isclose(G[index], sum(a[s, h, n, i] * b[s, h, n, j] for n in tokens), rel_tol=1e-12, abs_tol=1e-14)
        assert math.isclose(ssq_a[s, h, i], sum(a[s, h, n, i] ** 2 for n in tokens), rel_tol=1e-12)
        assert math.isclose(ssq_b[s, h, j], sum(b[s, h, n, j] ** 2 for n in tokens), rel_tol=1e-12)


def test_channel_mix_equals_loops():
    B, H, N, I, I2, O = 2, 2, 3, 4, 2, 3  # noqa: E741
    shapes = {"x": (B, H, N, I), "weight": (B, H, O, I), "bias": (B, H, O), "add": (B, H, N, O)}
    shapes |= {"add_scale": (B, H, O), "x2": (B, H, N, I2), "weight2": (B, H, O, I2)}
    t = {name: randn(*shape, seed=i, dtype=torch.float64) for i, (name, shape) in enumerate(shapes.items())}
    y = reference.channel_mix(**t)
    for b, h, n, o in np.ndindex(B, H, N, O):
        expected = sum(t["weight"][b, h, o, i] * t["x"][b, h, n, i] for i in range(I))
        expected += sum(t["weight2"][b, h, o, i] * t["x2"][b, h, n, i] for i in range(I2))
        expected += t["bias"][b, h, o] + t["add_scale"][b, h, o] * t["add"][b, h, n, o]
        assert math.isclose(y[b, h, n, o], expected, rel_tol=1e-12, abs_tol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_wider_temperature_does_not_change_the_output_dtype(dtype):
    """A float32 temperature with bfloat16 features, as in mixed precision."""
    p = make_problem((2, 9, 2, 4), dtype=dtype, temperature_dtype=torch.float64)
    result = p.eager()
    assert result["out"].dtype == result["dq"].dtype == dtype
    assert result["dtemperature"].dtype == torch.float64

"""The tolerance rule for all results.

    err(result, oracle) <= 2 err(eager, oracle) + a few ulp

The oracle is the reference in float64, `eager` the same reference in the dtype of the inputs. The rule holds for both
the maximum and the root mean square error over the whole tensor; a ulp is that of the result's dtype at the tensor's
magnitude. NaN and Inf must be exactly where the oracle, rounded to the result's dtype, has them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xformer_kernels import reference

ULPS = 8
# There is no wider oracle for float64: the slack covers the oracle's own rounding over thousands of terms.
ULPS_FLOAT64 = 256


def assert_close(result: Tensor, eager: Tensor, oracle: Tensor, what: str, terms: Tensor | None = None) -> None:
    """Asserts the rule above.

    `terms`: the minuend of the final subtraction, if a result is a small difference of large numbers.
    """
    assert result.shape == oracle.shape, f"{what}: shape {tuple(result.shape)}, not {tuple(oracle.shape)}"
    assert oracle.dtype == torch.float64, f"{what}: the oracle is {oracle.dtype}"
    assert_same_nonfinite(result, oracle, what)
    finite = oracle.to(result.dtype).isfinite()
    exact = oracle[finite]
    ours = (result[finite].double() - exact).abs()
    theirs = (eager[finite].double() - exact).abs()
    theirs = theirs[theirs.isfinite()]
    terms = exact if terms is None else terms[terms.isfinite()]
    ulp = torch.finfo(result.dtype).eps * (ULPS_FLOAT64 if result.dtype == torch.float64 else ULPS)
    for name, reduce in (("max", _max), ("rms", _rms)):
        magnitude = max(reduce(exact), reduce(terms))
        error, allowed = reduce(ours), 2 * reduce(theirs) + ulp * magnitude
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e} > {allowed:.3e} allowed "
            f"(eager's {reduce(theirs):.3e}, magnitude {magnitude:.3e}, {result.dtype}, shape {tuple(result.shape)})"
        )


def assert_same_nonfinite(result: Tensor, oracle: Tensor, what: str) -> None:
    expected = oracle.to(result.dtype)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        got, wanted = kind(result), kind(expected)
        assert torch.equal(got, wanted), f"{what}: {kind.__name__} at {int(got.sum())} places, not {int(wanted.sum())}"


def assert_bitwise(a: Tensor, b: Tensor, what: str) -> None:
    """Asserts bitwise equality, including NaN payloads and signs of zero."""
    assert a.shape == b.shape and a.dtype == b.dtype, f"{what}: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
    bits = [x.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for x in (a, b)]
    assert torch.equal(*bits), f"{what}: bits differ, by at most {(a.double() - b.double()).abs().max().item():.3e}"


def _max(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def gradient_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    dout: Tensor,
    *,
    map: str = "query_key",
    norm: str = "token",
    activation: str = "softmax",
    eps: float = 1e-12,
    token_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The minuends of the subtractions in the gradients of xfa, for :func:`assert_close`; float64 arguments.

    dq is dq^ / |q| minus its component along q, and dS is A * dA minus its mean; dtemperature is a sum of terms of both
    signs.
    """
    dim = 2 if norm == "token" else 3
    if token_mask is not None:
        q, k, v, dout = (torch.where(token_mask[:, None, :, None], x, 0) for x in (q, k, v, dout))
    norm_q, norm_k = (
        x.norm(dim=dim, keepdim=True).clamp_min(eps) if norm != "none" else x.new_ones(()) for x in (q, k)
    )
    q, k, t = q / norm_q, k / norm_k, temperature.view(1, -1, 1, 1)
    if map == "query_key":
        cos = q.transpose(2, 3) @ k
        dS = dout.transpose(2, 3) @ v
        if activation == "softmax":
            dS = dS * (t * cos).softmax(-1)
        dq, dk, dt = t * k @ dS.transpose(2, 3), t * q @ dS, dS * cos
    else:
        M, dM = k.transpose(2, 3) @ v, q.transpose(2, 3) @ dout
        dq, dk, dt = dout @ (t * M).transpose(2, 3), v @ (t * dM).transpose(2, 3), dM * M
    return {"dq": dq / norm_q, "dk": dk / norm_k, "dtemperature": dt.square().sum((0, 2, 3)).sqrt()}


def linear_attention_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    feature_map: str | tuple[str, str] = "relu",
    normalize: bool = True,
    scale: float = 1.0,
    eps: float = 1e-6,
    query_mask: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same as :func:`gradient_terms` for linear_attention; float64 arguments.

    The gradients of phi(q) and phi(k) are those of the numerator minus those of the denominator; the gradient of a
    softmax subtracts its mean.
    """
    of_q, of_k = reference.feature_maps(feature_map)
    q, dout = (reference.masked(x, query_mask) for x in (q, dout))
    k, v = (reference.masked(x, token_mask) for x in (k, v))
    q, k = reference.features(q, of_q), reference.masked(reference.features(k, of_k), token_mask)
    if normalize:
        dout = dout / ((q * k.sum(2, keepdim=True)).sum(3, keepdim=True) + eps)
    dq, dk = scale * dout @ (v.transpose(2, 3) @ k), scale * v @ (dout.transpose(2, 3) @ q)
    return {
        "dq": q * dq if of_q.startswith("softmax") else dq,
        "dk": k * dk if of_k.startswith("softmax") else dk,
    }

"""The ops of linear attention, and gram with sums."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, randn, random_mask
from torch.autograd import gradcheck

import xformer_kernels as xk
from xformer_kernels import dispatch, reference
from xformer_kernels.spec import Spec
from xformer_kernels.testing import assert_bitwise, assert_close


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op(dtype, kernel, device):
    a, b = (randn(2, 3, 19, d, seed=d, dtype=dtype, device=device).requires_grad_() for d in (5, 4))
    torch.library.opcheck(torch.ops.xformer_kernels.gram_and_sum.default, (a, b, kernel))


@pytest.mark.one_in(2, slow=False)
@pytest.mark.parametrize("feature_map", ["relu", "softmax_tokens"])
@pytest.mark.parametrize("op", ["forward", "backward"])
def test_ops_of_linear_attention(op, feature_map, kernel, device):
    """All elements of the results are written, as the comparison with fake and compiled calls shows."""
    if not dispatch.fuses_linear_attention(kernel, (feature_map, feature_map), torch.float32, (5, 4)):
        pytest.skip(f"{kernel} composes linear attention, and has no such op")
    spec = Spec.of_linear_attention(feature_map, True, 0.5, 1e-5).text()
    q, k, v, dout = (
        randn(2, 3, n, d, seed=d + n, device=device).requires_grad_() for n, d in ((7, 5), (11, 5), (11, 4), (7, 4))
    )
    forward = torch.ops.xformer_kernels.linear_attention_forward.default
    if op == "forward":
        torch.library.opcheck(forward, (q, k, v, None, None, spec, kernel))
    else:
        stats = forward(q, k, v, None, None, spec, kernel)[1].detach()
        backward = torch.ops.xformer_kernels.linear_attention_backward.default
        torch.library.opcheck(backward, (dout, q, k, v, stats, None, None, spec, False, kernel))


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_sums_of_gram(masked, dtype, backend, device):
    a, b = (randn(2, 3, 67, d, seed=d, dtype=dtype, device=device) for d in (9, 5))
    mask = random_mask(2, 67, device=device) if masked else None
    result = xk.gram(a, b, token_mask=mask, sums=True, backend=backend)
    for x, y in zip(result, xk.gram(a, b, token_mask=mask, backend=backend), strict=False):
        assert_bitwise(x, y, "without sums")
    for x, got in ((a, result[3]), (b, result[4])):
        kept = x if mask is None else torch.where(mask[:, None, :, None], x, 0)
        assert got.dtype == reference.accumulate_dtype(dtype)
        assert_close(got, kept.sum(2, dtype=got.dtype), kept.double().sum(2), "sum")
    head = a[:, 0]
    single = xk.gram(head, head, symmetric=True, token_mask=mask, sums=True, backend=backend)
    assert_bitwise(single[3], result[3][:, 0], "3-D input")
    assert_bitwise(single[3], single[4], "a is b")


@pytest.mark.needs(norm=None)
def test_derivatives_of_sums_of_gram(kernel):
    leaves = [randn(1, 2, 3, d, seed=d, dtype=torch.float64).requires_grad_() for d in (2, 1)]
    assert gradcheck(lambda a, b: xk.gram(a, b, sums=True, backend=kernel), leaves, fast_mode=True)
    with pytest.raises(TypeError, match="sums must be True or False, got int"):
        xk.gram(*leaves, sums=1)

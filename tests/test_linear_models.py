"""Linear attention compared with the code of models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LOW_PRECISION, random_mask
from test_linear_attention import NAMES, inputs, run

import xformer_kernels as xk
from xformer_kernels import reference
from xformer_kernels.testing import assert_close


@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=str)
def test_timm_lite_mla(dtype, device):
    """EfficientViT: relu, eps 1e-5, products computed in float32."""
    mit = pytest.importorskip("timm.models.efficientvit_mit")
    layer = mit.LiteMLA(32, 32, dim=16).to(device)
    q, k, v, dout = inputs((2, 2, 50, 50, 16, 16), dtype, device)

    def original(q, k, v):
        return layer._attn(layer.kernel_func(q), layer.kernel_func(k), F.pad(v, (0, 1), mode="constant", value=1.0))

    theirs = run(original, (q, k, v, dout))
    ours = run(lambda *x: xk.linear_attention(*x, eps=layer.eps), (q, k, v, dout))
    oracle = run(lambda *x: reference.linear_attention(*x, eps=layer.eps), [x.double() for x in (q, k, v, dout)])
    for name in NAMES:
        assert_close(ours[name], theirs[name], oracle[name], name)


def loftr(q, k, v, q_mask=None, kv_mask=None, eps=1e-6):
    """LinearAttention of LoFTR (and of kornia), for (N, L, H, D) tokens."""
    Q, K = F.elu(q) + 1, F.elu(k) + 1
    if q_mask is not None:
        Q = Q * q_mask[:, :, None, None]
    if kv_mask is not None:
        K = K * kv_mask[:, :, None, None]
        v = v * kv_mask[:, :, None, None]
    length = v.size(1)
    KV = torch.einsum("nshd,nshv->nhdv", K, v / length)
    Z = 1 / (torch.einsum("nlhd,nhd->nlh", Q, K.sum(dim=1)) + eps)
    return torch.einsum("nlhd,nhdv,nlh->nlhv", Q, KV, Z) * length


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_loftr(masked, device):
    tensors = inputs((2, 8, 30, 47, 32, 32), torch.float64, device)
    q_mask, kv_mask = (random_mask(2, n, n, device) if masked else None for n in (30, 47))

    def original(*x):
        return loftr(*(t.transpose(1, 2) for t in x), q_mask, kv_mask).transpose(1, 2)

    def ours(*x):
        return xk.linear_attention(*x, feature_map="elu1", query_mask=q_mask, token_mask=kv_mask)

    results = run(ours, tensors), run(original, tensors)
    for name in NAMES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)


def test_efficient_attention(device):
    """Softmax of q over features and of k over tokens, no denominator; in CoaT q has no softmax, but a scale."""
    q, k, v, _ = inputs((2, 3, 40, 40, 8, 8), torch.float64, device)
    context = torch.einsum("bhnk,bhnv->bhkv", k.softmax(dim=2), v)
    out = xk.linear_attention(q, k, v, feature_map="softmax_tokens", normalize=False)
    torch.testing.assert_close(out, torch.einsum("bhnk,bhkv->bhnv", q.softmax(dim=3), context))
    out = xk.linear_attention(q, k, v, feature_map=("identity", "softmax_tokens"), normalize=False, scale=8**-0.5)
    torch.testing.assert_close(out, 8**-0.5 * torch.einsum("bhnk,bhkv->bhnv", q, context))

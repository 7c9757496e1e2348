"""Linear attention: two passes forward and two backward. Each program holds the whole D x DV map of its (b, h).

A record is S (D, DV), z (D) and, for a softmax over tokens, the maxima of k (D), which are stored only in stats. For
this softmax, S and z are sums weighted by exp(k - maximum), and the kernels that read S divide it by z.
"""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.tiles import (
    head_base,
    kept,
    load_tokens,
    locate,
    narrow,
    product,
    record_base,
    store_tokens,
    sum_of_parts,
)


@device
def features(x, highest, keep, D: tl.constexpr, OF: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_N, BLOCK_D): phi(x) in ACC, 0 beyond D and where masked. `highest`: maxima of a softmax over tokens."""
    wide = x.to(ACC)
    inside = (tl.arange(0, x.shape[1]) < D)[None, :]
    y = wide
    if OF == "relu":
        y = tl.where(wide <= 0.0, 0.0, wide)
    if OF == "elu1":
        y = tl.where(wide > 0.0, wide + 1.0, tl.exp(tl.where(wide > 0.0, 0.0, wide)))
    if OF == "softmax_features":
        wide = tl.where(inside, wide, float("-inf"))
        y = tl.exp(wide - tl.max(wide, axis=1)[:, None])
        y = y / tl.sum(y, axis=1)[:, None]
    if OF == "softmax_tokens":
        y = tl.exp(wide - highest[None, :])
    if OF != "identity" and OF != "relu":
        y = tl.where(keep[:, None] & inside, y, 0.0)
    return y


@device
def differentiated(dy, x, y, OF: tl.constexpr):
    """(BLOCK_N, BLOCK_D): dx from dy, y = phi(x). For a softmax over tokens, the caller subtracts the mean from dy."""
    dx = dy
    if OF == "relu":
        dx = tl.where(x.to(dy.dtype) <= 0.0, 0.0, dy)
    if OF == "elu1":
        dx = tl.where(x.to(dy.dtype) > 0.0, dy, dy * y)
    if OF == "softmax_features":
        dx = y * (dy - tl.sum(y * dy, axis=1)[:, None])
    if OF == "softmax_tokens":
        dx = y * dy
    return dx


@device
def reciprocals(z):
    """1 / z, or 0 where no token contributed."""
    return tl.where(z == 0.0, 0.0, 1.0 / tl.where(z == 0.0, 1.0, z))


@device
def finished(S, z, OF_K: tl.constexpr):
    """S and z in the form that is applied to the queries."""
    if OF_K == "softmax_tokens":
        S = S * reciprocals(z)[:, None]
        z = tl.where(z == 0.0, 0.0, 1.0).to(z.dtype)
    return S, z


@kernel
def maxima_kernel(
    k_ptr,
    mask_ptr,
    highest_ptr,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_kd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    step: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_K: tl.constexpr,
    FAR: tl.constexpr,
):
    """Each program computes the maximum of every feature over one chunk of the keys of one (b, h).

    Results are (parts, B, H) rows, `step` elements apart, and -inf where no token contributes. NaN need not be
    propagated here, because the sums propagate it.
    """
    b, h, part = locate(H, parts)
    k_base = head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN_K)
    highest = tl.full((BLOCK_N, BLOCK_D), float("-inf"), ACC)
    end = tl.minimum(part * chunk + chunk, N)
    rows = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        k = load_tokens(k_base, start, rows, keep, 0, stride_kn, stride_kd, D, BLOCK_D, ALIGN_K, FAR).to(ACC)
        highest = tl.maximum(highest, tl.where(keep[:, None], k, float("-inf")))
    i = tl.arange(0, BLOCK_D)
    tl.store(highest_ptr + ((part * B + b) * H + h) * step + i, tl.max(highest, axis=0), mask=i < D)


@kernel
def key_sums_kernel(
    k_ptr,
    v_ptr,
    mask_ptr,
    stats_ptr,
    partial_ptr,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_kd: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_vd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_K: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First launch of the forward (after the maxima). Each program computes S and z of one chunk of keys of one (b, h).

    z is the sum of the features after rounding for the product.
    """
    RECORD: tl.constexpr = D * DV + (2 * D if OF_K == "softmax_tokens" else D)
    b, h, part = locate(H, parts)
    k_base = head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN_K)
    v_base = head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN_V)
    i = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_V)
    highest = tl.zeros((BLOCK_D,), ACC)
    if OF_K == "softmax_tokens":
        highest = tl.load(stats_ptr + (b * H + h) * RECORD + D * DV + D + i, mask=i < D, other=0.0)
    S = tl.zeros((BLOCK_D, BLOCK_V), ACC)
    z = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    end = tl.minimum(part * chunk + chunk, N)
    rows = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        k = load_tokens(k_base, start, rows, keep, 0, stride_kn, stride_kd, D, BLOCK_D, ALIGN_K, FAR)
        v = load_tokens(v_base, start, rows, keep, 0, stride_vn, stride_vd, DV, BLOCK_V, ALIGN_V, FAR)
        phi = narrow(features(k, highest, keep, D, OF_K, ACC), v.dtype)
        z += phi.to(ACC)
        S = product(tl.trans(phi), v, S, PRECISION)
    record = record_base(partial_ptr, ((part * B + b) * H + h) * RECORD, RECORD_ALIGN)
    tl.store(record + i[:, None] * DV + j[None, :], S, mask=(i < D)[:, None] & (j < DV)[None, :])
    tl.store(record + D * DV + i, tl.sum(z, axis=0), mask=i < D)


@kernel
def apply_sums_kernel(
    q_ptr,
    mask_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_qd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunks: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_Q: tl.constexpr,
    OF_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second launch of the forward. Each program computes out for one chunk of the queries of one (b, h).

    It sums the partial records of its (b, h). Programs of the first chunk also store the sums in stats for the backward
    (a single part is already stored there).
    """
    RECORD: tl.constexpr = D * DV + (2 * D if OF_K == "softmax_tokens" else D)
    MAP_DTYPE: tl.constexpr = ACC if WIDE_MAP else q_ptr.dtype.element_ty
    b, h, part = locate(H, chunks)
    i = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_V)
    places = i[:, None] * DV + j[None, :]
    inside = (i < D)[:, None] & (j < DV)[None, :]
    step = B * H * RECORD
    partial_ptr = record_base(partial_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    stats_ptr = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    S = sum_of_parts(partial_ptr, places, inside, parts, step, ACC, RECORD_ALIGN)
    z = sum_of_parts(partial_ptr + D * DV, i, i < D, parts, step, ACC, RECORD_ALIGN)
    if part == 0:
        tl.store(stats_ptr + places, S, mask=inside)
        tl.store(stats_ptr + D * DV + i, z, mask=i < D)
    S, z = finished(S, z, OF_K)
    weight = narrow(S * tl.full([], SCALE, ACC), MAP_DTYPE)
    q_base = head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN_Q)
    end = tl.minimum(part * chunk + chunk, N)
    rows = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        q = load_tokens(q_base, start, rows, keep, 0, stride_qn, stride_qd, D, BLOCK_D, ALIGN_Q, FAR)
        phi = narrow(features(q, z, keep, D, OF_Q, ACC), MAP_DTYPE)
        y = product(phi, weight, tl.zeros((BLOCK_N, BLOCK_V), ACC), PRECISION)
        if NORMALIZE:
            y *= (1.0 / (tl.sum(phi.to(ACC) * z[None, :], axis=1) + tl.full([], EPS, ACC)))[:, None]
        if HAS_MASK:
            y = tl.where(keep[:, None], y, 0.0)
        store_tokens(out_ptr, y, b, h, start, rows, end, 0, N, H, DV, BLOCK_V, OUT_ALIGN, FAR)

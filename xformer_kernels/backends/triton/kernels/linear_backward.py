"""Linear attention backward: a pass over queries computes dq, dS and dz, then a pass over keys computes dk and dv."""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import kernel
from xformer_kernels.backends.triton.kernels.linear import differentiated, features, finished, reciprocals
from xformer_kernels.backends.triton.kernels.mix import multiply
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


@kernel
def query_gradients_kernel(
    q_ptr,
    dout_ptr,
    mask_ptr,
    stats_ptr,
    partial_ptr,
    dq_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_qd: tl.int64,
    stride_gb: tl.int64,
    stride_gh: tl.int64,
    stride_gn: tl.int64,
    stride_gd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OF_Q: tl.constexpr,
    OF_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_G: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program reads one chunk of the queries of one (b, h) once, and writes their dq, partial dS and partial dz.

        g = scale dout / den      t = g S^T      dden = -<t, phi(q)> / den
        dq = phi'(t + dden z)     dS = sum phi(q)^T g      dz = sum phi(q) dden

    If S does not fit in registers together with dS, it is loaded again for each tile, BLOCK_K columns at a time.
    """
    RECORD: tl.constexpr = D * DV + (2 * D if OF_K == "softmax_tokens" else D)
    MAP_DTYPE: tl.constexpr = ACC if WIDE_MAP else q_ptr.dtype.element_ty
    b, h, part = locate(H, parts)
    i = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_V)
    places = i[:, None] * DV + j[None, :]
    inside = (i < D)[:, None] & (j < DV)[None, :]
    stats_ptr = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    S = tl.load(stats_ptr + places, mask=inside, other=0.0)
    sums = tl.load(stats_ptr + D * DV + i, mask=i < D, other=0.0)
    S, z = finished(S, sums, OF_K)
    weight = tl.trans(narrow(S, MAP_DTYPE))
    scale = tl.full([], SCALE, ACC)
    dS = tl.zeros((BLOCK_D, BLOCK_V), ACC)
    dz = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    q_base = head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN_Q)
    g_base = head_base(dout_ptr, b, h, stride_gb, stride_gh, ALIGN_G)
    end = tl.minimum(part * chunk + chunk, N)
    rows = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        q = load_tokens(q_base, start, rows, keep, 0, stride_qn, stride_qd, D, BLOCK_D, ALIGN_Q, FAR)
        g = load_tokens(g_base, start, rows, keep, 0, stride_gn, stride_gd, DV, BLOCK_V, ALIGN_G, FAR)
        phi = features(q, z, keep, D, OF_Q, ACC)
        rounded = narrow(phi, MAP_DTYPE)
        t = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        if BLOCK_K < BLOCK_V:
            t = multiply(
                dout_ptr, stats_ptr, t, b, h, start, rows, keep, i, stride_gb, stride_gh, stride_gn, stride_gd, 0, 0,
                DV, 1, DV, D, BLOCK_K, WIDE_MAP, ALIGN_G, FAR, PRECISION,
            )  # fmt: skip
            if OF_K == "softmax_tokens":
                t *= reciprocals(sums)[None, :]
        else:
            t = product(g.to(MAP_DTYPE), weight, t, PRECISION)
        if NORMALIZE:
            wide = rounded.to(ACC)
            inverse = 1.0 / (tl.sum(wide * z[None, :], axis=1) + tl.full([], EPS, ACC))
            # 0 for masked queries: an infinite z would give NaN in the sums
            inverse = tl.where(keep, inverse, 0.0)
            by = (scale * inverse)[:, None]
            t *= by
            dden = -tl.sum(t * wide, axis=1) * inverse
            t += dden[:, None] * z[None, :]
            dz += wide * dden[:, None]
            g = narrow(g.to(ACC) * by, MAP_DTYPE)
        else:
            t *= scale
        dS = product(tl.trans(rounded), g.to(MAP_DTYPE), dS, PRECISION)
        dq = differentiated(t, q, phi, OF_Q)
        if HAS_MASK:
            dq = tl.where(keep[:, None], dq, 0.0)
        store_tokens(dq_ptr, dq, b, h, start, rows, end, 0, N, H, D, BLOCK_D, OUT_ALIGN, FAR, CHANNEL_MAJOR)
    if not NORMALIZE:
        dS *= scale
    record = record_base(partial_ptr, ((part * B + b) * H + h) * RECORD, RECORD_ALIGN)
    tl.store(record + places, dS, mask=inside)
    tl.store(record + D * DV + i, tl.sum(dz, axis=0), mask=i < D)


@kernel
def key_gradients_kernel(
    k_ptr,
    v_ptr,
    mask_ptr,
    stats_ptr,
    partial_ptr,
    dk_ptr,
    dv_ptr,
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
    chunks: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OF_K: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    OUT_ALIGN_V: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr,
    CHANNEL_MAJOR_V: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program sums the partial dS and dz, and writes dk and dv for one chunk of the keys of one (b, h).

        dk = phi'(v dS^T + dz)      dv = phi(k) dS

    For a softmax over tokens, P = exp(k - maximum) / z, dk = P (v dS^T - sum_j S dS) and dv = P dS.
    """
    RECORD: tl.constexpr = D * DV + (2 * D if OF_K == "softmax_tokens" else D)
    MAP_DTYPE: tl.constexpr = ACC if WIDE_MAP else k_ptr.dtype.element_ty
    b, h, part = locate(H, chunks)
    i = tl.arange(0, BLOCK_D)
    j = tl.arange(0, BLOCK_V)
    places = i[:, None] * DV + j[None, :]
    inside = (i < D)[:, None] & (j < DV)[None, :]
    step = B * H * RECORD
    partial_ptr = record_base(partial_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    stats_ptr = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    dS = sum_of_parts(partial_ptr, places, inside, parts, step, ACC, RECORD_ALIGN)
    highest = tl.zeros((BLOCK_D,), ACC)
    if OF_K == "softmax_tokens":
        highest = tl.load(stats_ptr + D * DV + D + i, mask=i < D, other=0.0)
        by = reciprocals(tl.load(stats_ptr + D * DV + i, mask=i < D, other=0.0))
        S = tl.load(stats_ptr + places, mask=inside, other=0.0) * by[:, None]
        add = -tl.sum(dS * S, axis=1) * by
        dS *= by[:, None]
    else:
        add = sum_of_parts(partial_ptr + D * DV, i, i < D, parts, step, ACC, RECORD_ALIGN)
    weight = narrow(dS, MAP_DTYPE)
    k_base = head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN_K)
    v_base = head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN_V)
    end = tl.minimum(part * chunk + chunk, N)
    rows = tl.arange(0, BLOCK_N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        k = load_tokens(k_base, start, rows, keep, 0, stride_kn, stride_kd, D, BLOCK_D, ALIGN_K, FAR)
        v = load_tokens(v_base, start, rows, keep, 0, stride_vn, stride_vd, DV, BLOCK_V, ALIGN_V, FAR)
        phi = features(k, highest, keep, D, OF_K, ACC)
        t = product(v.to(MAP_DTYPE), tl.trans(weight), tl.zeros((BLOCK_N, BLOCK_D), ACC), PRECISION) + add[None, :]
        dk = differentiated(t, k, phi, OF_K)
        dv = product(narrow(phi, MAP_DTYPE), weight, tl.zeros((BLOCK_N, BLOCK_V), ACC), PRECISION)
        if HAS_MASK:
            dk = tl.where(keep[:, None], dk, 0.0)
            dv = tl.where(keep[:, None], dv, 0.0)
        store_tokens(dk_ptr, dk, b, h, start, rows, end, 0, N, H, D, BLOCK_D, OUT_ALIGN, FAR, CHANNEL_MAJOR)
        store_tokens(dv_ptr, dv, b, h, start, rows, end, 0, N, H, DV, BLOCK_V, OUT_ALIGN_V, FAR, CHANNEL_MAJOR_V)

"""xfa backward after the Gram matrix of x and dout: the backward of the map, then dq, dk and dv in one pass."""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.tiles import (
    clamped,
    cosines,
    head_base,
    kept,
    load_tokens,
    locate,
    mapped,
    narrow,
    product,
    record_base,
    softmax_over_keys,
    store_tokens,
    sum_of_parts,
    token_norms,
)


@device
def along(total, ssq, EPS: tl.constexpr):
    """The term that token norms add to a gradient: -total / |x|^2 per feature, or 0 where eps clamps the norm."""
    norm = clamped(ssq, EPS)
    return tl.where(tl.sqrt(ssq) <= tl.full([], EPS, ssq.dtype), 0.0, -total / norm / norm)


@kernel
def map_backward_kernel(
    partial_ptr,
    stats_ptr,
    temperature_ptr,
    weights_ptr,
    vectors_ptr,
    stride_t: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
):
    """Each program computes one (b, h), and loops over its map in tiles of shape (D, BLOCK_O).

    dW is the sum of the partial Gram matrices of x and dout. The program stores the three (in, out) maps that give dq,
    dk and dv in `weights` (B, H, 3, D, D). In `vectors` (B, H, 2 D + 1) it stores the terms that the norms of q and of
    k add, and its part of dtemperature.

        query_key   dcos = t A (dW - sum_in A dW)     dq = k @ dcos'   dk = q @ dcos'^T   dv = dout @ A^T
        key_value   U = t dW'                         dq = dout @ W^T  dk = v @ U^T       dv = k @ U
    where ' denotes division by the token norms of k and q.
    """
    b, h, _ = locate(H, 1)
    RECORD: tl.constexpr = D * D + 2 * D
    stats_ptr = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    partial_ptr = record_base(partial_ptr, (b * H + h) * D * D, RECORD_ALIGN)
    weights_ptr = record_base(weights_ptr, (b * H + h) * 3 * D * D, WEIGHT_ALIGN)
    vectors_ptr += (b * H + h) * (2 * D + 1)
    i = tl.arange(0, BLOCK_D)
    temperature = tl.load(temperature_ptr + h * stride_t).to(ACC)
    ssq_k = tl.load(stats_ptr + D * D + i, mask=i < D, other=0.0)
    total_in = tl.zeros((BLOCK_D,), ACC)
    dtemperature = tl.zeros((BLOCK_D,), ACC)
    for first in range(0, D, BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        inside = (i < D)[:, None] & (o < D)[None, :]
        forth = i[:, None] * D + o[None, :]
        back = i[:, None] + o[None, :] * D
        raw = tl.load(stats_ptr + forth, mask=inside, other=0.0)
        dW = sum_of_parts(partial_ptr, forth, inside, parts, B * H * D * D, ACC, RECORD_ALIGN)
        if KEY_VALUE:
            ssq_q = tl.load(stats_ptr + D * D + D + i, mask=i < D, other=0.0)
        else:
            ssq_q = tl.load(stats_ptr + D * D + D + o, mask=o < D, other=0.0)
        cos = cosines(raw, ssq_k, ssq_q, EPS, KEY_VALUE, TOKEN_NORM)
        W = temperature * cos
        if KEY_VALUE:
            dtemperature += tl.sum(dW * cos, axis=1)
            total_in += tl.sum(W * dW, axis=1)
            U = temperature * cosines(dW, ssq_k, ssq_q, EPS, KEY_VALUE, TOKEN_NORM)
            for_q, for_k, for_v = W, U, U
            tl.store(weights_ptr + back, narrow(for_q, weights_ptr.dtype.element_ty), mask=inside)
            tl.store(weights_ptr + D * D + back, narrow(for_k, weights_ptr.dtype.element_ty), mask=inside)
            tl.store(weights_ptr + 2 * D * D + forth, narrow(for_v, weights_ptr.dtype.element_ty), mask=inside)
        else:
            dS = dW
            if SOFTMAX:
                W = softmax_over_keys(W, i < D)
                dS = W * (dW - tl.sum(W * dW, axis=0)[None, :])
            dtemperature += tl.sum(tl.where(inside, dS * cos, 0.0), axis=1)
            dcos = temperature * dS
            along_cos = tl.where(inside, dcos * cos, 0.0)
            total_in += tl.sum(along_cos, axis=1)
            if TOKEN_NORM:
                tl.store(vectors_ptr + o, along(tl.sum(along_cos, axis=0), ssq_q, EPS), mask=o < D)
            both = narrow(cosines(dcos, ssq_k, ssq_q, EPS, KEY_VALUE, TOKEN_NORM), weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + forth, both, mask=inside)
            tl.store(weights_ptr + D * D + back, both, mask=inside)
            tl.store(weights_ptr + 2 * D * D + back, narrow(W, weights_ptr.dtype.element_ty), mask=inside)
    if TOKEN_NORM:
        tl.store(vectors_ptr + D + i, along(total_in, ssq_k, EPS), mask=i < D)
        if KEY_VALUE:
            ssq_q = tl.load(stats_ptr + D * D + D + i, mask=i < D, other=0.0)
            tl.store(vectors_ptr + i, along(total_in, ssq_q, EPS), mask=i < D)
    tl.store(vectors_ptr + 2 * D, tl.sum(dtemperature, axis=0))


@device
def whole_map(weights_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr):
    """A map of `weights`, loaded as one tile for all tokens of a program if HELD, otherwise its pointer."""
    i = tl.arange(0, BLOCK_D)
    w = weights_ptr
    if HELD:
        inside = (i < D)[:, None] & (i < D)[None, :]
        w = tl.load(weights_ptr + i[:, None] * D + i[None, :], mask=inside, other=0.0)
    return w


@device
def whole_vector(vector_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr, HELD: tl.constexpr):
    """The vector for norms over tokens, loaded for all tokens of a program if HELD, otherwise its pointer."""
    i = tl.arange(0, BLOCK_D)
    vector = vector_ptr
    if HELD:
        vector = tl.load(vector_ptr + i, mask=i < D, other=0.0)
    return vector


@device
def mix(
    x,
    x_base,
    x_scale,
    start,
    rows,
    keep,
    stride_n,
    stride_d,
    weights_ptr,
    held,
    first,
    ACC: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_N, BLOCK_O): features [first, first + BLOCK_O) of x_scale * (x @ weights).

    If a product uses only BLOCK_K < BLOCK_D features of x per step, these are loaded again, from the cache.
    """
    if HELD:
        y = mapped(x.to(held.dtype), held, ACC, PRECISION)
    else:
        o = first + tl.arange(0, BLOCK_O)
        y = tl.zeros((x.shape[0], BLOCK_O), ACC)
        for begin in range(0, D, BLOCK_K):
            i = begin + tl.arange(0, BLOCK_K)
            inside = (i < D)[:, None] & (o < D)[None, :]
            w = tl.load(weights_ptr + i[:, None] * D + o[None, :], mask=inside, other=0.0)
            if BLOCK_K < BLOCK_D:
                part = load_tokens(x_base, start, rows, keep, begin, stride_n, stride_d, D, BLOCK_K, ALIGN, FAR)
                y = product(part.to(w.dtype), w, y, PRECISION)
            else:
                y = mapped(x.to(w.dtype), w, ACC, PRECISION)
    return y * x_scale[:, None]


@device
def store_gradient(
    x,
    x_base,
    x_scale,
    x_stride_n,
    x_stride_d,
    weights_ptr,
    held,
    vector_ptr,
    vector,
    own,
    own_base,
    own_norm,
    own_scale,
    stride_n,
    stride_d,
    ptr,
    b,
    h,
    start,
    rows,
    keep,
    end,
    N,
    H,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    ADD: tl.constexpr,
    PROJECT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    OWN_ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores x @ weights, corrected for the normalisation of the tokens `own`.

    ADD: norms over tokens; adds own times a vector. PROJECT: norms of each token; removes the component along own and
    divides by the norm.
    """
    if PROJECT:
        # first compute the component along each token, which needs all of its features
        total = tl.zeros((x.shape[0],), ACC)
        for first in range(0, D, BLOCK_O):
            y = mix(
                x, x_base, x_scale, start, rows, keep, x_stride_n, x_stride_d, weights_ptr, held, first, ACC, D,
                BLOCK_D, BLOCK_O, BLOCK_K, HELD, ALIGN, FAR, PRECISION,
            )  # fmt: skip
            if BLOCK_O < BLOCK_D:
                part = load_tokens(
                    own_base, start, rows, keep, first, stride_n, stride_d, D, BLOCK_O, OWN_ALIGN, FAR
                )  # fmt: skip
            else:
                part = own
            total += tl.sum(y * part.to(ACC), axis=1)
        held_up = own_norm <= tl.full([], EPS, ACC)
        total = tl.where(held_up, 0.0, total * own_scale * own_scale)
    for first in range(0, D, BLOCK_O):
        y = mix(
            x, x_base, x_scale, start, rows, keep, x_stride_n, x_stride_d, weights_ptr, held, first, ACC, D, BLOCK_D,
            BLOCK_O, BLOCK_K, HELD, ALIGN, FAR, PRECISION,
        )  # fmt: skip
        if ADD or PROJECT:
            if BLOCK_O < BLOCK_D:
                part = load_tokens(
                    own_base, start, rows, keep, first, stride_n, stride_d, D, BLOCK_O, OWN_ALIGN, FAR
                )  # fmt: skip
            else:
                part = own
        if ADD:
            along_own = vector
            if BLOCK_O < BLOCK_D:
                o = first + tl.arange(0, BLOCK_O)
                along_own = tl.load(vector_ptr + o, mask=o < D, other=0.0)
            y += part.to(ACC) * along_own[None, :]
        if PROJECT:
            y = (y - part.to(ACC) * total[:, None]) * own_scale[:, None]
        if HAS_MASK:
            y = tl.where(keep[:, None], y, 0.0)
        store_tokens(ptr, y, b, h, start, rows, end, first, N, H, D, BLOCK_O, OUT_ALIGN, FAR)


SUMMED = tl.constexpr(128)
"""Partial results of dtemperature that are loaded at a time."""


@device
def sum_of_batch(ptr, B, stride, ACC: tl.constexpr):
    """The sum of B elements, `stride` apart, in an order that depends only on B."""
    i = tl.arange(0, SUMMED).to(tl.int64)
    total = tl.zeros((SUMMED,), ACC)
    for first in range(0, B, SUMMED):
        total += tl.load(ptr + (first + i) * stride, mask=first + i < B, other=0.0)
    return tl.sum(total, axis=0)


@kernel
def gradients_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    mask_ptr,
    weights_ptr,
    vectors_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dtemperature_ptr,
    stride_qb: tl.int64,
    stride_qh: tl.int64,
    stride_qn: tl.int64,
    stride_qd: tl.int64,
    stride_kb: tl.int64,
    stride_kh: tl.int64,
    stride_kn: tl.int64,
    stride_kd: tl.int64,
    stride_vb: tl.int64,
    stride_vh: tl.int64,
    stride_vn: tl.int64,
    stride_vd: tl.int64,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    FEATURE_NORM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    ALIGN_G: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    WEIGHT_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program reads one chunk of the tokens of one (b, h) in one pass and writes their dq, dk and dv.

    HELD: maps are loaded once, not for each tile of tokens. The program of the first chunk of (0, h) also sums
    dtemperature[h] over the batch.
    """
    HELD: tl.constexpr = BLOCK_K >= BLOCK_D and BLOCK_O >= BLOCK_D
    b, h, part = locate(H, parts)
    if part == 0:
        if b == 0:
            total = sum_of_batch(vectors_ptr + h * (2 * D + 1) + 2 * D, B, H * (2 * D + 1), ACC)
            tl.store(dtemperature_ptr + h, narrow(total, dtemperature_ptr.dtype.element_ty))
    weights_ptr = record_base(weights_ptr, (b * H + h) * 3 * D * D, WEIGHT_ALIGN)
    vectors_ptr += (b * H + h) * (2 * D + 1)
    to_q_ptr, to_k_ptr, to_v_ptr = weights_ptr, weights_ptr + D * D, weights_ptr + 2 * D * D
    to_q = whole_map(to_q_ptr, D, BLOCK_D, HELD)
    to_k = whole_map(to_k_ptr, D, BLOCK_D, HELD)
    to_v = whole_map(to_v_ptr, D, BLOCK_D, HELD)
    ONE_TILE: tl.constexpr = TOKEN_NORM and BLOCK_O >= BLOCK_D
    along_q = whole_vector(vectors_ptr, D, BLOCK_D, ONE_TILE)
    along_k = whole_vector(vectors_ptr + D, D, BLOCK_D, ONE_TILE)
    q_base = head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN_Q)
    k_base = head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN_K)
    v_base = head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN_V)
    g_base = head_base(dout_ptr, b, h, stride_gb, stride_gh, ALIGN_G)
    ALIGN_FOR_Q: tl.constexpr = ALIGN_G if KEY_VALUE else ALIGN_K
    ALIGN_FOR_K: tl.constexpr = ALIGN_V if KEY_VALUE else ALIGN_Q
    ALIGN_FOR_V: tl.constexpr = ALIGN_K if KEY_VALUE else ALIGN_G
    one = tl.full((BLOCK_N,), 1.0, ACC)
    rows = tl.arange(0, BLOCK_N)
    end = tl.minimum(part * chunk + chunk, N)
    for start in range(part * chunk, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        # load all features of the tokens if a product, the last step of a gradient or a norm needs them at once
        q, k, g, v = one, one, one, one
        if BLOCK_K >= BLOCK_D or BLOCK_O >= BLOCK_D or FEATURE_NORM:
            q = load_tokens(q_base, start, rows, keep, 0, stride_qn, stride_qd, D, BLOCK_D, ALIGN_Q, FAR)
            k = load_tokens(k_base, start, rows, keep, 0, stride_kn, stride_kd, D, BLOCK_D, ALIGN_K, FAR)
        if BLOCK_K >= BLOCK_D:
            g = load_tokens(g_base, start, rows, keep, 0, stride_gn, stride_gd, D, BLOCK_D, ALIGN_G, FAR)
        norm_q, scale_q, norm_k, scale_k = one, one, one, one
        if FEATURE_NORM:
            norm_q, scale_q = token_norms(q.to(ACC), EPS)
            norm_k, scale_k = token_norms(k.to(ACC), EPS)
        if KEY_VALUE:
            if BLOCK_K >= BLOCK_D:
                v = load_tokens(v_base, start, rows, keep, 0, stride_vn, stride_vd, D, BLOCK_D, ALIGN_V, FAR)
            for_q, base_for_q, scale_for_q, stride_n_for_q, stride_d_for_q = g, g_base, one, stride_gn, stride_gd
            for_k, base_for_k, scale_for_k, stride_n_for_k, stride_d_for_k = v, v_base, one, stride_vn, stride_vd
            for_v, base_for_v, scale_for_v, stride_n_for_v, stride_d_for_v = k, k_base, scale_k, stride_kn, stride_kd
        else:
            for_q, base_for_q, scale_for_q, stride_n_for_q, stride_d_for_q = k, k_base, scale_k, stride_kn, stride_kd
            for_k, base_for_k, scale_for_k, stride_n_for_k, stride_d_for_k = q, q_base, scale_q, stride_qn, stride_qd
            for_v, base_for_v, scale_for_v, stride_n_for_v, stride_d_for_v = g, g_base, one, stride_gn, stride_gd
        store_gradient(
            for_q, base_for_q, scale_for_q, stride_n_for_q, stride_d_for_q, to_q_ptr, to_q, vectors_ptr,
            along_q, q, q_base, norm_q, scale_q, stride_qn, stride_qd, dq_ptr, b, h, start, rows, keep, end, N, H,
            ACC, EPS, D, BLOCK_D, BLOCK_O, BLOCK_K, HELD, TOKEN_NORM, FEATURE_NORM, HAS_MASK, ALIGN_FOR_Q, ALIGN_Q,
            OUT_ALIGN, FAR, PRECISION,
        )  # fmt: skip
        store_gradient(
            for_k, base_for_k, scale_for_k, stride_n_for_k, stride_d_for_k, to_k_ptr, to_k, vectors_ptr + D,
            along_k, k, k_base, norm_k, scale_k, stride_kn, stride_kd, dk_ptr, b, h, start, rows, keep, end, N, H,
            ACC, EPS, D, BLOCK_D, BLOCK_O, BLOCK_K, HELD, TOKEN_NORM, FEATURE_NORM, HAS_MASK, ALIGN_FOR_K, ALIGN_K,
            OUT_ALIGN, FAR, PRECISION,
        )  # fmt: skip
        store_gradient(
            for_v, base_for_v, scale_for_v, stride_n_for_v, stride_d_for_v, to_v_ptr, to_v, vectors_ptr,
            along_q, g, g_base, one, one, stride_gn, stride_gd, dv_ptr, b, h, start, rows, keep, end, N, H,
            ACC, EPS, D, BLOCK_D, BLOCK_O, BLOCK_K, HELD, False, False, HAS_MASK, ALIGN_FOR_V, ALIGN_G,
            OUT_ALIGN, FAR, PRECISION,
        )  # fmt: skip

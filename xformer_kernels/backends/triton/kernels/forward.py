"""xfa forward: out = x @ map. Every program computes the map, or its part of it, from the Gram matrices itself."""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.gram import accumulate
from xformer_kernels.backends.triton.kernels.tiles import (
    cosines,
    head_base,
    kept,
    load_tokens,
    locate,
    mapped,
    narrow,
    record_base,
    softmax_over_keys,
    store_tokens,
    sum_of_parts,
    token_norms,
)


@device
def finish_map(
    raw,
    ssq_k,
    ssq_q,
    temperature,
    inside,
    EPS: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """(in, out): the map that is applied to the tokens. For key_value it includes the token norms of q."""
    S = temperature * cosines(raw, ssq_k, ssq_q, EPS, KEY_VALUE, TOKEN_NORM)
    if SOFTMAX:
        S = softmax_over_keys(S, inside)
    return S


@device
def apply_map(
    x_base,
    mask_ptr,
    out_ptr,
    weight,
    b,
    h,
    begin,
    end,
    first,
    stride_n,
    stride_d,
    stride_mb,
    stride_mn,
    N,
    H,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    NORM_X: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Features [first, first + BLOCK_O) of out[n] = x[n] @ weight for the tokens [begin, end)."""
    MAP_DTYPE: tl.constexpr = ACC if WIDE_MAP else x_base.dtype.element_ty
    weight = narrow(weight, MAP_DTYPE)
    rows = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        x = load_tokens(x_base, start, rows, keep, 0, stride_n, stride_d, D, BLOCK_D, ALIGN, FAR)
        y = mapped(x.to(MAP_DTYPE), weight, ACC, PRECISION)
        if NORM_X:
            y *= token_norms(x.to(ACC), EPS)[1][:, None]
        if HAS_MASK:
            y = tl.where(keep[:, None], y, 0.0)
        store_tokens(out_ptr, y, b, h, start, rows, end, first, N, H, D, BLOCK_O, OUT_ALIGN, FAR)


@kernel
def apply_kernel(
    x_ptr,
    partial_ptr,
    stats_ptr,
    temperature_ptr,
    mask_ptr,
    out_ptr,
    stride_b: tl.int64,
    stride_h: tl.int64,
    stride_n: tl.int64,
    stride_d: tl.int64,
    stride_t: tl.int64,
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
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    FEATURE_NORM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_X: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Second launch of the forward. A program computes BLOCK_O features of out for one chunk of tokens of one (b, h).

    It sums the partial records of its (b, h) and computes its (D, BLOCK_O) tile of the map. Programs of the first chunk
    also store the sums in stats for the backward (a single part is already stored there). Each of the D / BLOCK_O
    programs reads all features of x.
    """
    TILES: tl.constexpr = (D + BLOCK_O - 1) // BLOCK_O
    RECORD: tl.constexpr = D * D + 2 * D
    b, h, rest = locate(H, chunks * TILES)
    part = rest // TILES
    tile = (rest % TILES).to(tl.int32)
    first = tile * BLOCK_O
    i = tl.arange(0, BLOCK_D)
    o = first + tl.arange(0, BLOCK_O)
    inside = (i < D)[:, None] & (o < D)[None, :]
    places = i[:, None] * D + o[None, :]
    step = B * H * RECORD
    partial_ptr = record_base(partial_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    stats_ptr = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    raw = sum_of_parts(partial_ptr, places, inside, parts, step, ACC, RECORD_ALIGN)
    # The first tile stores what is along the in axis. Not a block & a scalar, which Triton 3.9's interpreter does not
    # take as a mask.
    owner = i < tl.where(tile == 0, D, 0)
    # features of q are along the out axis, or along the in axis for key_value
    if KEY_VALUE:
        features_q, owner_q = i, owner
    else:
        features_q, owner_q = o, o < D
    if TOKEN_NORM:
        squares_ptr = partial_ptr + D * D
        ssq_k = sum_of_parts(squares_ptr, i, i < D, parts, step, ACC, RECORD_ALIGN)
        ssq_q = sum_of_parts(squares_ptr + D, features_q, features_q < D, parts, step, ACC, RECORD_ALIGN)
    else:
        ssq_k = tl.zeros((BLOCK_D,), ACC)
        ssq_q = tl.zeros(features_q.shape, ACC)
    if part == 0:
        tl.store(stats_ptr + places, raw, mask=inside)
        tl.store(stats_ptr + D * D + i, ssq_k, mask=owner)
        tl.store(stats_ptr + D * D + D + features_q, ssq_q, mask=owner_q)
    temperature = tl.load(temperature_ptr + h * stride_t).to(ACC)
    weight = finish_map(raw, ssq_k, ssq_q, temperature, i < D, EPS, KEY_VALUE, TOKEN_NORM, SOFTMAX)
    apply_map(
        head_base(x_ptr, b, h, stride_b, stride_h, ALIGN_X),
        mask_ptr,
        out_ptr,
        weight,
        b,
        h,
        part * chunk,
        tl.minimum(part * chunk + chunk, N),
        first,
        stride_n,
        stride_d,
        stride_mb,
        stride_mn,
        N,
        H,
        ACC,
        EPS,
        D,
        BLOCK_D,
        BLOCK_O,
        BLOCK_N,
        WIDE_MAP,
        KEY_VALUE and FEATURE_NORM,
        HAS_MASK,
        ALIGN_X,
        OUT_ALIGN,
        FAR,
        PRECISION,
    )


@kernel
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    temperature_ptr,
    mask_ptr,
    stats_ptr,
    out_ptr,
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
    stride_t: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    H: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    KEY_VALUE: tl.constexpr,
    TOKEN_NORM: tl.constexpr,
    FEATURE_NORM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_Q: tl.constexpr,
    ALIGN_K: tl.constexpr,
    ALIGN_V: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    RECORD_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    MAP_PRECISION: tl.constexpr,
    LEAST_TOKENS: tl.constexpr,
):
    """The whole forward in one launch. A program computes one (b, h) and keeps its map in registers between passes."""
    RECORD: tl.constexpr = D * D + 2 * D
    b, h, _ = locate(H, 1)
    q_base = head_base(q_ptr, b, h, stride_qb, stride_qh, ALIGN_Q)
    k_base = head_base(k_ptr, b, h, stride_kb, stride_kh, ALIGN_K)
    v_base = head_base(v_ptr, b, h, stride_vb, stride_vh, ALIGN_V)
    # Gram matrix of k and q or, for key_value, of k and v, where q is read only for its sums of squares
    if KEY_VALUE:
        b_base, stride_bn, stride_bd = v_base, stride_vn, stride_vd
        x_base, stride_xn, stride_xd = q_base, stride_qn, stride_qd
    else:
        b_base, stride_bn, stride_bd = q_base, stride_qn, stride_qd
        x_base, stride_xn, stride_xd = v_base, stride_vn, stride_vd
    ALIGN_B: tl.constexpr = ALIGN_V if KEY_VALUE else ALIGN_Q
    ALIGN_X: tl.constexpr = ALIGN_Q if KEY_VALUE else ALIGN_V
    SQUARES: tl.constexpr = ("ac" if KEY_VALUE else "ab") if TOKEN_NORM else ""
    MAP_BLOCK_N: tl.constexpr = BLOCK_N if BLOCK_N > LEAST_TOKENS else LEAST_TOKENS
    raw, ssq_k, ssq_q = accumulate(
        k_base,
        b_base,
        q_base,
        mask_ptr,
        b,
        0,
        N,
        0,
        0,
        stride_kn,
        stride_kd,
        stride_bn,
        stride_bd,
        stride_qn,
        stride_qd,
        stride_mb,
        stride_mn,
        ACC,
        EPS,
        D,
        D,
        BLOCK_D,
        BLOCK_D,
        BLOCK_N,
        False,
        SQUARES,
        FEATURE_NORM,
        FEATURE_NORM and not KEY_VALUE,
        HAS_MASK,
        ALIGN_K,
        ALIGN_B,
        ALIGN_Q,
        FAR,
        PRECISION,
    )
    i = tl.arange(0, BLOCK_D)
    inside = (i < D)[:, None] & (i < D)[None, :]
    # infinite tokens times the zeros beyond D give NaN
    raw = tl.where(inside, raw, 0.0)
    record = record_base(stats_ptr, (b * H + h) * RECORD, RECORD_ALIGN)
    tl.store(record + i[:, None] * D + i[None, :], raw, mask=inside)
    tl.store(record + D * D + i, ssq_k, mask=i < D)
    tl.store(record + D * D + D + i, ssq_q, mask=i < D)
    temperature = tl.load(temperature_ptr + h * stride_t).to(ACC)
    weight = finish_map(raw, ssq_k, ssq_q, temperature, i < D, EPS, KEY_VALUE, TOKEN_NORM, SOFTMAX)
    apply_map(
        x_base,
        mask_ptr,
        out_ptr,
        weight,
        b,
        h,
        0,
        N,
        0,
        stride_xn,
        stride_xd,
        stride_mb,
        stride_mn,
        N,
        H,
        ACC,
        EPS,
        D,
        BLOCK_D,
        BLOCK_D,
        MAP_BLOCK_N,
        WIDE_MAP,
        KEY_VALUE and FEATURE_NORM,
        HAS_MASK,
        ALIGN_X,
        OUT_ALIGN,
        FAR,
        MAP_PRECISION,
    )

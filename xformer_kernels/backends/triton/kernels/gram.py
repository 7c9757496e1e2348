"""Gram matrices over the tokens: the gram op, and the first pass of xfa forward and backward."""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.tiles import (
    clamped,
    head_base,
    kept,
    load_tokens,
    locate,
    product,
)


@device
def reciprocal_norms(
    tile,
    base,
    start,
    rows,
    keep,
    stride_n,
    stride_d,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,
):
    """(BLOCK_N,): 1 / max(norm, eps) over all features of each token. `tile` may hold only some of them."""
    if D <= BLOCK:
        ssq = tl.sum(tile * tile, axis=1)
    else:
        ssq = tl.zeros((tile.shape[0],), tile.dtype)
        for first in range(0, D, BLOCK):
            part = load_tokens(base, start, rows, keep, first, stride_n, stride_d, D, BLOCK, ALIGN, FAR).to(tile.dtype)
            ssq += tl.sum(part * part, axis=1)
    return 1.0 / clamped(ssq, EPS)


@device
def accumulate(
    a_base,
    b_base,
    c_base,
    mask_ptr,
    batch,
    begin,
    end,
    first_a,
    first_b,
    stride_an,
    stride_ad,
    stride_bn,
    stride_bd,
    stride_cn,
    stride_cd,
    stride_mb,
    stride_mn,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SAME: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM_A: tl.constexpr,
    NORM_B: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_A: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_C: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_A, BLOCK_B) sum of a[n]^T b[n] over the tokens [begin, end), and sums of squares of the features.

    SQUARES: "" none, "ab" of a and b, "ac" of a and c; c is as wide as b and is read only for its squares. SAME: b is
    a. NORM_A, NORM_B: each token of a or b is first divided by its norm; the product is in the accumulate dtype.
    """
    G = tl.zeros((BLOCK_A, BLOCK_B), ACC)
    squares_a = tl.zeros((BLOCK_N, BLOCK_A), ACC)
    squares_b = tl.zeros((BLOCK_N, BLOCK_B), ACC)
    rows = tl.arange(0, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, batch, stride_mb, stride_mn, HAS_MASK)
        a = load_tokens(a_base, start, rows, keep, first_a, stride_an, stride_ad, DA, BLOCK_A, ALIGN_A, FAR)
        if SAME:
            b = a
        else:
            b = load_tokens(b_base, start, rows, keep, first_b, stride_bn, stride_bd, DB, BLOCK_B, ALIGN_B, FAR)
        if SQUARES != "":
            wide_a = a.to(ACC)
            squares_a += wide_a * wide_a
        if SQUARES == "ab":
            wide_b = b.to(ACC)
            squares_b += wide_b * wide_b
        if SQUARES == "ac":
            c = load_tokens(c_base, start, rows, keep, first_b, stride_cn, stride_cd, DB, BLOCK_B, ALIGN_C, FAR).to(ACC)
            squares_b += c * c
        if NORM_A or NORM_B:
            a, b = a.to(ACC), b.to(ACC)
        if NORM_A:
            a *= reciprocal_norms(a, a_base, start, rows, keep, stride_an, stride_ad, EPS, DA, BLOCK_A, ALIGN_A, FAR)[
                :, None
            ]
        if NORM_B:
            b *= reciprocal_norms(b, b_base, start, rows, keep, stride_bn, stride_bd, EPS, DB, BLOCK_B, ALIGN_B, FAR)[
                :, None
            ]
        G = product(tl.trans(a), b, G, PRECISION)
    return G, tl.sum(squares_a, axis=0), tl.sum(squares_b, axis=0)


@device
def store_gram(G_ptr, G, i, j, DA: tl.constexpr, DB: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Stores a tile of a (DA, DB) matrix, rows i and columns j. SYMMETRIC: elements above the diagonal, also
    transposed."""
    inside = (i < DA)[:, None] & (j < DB)[None, :]
    if SYMMETRIC:
        upper = inside & (i[:, None] <= j[None, :])
        tl.store(G_ptr + i[:, None] * DB + j[None, :], G, mask=upper)
        tl.store(G_ptr + i[:, None] + j[None, :] * DB, G, mask=upper & (i[:, None] < j[None, :]))
    else:
        tl.store(G_ptr + i[:, None] * DB + j[None, :], G, mask=inside)


@device
def store_if(ptr, vector, i, D: tl.constexpr, condition):
    """Stores the elements i < D of a vector if `condition`."""
    # a bound that the condition chooses: Triton 3.9's interpreter does not take a block & a scalar as a mask
    tl.store(ptr + i, vector, mask=i < tl.where(condition, D, 0))


@kernel
def gram_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    mask_ptr,
    G_ptr,
    ssq_a_ptr,
    ssq_b_ptr,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_an: tl.int64,
    stride_ad: tl.int64,
    stride_bb: tl.int64,
    stride_bh: tl.int64,
    stride_bn: tl.int64,
    stride_bd: tl.int64,
    stride_cb: tl.int64,
    stride_ch: tl.int64,
    stride_cn: tl.int64,
    stride_cd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    step_G: tl.int64,
    step_a: tl.int64,
    step_b: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SQUARES: tl.constexpr,
    NORM_A: tl.constexpr,
    NORM_B: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_A: tl.constexpr,
    ALIGN_B: tl.constexpr,
    ALIGN_C: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes one (BLOCK_A, BLOCK_B) tile of one (b, h) over one chunk of the tokens, its `part`.

    Results are (parts, B, H) records, `step_*` elements apart. SYMMETRIC: programs of tiles below the diagonal return
    at once, and elements above it are also stored transposed. The sums of squares are bitwise equal to the diagonal.
    """
    TILES_A: tl.constexpr = (DA + BLOCK_A - 1) // BLOCK_A
    TILES_B: tl.constexpr = (DB + BLOCK_B - 1) // BLOCK_B
    b, h, rest = locate(H, parts * TILES_A * TILES_B)
    part = rest // (TILES_A * TILES_B)
    tile_a = (rest // TILES_B % TILES_A).to(tl.int32)
    tile_b = (rest % TILES_B).to(tl.int32)
    if SYMMETRIC:
        if tile_a > tile_b:
            return
    first_a = tile_a * BLOCK_A
    first_b = tile_b * BLOCK_B
    begin = part * chunk
    # in tiles off the diagonal of a symmetric matrix, b holds other features of the same tokens
    SAME: tl.constexpr = SYMMETRIC and TILES_B == 1
    G, squares_a, squares_b = accumulate(
        head_base(a_ptr, b, h, stride_ab, stride_ah, ALIGN_A),
        head_base(b_ptr, b, h, stride_bb, stride_bh, ALIGN_B),
        head_base(c_ptr, b, h, stride_cb, stride_ch, ALIGN_C),
        mask_ptr,
        b,
        begin,
        tl.minimum(begin + chunk, N),
        first_a,
        first_b,
        stride_an,
        stride_ad,
        stride_bn,
        stride_bd,
        stride_cn,
        stride_cd,
        stride_mb,
        stride_mn,
        ACC,
        EPS,
        DA,
        DB,
        BLOCK_A,
        BLOCK_B,
        BLOCK_N,
        SAME,
        "" if SYMMETRIC else SQUARES,
        NORM_A,
        NORM_B,
        HAS_MASK,
        ALIGN_A,
        ALIGN_B,
        ALIGN_C,
        FAR,
        PRECISION,
    )
    record = (part * B + b) * H + h
    i = first_a + tl.arange(0, BLOCK_A)
    j = first_b + tl.arange(0, BLOCK_B)
    G_ptr += record * step_G
    ssq_a_ptr += record * step_a
    ssq_b_ptr += record * step_b
    store_gram(G_ptr, G, i, j, DA, DB, SYMMETRIC)
    if SYMMETRIC:
        diagonal = (i < DA)[:, None] & (i[:, None] == j[None, :])
        tl.store(ssq_a_ptr + i[:, None] + 0 * j[None, :], G, mask=diagonal)
        tl.store(ssq_b_ptr + i[:, None] + 0 * j[None, :], G, mask=diagonal)
    elif SQUARES != "":
        store_if(ssq_a_ptr, squares_a, i, DA, tile_b == 0)
        store_if(ssq_b_ptr, squares_b, j, DB, tile_a == 0)

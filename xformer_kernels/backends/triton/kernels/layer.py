"""The two passes over tokens of a layer in Gram form, and what precedes them.

u (B, N, C) is computed from x while tiles are loaded, and nothing of its size is written: x is layer-normalised unless
EPS is None, then `center` (B, C) is subtracted if CENTERED. For products, u is rounded to the dtype of x.
"""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import kernel
from xformer_kernels.backends.triton.kernels.gram import store_gram, store_if
from xformer_kernels.backends.triton.kernels.mix import multiply
from xformer_kernels.backends.triton.kernels.tiles import (
    existing,
    head_base,
    kept,
    layer_norm_statistics,
    load_tokens,
    locate,
    mean_of,
    narrow,
    normalised,
    product,
    record_base,
    store_tokens,
)


@kernel
def layer_statistics_kernel(
    x_ptr,
    statistics_ptr,
    stride_xb: tl.int64,
    stride_xh: tl.int64,
    stride_xn: tl.int64,
    stride_xd: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    blocks: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FAR: tl.constexpr,
):
    """Each program computes layer norm's statistics of BLOCK_N tokens: (2, B, H, N), means and then 1 / sqrt(variance
    + eps)."""
    b, h, block = locate(H, blocks)
    start = block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    present = existing(start, rows, N)
    x_base = head_base(x_ptr, b, h, stride_xb, stride_xh, ALIGN_X)
    mean, inverse = layer_norm_statistics(
        x_base, start, rows, present, stride_xn, stride_xd, C, BLOCK_C, ACC, EPS, ALIGN_X, FAR
    )
    of_token = statistics_ptr + (b * H + h) * N + start + rows
    tl.store(of_token, mean, mask=present)
    tl.store(of_token + B * H * N, inverse, mask=present)


@kernel
def layer_sample_kernel(
    x_ptr,
    mask_ptr,
    total_ptr,
    count_ptr,
    stride_xb: tl.int64,
    stride_xn: tl.int64,
    stride_xd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    C: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FAR: tl.constexpr,
):
    """Each program sums FEW tokens of one image, those of `sampled` in layer/passes.py, or all if there are fewer."""
    b = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, FEW).to(tl.int64)
    if N > FEW:
        rows = rows * N // FEW + rows * 39 % FEW * (N // FEW) // FEW
    keep = rows < N
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + b * stride_mb + rows * stride_mn, mask=keep, other=0) != 0)
    x_base = record_base(x_ptr, b * stride_xb, ALIGN_X if ALIGN_X > 0 else 1)
    start = tl.full([], 0, tl.int64)
    mean, inverse = layer_norm_statistics(
        x_base, start, rows, keep, stride_xn, stride_xd, C, BLOCK_C, ACC, EPS, ALIGN_X, FAR
    )
    for first in tl.static_range(0, C, BLOCK_C):
        j = first + tl.arange(0, BLOCK_C)
        x = load_tokens(x_base, start, rows, keep, first, stride_xn, stride_xd, C, BLOCK_C, ALIGN_X, FAR)
        u = normalised(x, mean, inverse, 0.0, keep[:, None] & (j < C)[None, :], ACC, EPS, False)
        tl.store(total_ptr + b * C + j, tl.sum(u, axis=0), mask=j < C)
    tl.store(count_ptr + b, tl.sum(keep.to(ACC), axis=0))


@kernel
def layer_gram_kernel(
    a_ptr,
    x_ptr,
    mask_ptr,
    center_ptr,
    statistics_ptr,
    G_ptr,
    sum_a_ptr,
    sum_u_ptr,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_an: tl.int64,
    stride_ad: tl.int64,
    stride_xb: tl.int64,
    stride_xh: tl.int64,
    stride_xn: tl.int64,
    stride_xd: tl.int64,
    stride_mb: tl.int64,
    stride_mn: tl.int64,
    N: tl.int64,
    B: tl.int64,
    H: tl.int64,
    parts: tl.int64,
    chunk: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    CA: tl.constexpr,
    C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    CENTERED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ALIGN_A: tl.constexpr,
    ALIGN_X: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes a (BLOCK_A, BLOCK_C) tile of sum_n a u^T of one (b, h) over one chunk of the tokens, its
    `part`, and the sums of its features of a and of u over the chunk.

    Results are (parts, B, H) records of CA x C, CA and C numbers. SYMMETRIC: a is u; programs of tiles below the
    diagonal return at once, and elements above it are also stored transposed. HAS_STATISTICS: those of layer norm are
    read, otherwise they are computed from the tile of x, which holds all C features.
    """
    TILES_A: tl.constexpr = (CA + BLOCK_A - 1) // BLOCK_A
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    SAME: tl.constexpr = SYMMETRIC and BLOCK_A == BLOCK_C and TILES_C == 1
    b, h, rest = locate(H, parts * TILES_A * TILES_C)
    part = rest // (TILES_A * TILES_C)
    tile_a = (rest // TILES_C % TILES_A).to(tl.int32)
    tile_c = (rest % TILES_C).to(tl.int32)
    first_a = tile_a * BLOCK_A
    first_c = tile_c * BLOCK_C
    if SYMMETRIC:
        if first_a >= first_c + BLOCK_C:
            return
    a_base = head_base(a_ptr, b, h, stride_ab, stride_ah, ALIGN_A)
    x_base = head_base(x_ptr, b, h, stride_xb, stride_xh, ALIGN_X)
    i = first_a + tl.arange(0, BLOCK_A)
    j = first_c + tl.arange(0, BLOCK_C)
    center_a = 0.0
    center_c = 0.0
    if CENTERED:
        center_a = tl.load(center_ptr + b * C + i, mask=i < C, other=0.0)
        center_c = tl.load(center_ptr + b * C + j, mask=j < C, other=0.0)
    G = tl.zeros((BLOCK_A, BLOCK_C), ACC)
    sum_a = tl.zeros((BLOCK_N, BLOCK_A), ACC)
    sum_u = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    rows = tl.arange(0, BLOCK_N)
    begin = part * chunk
    end = tl.minimum(begin + chunk, N)
    for start in range(begin, end, BLOCK_N):
        keep = kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK)
        x = load_tokens(x_base, start, rows, keep, first_c, stride_xn, stride_xd, C, BLOCK_C, ALIGN_X, FAR)
        if not SAME:
            a = load_tokens(a_base, start, rows, keep, first_a, stride_an, stride_ad, CA, BLOCK_A, ALIGN_A, FAR)
        if HAS_STATISTICS:
            of_token = statistics_ptr + (b * H + h) * N + start + rows
            mean = tl.load(of_token, mask=keep, other=0.0)
            inverse = tl.load(of_token + B * H * N, mask=keep, other=0.0)
        else:
            mean, inverse = layer_norm_statistics(
                x_base, start, rows, keep, stride_xn, stride_xd, C, BLOCK_C, ACC, EPS, ALIGN_X, FAR
            )
        inside = keep[:, None] & (j < C)[None, :]
        u = normalised(x, mean, inverse, center_c, inside, ACC, EPS, CENTERED)
        sum_u += u
        u = narrow(u, x.dtype)
        if SAME:
            a = u
        elif SYMMETRIC:
            inside = keep[:, None] & (i < C)[None, :]
            a = narrow(normalised(a, mean, inverse, center_a, inside, ACC, EPS, CENTERED), x.dtype)
        else:
            sum_a += a.to(ACC)
        G = product(tl.trans(a), u, G, PRECISION)
    record = (part * B + b) * H + h
    store_gram(G_ptr + record * CA * C, G, i, j, CA, C, SYMMETRIC)
    total_u = tl.sum(sum_u, axis=0)
    store_if(sum_u_ptr + record * C, total_u, j, C, tile_a == 0)
    if SYMMETRIC:
        store_if(sum_a_ptr + record * C, total_u, j, C, tile_a == 0)
    else:
        store_if(sum_a_ptr + record * CA, tl.sum(sum_a, axis=0), i, CA, tile_c == 0)


@kernel
def layer_mix_kernel(
    x_ptr,
    weight_ptr,
    u_ptr,
    weight_u_ptr,
    bias_ptr,
    add_ptr,
    center_ptr,
    y_ptr,
    stride_xb: tl.int64,
    stride_xn: tl.int64,
    stride_xd: tl.int64,
    stride_ub: tl.int64,
    stride_un: tl.int64,
    stride_ud: tl.int64,
    stride_ab: tl.int64,
    stride_an: tl.int64,
    stride_ad: tl.int64,
    N: tl.int64,
    blocks: tl.int64,
    ACC: tl.constexpr,
    EPS: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    CENTERED: tl.constexpr,
    DIFFERENTIATE: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_U: tl.constexpr,
    ALIGN_ADD: tl.constexpr,
    ALIGN_WEIGHT: tl.constexpr,
    ALIGN_WEIGHT_U: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Each program computes a (BLOCK_N, BLOCK_O) tile of y = weight x + weight_u u + bias + add; without x if I is 0.

    u is computed from the tokens at u_ptr. Weights (B, O, I) and (B, O, C) are contiguous; WIDE_MAP: products are in
    ACC.

    DIFFERENTIATE: y without `add` is a gradient with respect to u, of which the tile holds all features; layer norm's
    backward is applied to it before `add` is added.
    """
    TILES: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    H = tl.full([], 1, tl.int64)
    b, h, rest = locate(H, blocks * TILES)
    first = (rest % TILES).to(tl.int32) * BLOCK_O
    start = rest // TILES * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    present = existing(start, rows, N)
    o = (first + tl.arange(0, BLOCK_O)).to(tl.int64)
    center_ptr += b * C
    u_base = head_base(u_ptr, b, 0, stride_ub, 0, ALIGN_U)
    mean, inverse = layer_norm_statistics(
        u_base, start, rows, present, stride_un, stride_ud, C, BLOCK_K, ACC, EPS, ALIGN_U, FAR
    )
    y = tl.zeros((BLOCK_N, BLOCK_O), ACC)
    if I > 0:
        weight_ptr = record_base(weight_ptr, b * O * I, ALIGN_WEIGHT)
        y = multiply(
            x_ptr, weight_ptr, y, b, 0, start, rows, present, o, stride_xb, 0, stride_xn, stride_xd, 0, 0, I, 1, I, O,
            BLOCK_K, WIDE_MAP, ALIGN_X, FAR, PRECISION,
        )  # fmt: skip
    weight_u_ptr = record_base(weight_u_ptr, b * O * C, ALIGN_WEIGHT_U)
    y = multiply(
        u_ptr, weight_u_ptr, y, b, 0, start, rows, present, o, stride_ub, 0, stride_un, stride_ud, 0, 0, C, 1, C, O,
        BLOCK_K, WIDE_MAP, ALIGN_U, FAR, PRECISION, mean, inverse, center_ptr, EPS, CENTERED,
    )  # fmt: skip
    if HAS_BIAS:
        y += tl.load(bias_ptr + b * O + o, mask=o < O, other=0.0).to(ACC)[None, :]
    if DIFFERENTIATE:
        inside = present[:, None] & (o < C)[None, :]
        tokens = load_tokens(u_base, start, rows, present, 0, stride_un, stride_ud, C, BLOCK_O, ALIGN_U, FAR)
        unit = normalised(tokens, mean, inverse, 0.0, inside, ACC, EPS, False)
        along = mean_of(tl.sum(y * unit, axis=1), C)
        y = (y - mean_of(tl.sum(y, axis=1), C)[:, None] - unit * along[:, None]) * inverse[:, None]
    if HAS_ADD:
        add_base = head_base(add_ptr, b, 0, stride_ab, 0, ALIGN_ADD)
        y += load_tokens(
            add_base, start, rows, present, first, stride_an, stride_ad, O, BLOCK_O, ALIGN_ADD, FAR
        ).to(ACC)  # fmt: skip
    store_tokens(y_ptr, y, b, h, start, rows, N, first, N, H, O, BLOCK_O, OUT_ALIGN, FAR)

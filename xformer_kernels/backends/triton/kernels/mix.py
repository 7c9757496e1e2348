"""channel_mix: a small matrix applied to every token."""

import triton.language as tl

from xformer_kernels.backends.triton.kernels.compiler import device, kernel
from xformer_kernels.backends.triton.kernels.tiles import (
    existing,
    head_base,
    load_tokens,
    locate,
    narrow,
    normalised,
    product,
    store_tokens,
)


@device
def multiply(
    x_ptr,
    weight_ptr,
    y,
    b,
    h,
    start,
    rows,
    keep,
    o,
    stride_xb,
    stride_xh,
    stride_xn,
    stride_xd,
    stride_wb,
    stride_wh,
    stride_wo,
    stride_wi,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    BLOCK_K: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    mean=None,
    inverse=None,
    center_ptr=None,
    EPS: tl.constexpr = None,
    CENTERED: tl.constexpr = False,
):
    """y + x @ weight^T, BLOCK_K features per step. Operands have the dtype of y if WIDE_MAP, otherwise that of x.

    Tokens are first layer-normalised with `mean` and `inverse` (BLOCK_N,) unless EPS is None, and centred if CENTERED.
    """
    x_base = head_base(x_ptr, b, h, stride_xb, stride_xh, ALIGN)
    w_base = weight_ptr + b * stride_wb + h * stride_wh
    for first in range(0, I, BLOCK_K):
        i = (first + tl.arange(0, BLOCK_K)).to(tl.int64)
        x = load_tokens(x_base, start, rows, keep, first, stride_xn, stride_xd, I, BLOCK_K, ALIGN, FAR)
        if EPS is not None or CENTERED:
            center = tl.load(center_ptr + i, mask=i < I, other=0.0) if CENTERED else mean
            there = keep[:, None] & (i < I)[None, :]
            x = narrow(normalised(x, mean, inverse, center, there, y.dtype, EPS, CENTERED), x.dtype)
        inside = (i < I)[:, None] & (o < O)[None, :]
        w = tl.load(w_base + i[:, None] * stride_wi + o[None, :] * stride_wo, mask=inside, other=0.0)
        if WIDE_MAP:
            x, w = x.to(y.dtype), w.to(y.dtype)
        else:
            w = narrow(w, x.dtype)
        y = product(x, w, y, PRECISION)
    return y


@kernel
def channel_mix_kernel(
    x_ptr,
    weight_ptr,
    x2_ptr,
    weight2_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    y_ptr,
    stride_xb: tl.int64,
    stride_xh: tl.int64,
    stride_xn: tl.int64,
    stride_xd: tl.int64,
    stride_wb: tl.int64,
    stride_wh: tl.int64,
    stride_wo: tl.int64,
    stride_wi: tl.int64,
    stride_x2b: tl.int64,
    stride_x2h: tl.int64,
    stride_x2n: tl.int64,
    stride_x2d: tl.int64,
    stride_w2b: tl.int64,
    stride_w2h: tl.int64,
    stride_w2o: tl.int64,
    stride_w2i: tl.int64,
    stride_bb: tl.int64,
    stride_bh: tl.int64,
    stride_bo: tl.int64,
    stride_ab: tl.int64,
    stride_ah: tl.int64,
    stride_an: tl.int64,
    stride_ad: tl.int64,
    stride_sb: tl.int64,
    stride_sh: tl.int64,
    stride_so: tl.int64,
    N: tl.int64,
    H: tl.int64,
    blocks: tl.int64,
    ACC: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    I2: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WIDE_MAP: tl.constexpr,
    ALIGN_X: tl.constexpr,
    ALIGN_X2: tl.constexpr,
    ALIGN_ADD: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program computes a (BLOCK_N, BLOCK_O) tile of y. I2 = 0: no x2 and weight2. WIDE_MAP: products are in ACC."""
    TILES: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    b, h, rest = locate(H, blocks * TILES)
    first = (rest % TILES).to(tl.int32) * BLOCK_O
    start = rest // TILES * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    present = existing(start, rows, N)
    o = (first + tl.arange(0, BLOCK_O)).to(tl.int64)
    y = multiply(
        x_ptr, weight_ptr, tl.zeros((BLOCK_N, BLOCK_O), ACC), b, h, start, rows, present, o, stride_xb, stride_xh,
        stride_xn, stride_xd, stride_wb, stride_wh, stride_wo, stride_wi, I, O, BLOCK_K, WIDE_MAP, ALIGN_X, FAR,
        PRECISION,
    )  # fmt: skip
    if I2 > 0:
        y = multiply(
            x2_ptr, weight2_ptr, y, b, h, start, rows, present, o, stride_x2b, stride_x2h, stride_x2n, stride_x2d,
            stride_w2b, stride_w2h, stride_w2o, stride_w2i, I2, O, BLOCK_K, WIDE_MAP, ALIGN_X2, FAR, PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + b * stride_bb + h * stride_bh + o * stride_bo, mask=o < O, other=0.0)
        y += bias.to(ACC)[None, :]
    if HAS_ADD:
        add_base = head_base(add_ptr, b, h, stride_ab, stride_ah, ALIGN_ADD)
        add = load_tokens(add_base, start, rows, present, first, stride_an, stride_ad, O, BLOCK_O, ALIGN_ADD, FAR).to(
            ACC
        )
        if HAS_SCALE:
            scale = tl.load(scale_ptr + b * stride_sb + h * stride_sh + o * stride_so, mask=o < O, other=0.0)
            add *= scale.to(ACC)[None, :]
        y += add
    store_tokens(y_ptr, y, b, h, start, rows, N, first, N, H, O, BLOCK_O, OUT_ALIGN, FAR)

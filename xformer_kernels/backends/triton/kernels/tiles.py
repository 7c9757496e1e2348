"""Device functions that the kernels share: where a program works, tiles of tokens, products, norms and maps.

A tile of tokens is the tokens start + rows, with rows from 0. Its first token has a 64-bit address, from which offsets
are 32-bit unless FAR. Tiles are named by their shapes. Tokens are (BLOCK_N, BLOCK_D): tokens by features, 0 beyond N,
beyond D and where masked. Maps are (in, out): features of what is mixed by features of the result, so that a mix is
``tokens @ map``.
"""

import triton.language as tl
from triton import knobs

from xformer_kernels.backends.triton.kernels.compiler import device

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@device
def locate(H, parts):
    """(b, h, part) of this program. Heads vary fastest: those of one token share cache lines, and now run together."""
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    rest = pid // H
    return rest // parts, h, rest % parts


@device
def head_base(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where token 0 of (b, h) starts. ALIGN is a promise of launch.alignment for this address and all rows."""
    base = ptr + b * stride_b + h * stride_h
    return tl.multiple_of(base, (ALIGN if ALIGN > 0 else 1) * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@device
def tile_base(base, start, stride_n, ALIGN: tl.constexpr):
    """Where token `start` starts."""
    start_ptr = base + start * stride_n.to(tl.int64)
    return tl.multiple_of(start_ptr, (ALIGN if ALIGN > 0 else 1) * (base.dtype.element_ty.primitive_bitwidth // 8))


@device
def tile_stride(stride, FAR: tl.constexpr):
    """A stride in the integers of offsets within a tile: FAR is what launch.far says of all strides of a launch."""
    return stride.to(tl.int64) if FAR else stride.to(tl.int32)


@device
def record_base(ptr, offset, ALIGN: tl.constexpr):
    """ptr + offset into a buffer of ours whose rows are whole features: the promise is as for tokens of ours."""
    return tl.multiple_of(ptr + offset, ALIGN * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@device
def existing(start, rows, end):
    """Which of the tokens start + rows are before `end`."""
    return rows < tl.minimum(end - start, rows.shape[0]).to(tl.int32)


@device
def kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK: tl.constexpr):
    """Which of the tokens start + rows are before `end` and not masked."""
    keep = existing(start, rows, end)
    if HAS_MASK:
        step = stride_mn.to(tl.int64)
        keep = keep & (tl.load(mask_ptr + b * stride_mb + start * step + rows * step, mask=keep, other=0) != 0)
    return keep


@device
def load_tokens(
    base,
    start,
    rows,
    keep,
    first,
    stride_n,
    stride_d,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,
):
    """(BLOCK_N, BLOCK): the features from `first` on."""
    features = first + tl.arange(0, BLOCK)
    starts = tl.multiple_of(rows * tile_stride(stride_n, FAR), ALIGN if ALIGN > 0 else 1)
    steps = features if ALIGN > 0 else features * tile_stride(stride_d, FAR)
    offsets = starts[:, None] + steps[None, :]
    inside = keep[:, None] & (features < D)[None, :]
    return tl.load(tile_base(base, start, stride_n, ALIGN) + offsets, mask=inside, other=0.0)


@device
def store_tokens(
    ptr, tile, b, h, start, rows, end, first, N, H, D: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    FAR: tl.constexpr, CHANNEL_MAJOR: tl.constexpr = False,
):  # fmt: skip
    """Tokens before `end`, into a (B, N, H, D) buffer of ours, or a (B, H, D, N) one, where tokens lie side by side."""
    features = first + tl.arange(0, BLOCK)
    value = narrow(tile, ptr.dtype.element_ty)
    mask = existing(start, rows, end)[:, None] & (features < D)[None, :]
    if CHANNEL_MAJOR:
        base = ptr + (b * H + h) * D * N + start
        tl.store(base + rows[:, None] + features[None, :] * N, value, mask=mask)
    else:
        base = tile_base(ptr + (b * N * H + h) * D, start, H * D, ALIGN)
        starts = tl.multiple_of(rows * tile_stride(H * D, FAR), ALIGN)
        tl.store(base + (starts[:, None] + features[None, :]), value, mask=mask)


@device
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to DTYPE, to nearest even; done explicitly where Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@device
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; Triton's interpreter multiplies the bits of bfloat16 as integers unless it is widened."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@device
def clamped(ssq, EPS: tl.constexpr):
    """max(norm, eps) from sums of squares; NaN stays NaN."""
    norm = tl.sqrt(ssq)
    eps = tl.full([], EPS, ssq.dtype)
    return tl.where(norm < eps, eps, norm)


@device
def token_norms(x, EPS: tl.constexpr):
    """(BLOCK_N,): the norm of each token over its features, and the factor 1 / max(norm, eps) of F.normalize."""
    ssq = tl.sum(x * x, axis=1)
    return tl.sqrt(ssq), 1.0 / clamped(ssq, EPS)


@device
def sum_of_parts(ptr, offsets, mask, parts, stride, ACC: tl.constexpr, ALIGN: tl.constexpr):
    """The sum of `parts` tiles, `stride` apart, added in order, so that results are bitwise reproducible."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)
    for part in range(1, parts):
        total += tl.load(record_base(ptr, part * stride, ALIGN) + offsets, mask=mask, other=0.0)
    return total


@device
def cosines(raw, ssq_k, ssq_q, EPS: tl.constexpr, KEY_VALUE: tl.constexpr, TOKEN_NORM: tl.constexpr):
    """(in, out) raw / (|k| |q|): k is on the in axis; q on the out axis, for key_value on the in axis as well."""
    if TOKEN_NORM:
        raw = raw / clamped(ssq_k, EPS)[:, None]
        if KEY_VALUE:
            raw = raw / clamped(ssq_q, EPS)[:, None]
        else:
            raw = raw / clamped(ssq_q, EPS)[None, :]
    return raw


@device
def softmax_over_keys(S, inside):
    """Over the in axis, of the rows that are `inside`."""
    S = tl.where(inside[:, None], S, float("-inf"))
    S = tl.exp(S - tl.max(S, axis=0)[None, :])
    return S / tl.sum(S, axis=0)[None, :]

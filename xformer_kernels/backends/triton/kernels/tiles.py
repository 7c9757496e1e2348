"""Device functions shared by the kernels: program ids, tiles of tokens, matrix products, norms and maps.

A tile holds the tokens ``start + rows``, where ``rows`` starts at 0. The address of its first token is 64-bit; offsets
within the tile are 32-bit unless FAR. Docstrings give the shapes of tiles. Tokens have shape (BLOCK_N, BLOCK_D), tokens
by features, and are 0 beyond N, beyond D and where masked. Maps have shape (in, out), input features by output
features, and are applied as ``tokens @ map``.
"""

import triton.language as tl
from triton import knobs

from xformer_kernels.backends.triton.kernels.compiler import device

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@device
def locate(H, parts):
    """(b, h, part) of this program id. Heads vary fastest: heads of a token share cache lines, and so run together."""
    pid = tl.program_id(0).to(tl.int64)
    h = pid % H
    rest = pid // H
    return rest // parts, h, rest % parts


@device
def head_base(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Pointer to token 0 of (b, h). launch.alignment guarantees ALIGN for this address and for all rows."""
    base = ptr + b * stride_b + h * stride_h
    return tl.multiple_of(base, (ALIGN if ALIGN > 0 else 1) * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@device
def tile_base(base, start, stride_n, ALIGN: tl.constexpr):
    """Pointer to token `start`."""
    start_ptr = base + start * stride_n.to(tl.int64)
    return tl.multiple_of(start_ptr, (ALIGN if ALIGN > 0 else 1) * (base.dtype.element_ty.primitive_bitwidth // 8))


@device
def tile_stride(stride, FAR: tl.constexpr):
    """A stride, cast to the dtype of offsets within a tile. FAR: result of launch.far for all strides of a launch."""
    return stride.to(tl.int64) if FAR else stride.to(tl.int32)


@device
def record_base(ptr, offset, ALIGN: tl.constexpr):
    """ptr + offset, where both the address and the offset are multiples of ALIGN elements."""
    return tl.multiple_of(ptr + offset, ALIGN * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@device
def existing(start, rows, end):
    """Mask of the tokens start + rows that are before `end`."""
    return rows < tl.minimum(end - start, rows.shape[0]).to(tl.int32)


@device
def kept(start, rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK: tl.constexpr):
    """Mask of the tokens start + rows that are before `end` and that the token mask keeps."""
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
    """(BLOCK_N, BLOCK): features [first, first + BLOCK) of the tokens start + rows."""
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
    """Stores tokens before `end` in a contiguous (B, N, H, D) buffer, or (B, H, D, N) if CHANNEL_MAJOR."""
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
    """x rounded to nearest even in DTYPE. This is explicit where Triton's interpreter would truncate to bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@device
def three_products(a, b):
    """float32 a @ b by three products of tf32, for at most launch.LONGEST_IN_PARTS terms.

    An operand is the sum of `high`, the nearest tf32 number, and `low`, of which tensor cores use the leading bits.
    `again` is `a_high`, written so that Triton does not recognise it: it copies an operand with two uses through shared
    memory. `low` of an infinite number is NaN, so infinite sums are those of `high` alone. `high` of a NaN may be any
    number, but its `low` is NaN: such a sum is NaN, or infinite if it has an infinite term as well.
    """
    a_bits, b_bits = a.to(tl.uint32, bitcast=True) + 0x1000, b.to(tl.uint32, bitcast=True) + 0x1000
    a_high, b_high = (
        (a_bits & 0xFFFFE000).to(tl.float32, bitcast=True),
        (b_bits & 0xFFFFE000).to(tl.float32, bitcast=True),
    )
    again = ((a_bits >> 13) << 13).to(tl.float32, bitcast=True)
    small = tl.dot(a - a_high, b_high, input_precision="tf32")
    small = tl.dot(again, b - b_high, small, input_precision="tf32")
    large = tl.dot(a_high, b_high, input_precision="tf32")
    return tl.where(tl.abs(large) == float("inf"), large, large + small)


@device
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. bfloat16 is widened in Triton's interpreter, which would multiply its bits as integers."""
    if PRECISION == "tf32x3":
        return acc + three_products(a, b)
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@device
def mapped(x, weight, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """x @ weight in ACC."""
    if PRECISION == "tf32x3":
        return three_products(x, weight)
    return product(x, weight, tl.zeros((x.shape[0], weight.shape[1]), ACC), PRECISION)


@device
def clamped(ssq, EPS: tl.constexpr):
    """max(norm, eps) from sums of squares. NaN is propagated."""
    norm = tl.sqrt(ssq)
    eps = tl.full([], EPS, ssq.dtype)
    return tl.where(norm < eps, eps, norm)


@device
def token_norms(x, EPS: tl.constexpr):
    """(BLOCK_N,): the norm of each token over its features, and the factor 1 / max(norm, eps) of F.normalize."""
    ssq = tl.sum(x * x, axis=1)
    return tl.sqrt(ssq), 1.0 / clamped(ssq, EPS)


@device
def mean_of(total, C: tl.constexpr):
    """Sums of C numbers divided by C, with correct rounding where multiply-adds are fused."""
    reciprocal = tl.full([], 1 / C, total.dtype)
    mean = total * reciprocal
    return tl.fma(tl.fma(mean, tl.full([], -C, total.dtype), total), reciprocal, mean)


@device
def mean_apart(
    mean, base, start, rows, keep, stride_n, stride_d, C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    FAR: tl.constexpr, SQUARED: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,): for each token, the mean over its features of their differences from `mean`, squared if SQUARED."""
    for first in tl.static_range(0, C, BLOCK):
        x = load_tokens(base, start, rows, keep, first, stride_n, stride_d, C, BLOCK, ALIGN, FAR).to(mean.dtype)
        apart = tl.where((first + tl.arange(0, BLOCK) < C)[None, :], x - mean[:, None], 0.0)
        part = apart * apart if SQUARED else apart
        if first == 0:
            total = part
        else:
            total += part
    return mean_of(tl.sum(total, axis=1), C)


@device
def layer_norm_statistics(
    base, start, rows, keep, stride_n, stride_d, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    EPS: tl.constexpr, ALIGN: tl.constexpr, FAR: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N,): mean and 1 / sqrt(variance + eps) of each token, read BLOCK features at a time. Zeros if EPS is None.

    The mean of equal features is exact, so that layer norm returns zeros for them: sums of up to 256 equal 16-bit
    numbers are exact in float32; for wider numbers, the mean is corrected by that of the differences from it.
    """
    mean = tl.zeros((rows.shape[0],), ACC)
    inverse = mean
    if EPS is not None:
        mean += mean_apart(mean, base, start, rows, keep, stride_n, stride_d, C, BLOCK, ALIGN, FAR, False)
        if base.dtype.element_ty.primitive_bitwidth > 16:
            mean += mean_apart(mean, base, start, rows, keep, stride_n, stride_d, C, BLOCK, ALIGN, FAR, False)
        variance = mean_apart(mean, base, start, rows, keep, stride_n, stride_d, C, BLOCK, ALIGN, FAR, True)
        inverse = tl.rsqrt(variance + tl.full([], EPS, ACC))
    return mean, inverse


@device
def normalised(x, mean, inverse, center, inside, ACC: tl.constexpr, EPS: tl.constexpr, CENTERED: tl.constexpr):
    """Tokens in ACC, layer-normalised unless EPS is None, minus `center` (BLOCK_D,) if CENTERED; 0 where not inside."""
    u = x.to(ACC)
    if EPS is not None:
        u = (u - mean[:, None]) * inverse[:, None]
    if CENTERED:
        u -= center[None, :]
    return tl.where(inside, u, 0.0)


@device
def sum_of_parts(ptr, offsets, mask, parts, stride, ACC: tl.constexpr, ALIGN: tl.constexpr):
    """The sum of `parts` tiles, `stride` apart, added in order, so that results are bitwise reproducible."""
    total = tl.load(ptr + offsets, mask=mask, other=0.0).to(ACC)
    for part in range(1, parts):
        total += tl.load(record_base(ptr, part * stride, ALIGN) + offsets, mask=mask, other=0.0)
    return total


@device
def cosines(raw, ssq_k, ssq_q, EPS: tl.constexpr, KEY_VALUE: tl.constexpr, TOKEN_NORM: tl.constexpr):
    """(in, out): raw / (|k| |q|). k is along the in axis; q along the out axis, or along the in axis for key_value."""
    if TOKEN_NORM:
        raw = raw / clamped(ssq_k, EPS)[:, None]
        if KEY_VALUE:
            raw = raw / clamped(ssq_q, EPS)[:, None]
        else:
            raw = raw / clamped(ssq_q, EPS)[None, :]
    return raw


@device
def softmax_over_keys(S, inside):
    """Softmax over the in axis, restricted to the rows where `inside` is true."""
    S = tl.where(inside[:, None], S, float("-inf"))
    S = tl.exp(S - tl.max(S, axis=0)[None, :])
    return S / tl.sum(S, axis=0)[None, :]

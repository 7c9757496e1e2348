"""Device functions that the kernels share: where a program works, tiles of tokens, products, norms and maps.

Tiles are named by their shapes. Tokens are (BLOCK_N, BLOCK_D): tokens by features, 0 beyond N, beyond D and where
masked. Maps are (in, out): features of what is mixed by features of the result, so that a mix is ``tokens @ map``.
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
def record_base(ptr, offset, ALIGN: tl.constexpr):
    """ptr + offset into a buffer of ours whose rows are whole features: the promise is as for tokens of ours."""
    return tl.multiple_of(ptr + offset, ALIGN * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@device
def kept(rows, end, mask_ptr, b, stride_mb, stride_mn, HAS_MASK: tl.constexpr):
    """Which of the tokens `rows` exist and are not masked."""
    keep = rows < end
    if HAS_MASK:
        keep = keep & (tl.load(mask_ptr + b * stride_mb + rows * stride_mn, mask=keep, other=0) != 0)
    return keep


@device
def load_tokens(
    base,
    rows,
    keep,
    first,
    stride_n,
    stride_d,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """(BLOCK_N, BLOCK): the features from `first` on."""
    features = first + tl.arange(0, BLOCK)
    starts = base + tl.multiple_of(rows * stride_n, ALIGN if ALIGN > 0 else 1)
    steps = features if ALIGN > 0 else features.to(tl.int64) * stride_d
    return tl.load(starts[:, None] + steps[None, :], mask=keep[:, None] & (features < D)[None, :], other=0.0)


@device
def store_tokens(
    ptr, tile, b, h, rows, present, first, N, H, D: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    CHANNEL_MAJOR: tl.constexpr = False,
):  # fmt: skip
    """Into a (B, N, H, D) buffer of ours, or a (B, H, D, N) one, where tokens lie side by side."""
    features = first + tl.arange(0, BLOCK)
    value = narrow(tile, ptr.dtype.element_ty)
    mask = present[:, None] & (features < D)[None, :]
    if CHANNEL_MAJOR:
        base = ptr + (b * H + h) * D * N
        tl.store(base + rows[:, None] + features[None, :] * N, value, mask=mask)
    else:
        base = ptr + (b * N * H + h) * D
        base = tl.multiple_of(base, ALIGN * (ptr.dtype.element_ty.primitive_bitwidth // 8))
        starts = base + tl.multiple_of(rows * (H * D), ALIGN)
        tl.store(starts[:, None] + features[None, :], value, mask=mask)


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

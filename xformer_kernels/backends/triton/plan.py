"""Splits a call into launches and programs, depending on its shapes, the compiled kernels and the device."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

WIDEST = 256
"""Features per head that the kernels hold in one tile."""
ONE_LAUNCH = 128 * 4
"""Maximum bytes of a row of the map for which one program holds a whole map."""
WIDEST_LINEAR = {2: 128, 4: 64, 8: 64}
"""Maximum features of q, k and v, by element size, for which linear attention is fused: a program holds two whole
D x Dv maps in the accumulate dtype, in addition to its tokens."""
CHUNK = 256
"""Minimum number of tokens per program, unless there are fewer tokens."""
START = 128
"""Start-up time of a program (loading its map and first tokens), in units of the time per token; not measured."""
PARTS = 12
"""Maximum number of parts per head, unless all of them run at the same time."""
BUSY = 0.85
"""Minimum utilisation of the device, with one program per head, for a one-launch forward of long sequences."""
LONGEST = 16384
"""Maximum number of tokens summed in one tensor core accumulator, which truncates instead of rounding: the error grows
with the number of tokens (tests/gpu, beyond 31 bits)."""
SHORT = 4096
"""Tokens per chunk if chunks would otherwise be longer than LONGEST."""


class Split(NamedTuple):
    """`parts` programs of `chunk` tokens each. `many`: the parts are summed before the next launch reads them."""

    parts: int
    chunk: int
    many: bool = False


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_tokens(N: int, units: int, record: int, row: int, slots: int, block: int = CHUNK) -> Split:
    """Splits the tokens of each unit (batch, head and tile of the map) into chunks, to minimise the estimated time.

    `units`: number of units. `slots`: number of programs that run at the same time; the time is minimal if all slots
    are busy until the end. `block`: tokens per tile; chunks are multiples of it. `record`: bytes of a partial result;
    every program of the next launch reads those of all parts. `row`: bytes of a token. The number of parts is limited
    so that these reads stay below twice the bytes of the tokens: parts^2 record <= 2 N row.
    """
    units = max(1, units)
    most = min(max(cdiv(slots, units), PARTS), cdiv(N, CHUNK), isqrt(2 * N * row // record))

    def time(parts: int) -> int:
        return cdiv(units * parts, slots) * (_chunk(N, parts, block) + START)

    best = min(range(1, most + 1), key=time, default=1)
    chunk = _chunk(N, best, block)
    return Split(max(1, cdiv(N, chunk)) if chunk else 1, chunk)


def _chunk(N: int, parts: int, block: int) -> int:
    return cdiv(cdiv(N, parts), block) * block


def split_sums(N: int, units: int, record: int, row: int, slots: int, block: int = CHUNK) -> Split:
    """:func:`split_tokens` for sums of products over the tokens, with at most LONGEST tokens per chunk."""
    split = split_tokens(N, units, record, row, slots, block)
    return split if split.chunk <= LONGEST else Split(cdiv(N, SHORT), SHORT, many=True)


def busy(programs: int, slots: int) -> float:
    """Fraction of the device's time that programs of equal length use."""
    return programs / (cdiv(programs, slots) * slots) if programs else 1.0


def fits_one_launch(D: int, itemsize: int) -> bool:
    """Whether one program can hold a whole map with this element size."""
    return D * itemsize <= ONE_LAUNCH


def fits_linear_attention(features: int, itemsize: int) -> bool:
    """Whether linear attention is fused for tokens of this element size. `features`: the larger of D and Dv."""
    return features <= WIDEST_LINEAR[itemsize]

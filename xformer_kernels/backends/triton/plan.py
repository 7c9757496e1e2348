"""How a call is split into launches and programs: depends on its shapes, the compiled kernels and the device."""

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
"""Minimum number of tokens per program, if there are as many."""
START = 128
"""Time before the first product of a program (its map, and the first tokens), in tokens of a tile; not measured."""
PARTS = 12
"""Maximum number of parts of a head, unless they all run at the same time."""
BUSY = 0.85
"""Minimum share of the device that the heads must keep busy for a forward in one launch of long sequences."""
LONGEST = 16384
"""Maximum number of tokens summed in one tensor core accumulator, which truncates instead of rounding: the error grows
with the number of tokens (tests/gpu, beyond 31 bits)."""
SHORT = 4096
"""Tokens of a chunk if the usual chunks would be longer than LONGEST."""


class Split(NamedTuple):
    """`parts` programs of `chunk` tokens each. `many`: the parts are summed before the launch that reads them."""

    parts: int
    chunk: int
    many: bool = False


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_tokens(N: int, units: int, record: int, row: int, slots: int, block: int = CHUNK) -> Split:
    """Chunks of the tokens of each of `units` (batch, head and tile of the map), for the least estimated time.

    `slots`: programs that run at the same time; the time is least if all of them are busy until the end. `block`:
    tokens of a tile, of which chunks are multiples. `record`: bytes of a partial result, which every program of the
    next launch reads from every part; `row`: bytes of a token. The number of parts is limited so that these reads stay
    below twice the bytes of the tokens: parts^2 record <= 2 N row.
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
    """:func:`split_tokens` for sums of products over the tokens."""
    split = split_tokens(N, units, record, row, slots, block)
    return split if split.chunk <= LONGEST else Split(cdiv(N, SHORT), SHORT, many=True)


def busy(programs: int, slots: int) -> float:
    """Share of the device's time that is used by programs of equal length."""
    return programs / (cdiv(programs, slots) * slots) if programs else 1.0


def fits_one_launch(D: int, itemsize: int) -> bool:
    """Whether one program can hold a whole map with this element size."""
    return D * itemsize <= ONE_LAUNCH


def fits_linear_attention(features: int, itemsize: int) -> bool:
    """Whether linear attention of tokens with this element size is fused; `features`: the larger of D and Dv."""
    return features <= WIDEST_LINEAR[itemsize]

"""Block sizes, warps and pipeline stages of every kernel: the shipped table, and the tuner that replaces it.

A choice depends on the kernel, the dtype, the number of features, the map and the architecture; never on the number of
tokens, batches or heads. ``XFORMER_KERNELS_AUTOTUNE=1`` times the candidates the first time that a key is met and keeps
the best in ``tuned.json`` under ``XFORMER_KERNELS_CACHE`` (``~/.cache/xformer-kernels``), which later processes read
under the same variable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

AUTOTUNE = "XFORMER_KERNELS_AUTOTUNE"
CACHE = "XFORMER_KERNELS_CACHE"


class Config(NamedTuple):
    """How a kernel is cut and compiled.

    Tokens of a tile, features of its result, features that a product takes at a time, warps, stages of its loops, and
    registers of a thread (0: as many as NVIDIA's assembler likes, which spills a few numbers for more occupancy).
    """

    block_n: int
    block_o: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """For the compiler."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


class Key(NamedTuple):
    """What a choice may depend on. `features`: of the widest operand."""

    kernel: str
    dtype: torch.dtype
    features: int
    map: str


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("gram", "gram_normalised", "apply", "forward", "map_backward", "gradients", "channel_mix")
BLOCKS = (16, 32, 64, 128, 256)


def block(features: int) -> int:
    """The power of two that holds so many features; a tensor core's least is 16."""
    return max(16, 1 << (features - 1).bit_length())


def shipped(key: Key, arch: str) -> Config:
    """The table's choice; an architecture that has no row of its own gets the common one."""
    d = block(key.features)
    rows = _TABLE[key.kernel, key.dtype.itemsize]
    config = Config(*rows.get((d, arch), rows[d]))
    if arch == "interpreter":
        # its time goes by operations, whatever their size
        return config._replace(block_n=128)
    if arch.startswith("gfx"):
        # half the shared memory, and loops that are pipelined through registers
        return config._replace(stages=min(config.stages, 2), registers=0)
    return config


# (kernel, bytes of a number): {features, or (features, arch): (block_n, block_o, block_k, warps, stages[, registers])}
# Chosen by what the assemblers say, not yet by the clock: no spills, the shared memory of every architecture kept to,
# tensor cores and 128-bit loads used. Products in ieee float32 take 16 features at a time, or the multiply-adds of a
# whole tile would not fit the registers.
_TABLE: dict[tuple[str, int], dict[Any, tuple[int, ...]]] = {
    ("gram", 2): {
        16: (128, 16, 0, 4, 3),
        32: (128, 32, 0, 4, 3, 255),
        64: (64, 64, 0, 4, 3, 255),
        128: (64, 128, 0, 8, 3),
        256: (64, 128, 0, 8, 3),
    },
    ("gram", 4): {
        16: (64, 16, 0, 4, 3, 255),
        32: (32, 32, 0, 4, 3, 255),
        64: (32, 64, 0, 4, 3),
        128: (32, 128, 0, 8, 3, 255),
        256: (32, 128, 0, 8, 3, 255),
    },
    ("gram", 8): {d: (16, min(d, 32), 0, 4, 2) for d in BLOCKS},
    ("gram_normalised", 4): {d: (32, min(d, 64), 0, 4, 3, 255) for d in BLOCKS},
    ("gram_normalised", 8): {d: (16, min(d, 32), 0, 4, 2) for d in BLOCKS},
    ("apply", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (64, 128, 128, 8, 2, 255),
        256: (32, 64, 256, 8, 2, 255),
        (256, "gfx942"): (32, 32, 256, 8, 1),
    },
    ("apply", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (32, 64, 128, 8, 2, 255),
        256: (16, 64, 256, 8, 2, 255),
        (256, "gfx942"): (16, 32, 256, 8, 1),
    },
    ("apply", 8): {d: (16, min(d, 32), d, 4, 1) for d in BLOCKS},
    ("forward", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2, 255),
        64: (64, 64, 64, 4, 2),
        128: (32, 128, 128, 8, 2, 255),
    },
    ("forward", 4): {
        16: (32, 16, 16, 4, 2),
        32: (32, 32, 32, 4, 2),
        64: (32, 64, 64, 8, 2),
        128: (16, 128, 128, 8, 2, 255),
    },
    ("forward", 8): {d: (16, d, d, 4, 1) for d in (16, 32, 64)},
    ("map_backward", 2): {
        16: (0, 16, 0, 4, 1),
        32: (0, 32, 0, 4, 1),
        64: (0, 32, 0, 4, 1, 255),
        128: (0, 16, 0, 4, 1, 255),
        256: (0, 16, 0, 8, 1, 255),
    },
    ("map_backward", 8): {d: (0, 8, 0, 16 if d > 128 else 8, 1) for d in BLOCKS},
    ("gradients", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (32, 64, 64, 4, 2, 255),
        256: (32, 64, 64, 8, 2, 255),
        (128, "gfx942"): (32, 32, 32, 4, 1),
        (256, "gfx942"): (32, 32, 32, 8, 1),
    },
    ("gradients", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 16, 4, 2),
        64: (32, 64, 16, 4, 2),
        128: (32, 64, 16, 4, 2),
        256: (32, 64, 16, 8, 2, 255),
    },
    ("gradients", 8): {d: (32, 16, 16, 8, 1) for d in BLOCKS},
    ("channel_mix", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2, 255),
        128: (64, 64, 64, 4, 2, 255),
        256: (64, 64, 64, 8, 2, 255),
    },
    ("channel_mix", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 16, 4, 2),
        64: (64, 64, 16, 8, 2),
        128: (64, 64, 16, 8, 2),
        256: (64, 64, 16, 8, 2),
    },
    ("channel_mix", 8): {d: (32, min(d, 32), 16, 4, 1) for d in BLOCKS},
}
_TABLE["map_backward", 4] = _TABLE["map_backward", 2]


def get(key: Key, arch: str) -> Config:
    return shipped(key, arch)


def launch(key: Key, arch: str, run: Callable[[Config], None]) -> None:
    run(get(key, arch))

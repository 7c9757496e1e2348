"""Block sizes, warps and pipeline stages of every kernel: the shipped table, and the tuner that replaces it.

A choice depends on the kernel, the dtype, the number of features, the map and the architecture; never on the number of
tokens, batches or heads. ``XFORMER_KERNELS_AUTOTUNE=1`` times the candidates the first time that a key is met and keeps
the best in ``tuned.json`` under ``XFORMER_KERNELS_CACHE`` (``~/.cache/xformer-kernels``), which later processes read
under the same variable.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

AUTOTUNE = "XFORMER_KERNELS_AUTOTUNE"
CACHE = "XFORMER_KERNELS_CACHE"


class Config(NamedTuple):
    """How a kernel is cut and compiled.

    Tokens of a tile, features of its result, features that a product takes at a time, warps, and stages of its loops.
    """

    block_n: int
    block_o: int
    block_k: int
    warps: int
    stages: int


class Key(NamedTuple):
    """What a choice may depend on. `features`: of the widest operand."""

    kernel: str
    dtype: torch.dtype
    features: int
    map: str


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("gram", "apply", "forward", "map_backward", "gradients", "channel_mix")
BLOCKS = (16, 32, 64, 128, 256, 512)


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
        return config._replace(stages=min(config.stages, 2))
    return config


# (kernel, bytes of a number): {features, or (features, arch): (block_n, block_o, block_k, warps, stages)}
# Chosen by what the assembler says: no spills, shared memory of every architecture kept to, tensor cores and 128-bit
# loads used. Products in ieee float32 take 16 features at a time, or the multiply-adds of a whole tile would not fit
# the registers.
_TABLE: dict[tuple[str, int], dict[Any, tuple[int, int, int, int, int]]] = {
    ("gram", 2): {
        16: (128, 16, 0, 4, 3),
        32: (128, 32, 0, 4, 3),
        64: (64, 64, 0, 4, 3),
        128: (64, 128, 0, 8, 3),
        256: (64, 128, 0, 8, 3),
        512: (64, 128, 0, 8, 3),
    },
    ("gram", 4): {
        16: (64, 16, 0, 4, 3),
        32: (32, 32, 0, 4, 3),
        64: (32, 64, 0, 4, 3),
        128: (32, 128, 0, 8, 3),
        256: (32, 128, 0, 8, 3),
        512: (32, 128, 0, 8, 3),
    },
    ("gram", 8): {d: (16, min(d, 64), 0, 4, 2) for d in BLOCKS},
    ("apply", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (64, 128, 128, 8, 2),
        256: (64, 64, 256, 8, 2),
        512: (32, 32, 512, 8, 2),
    },
    ("apply", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (32, 64, 128, 8, 2),
        256: (32, 64, 256, 8, 2),
        512: (16, 32, 512, 8, 2),
    },
    ("apply", 8): {d: (16, min(d, 32), d, 4, 1) for d in BLOCKS},
    ("forward", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (64, 128, 128, 8, 2),
    },
    ("forward", 4): {
        16: (32, 16, 16, 4, 2),
        32: (32, 32, 32, 4, 2),
        64: (32, 64, 64, 4, 2),
        128: (16, 128, 128, 8, 2),
    },
    ("forward", 8): {d: (16, d, d, 4, 1) for d in (16, 32, 64)},
    ("map_backward", 2): {
        16: (0, 16, 0, 4, 1),
        32: (0, 32, 0, 4, 1),
        64: (0, 32, 0, 4, 1),
        128: (0, 16, 0, 4, 1),
        256: (0, 16, 0, 8, 1),
        512: (0, 16, 0, 16, 1),
    },
    ("gradients", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (32, 64, 128, 4, 2),
        256: (32, 64, 128, 8, 2),
        512: (32, 64, 128, 8, 2),
    },
    ("gradients", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 16, 4, 2),
        64: (32, 64, 16, 4, 2),
        128: (32, 64, 16, 4, 2),
        256: (64, 64, 16, 8, 2),
        512: (64, 64, 16, 8, 2),
    },
    ("gradients", 8): {d: (32, min(d, 32), 16, 8, 1) for d in BLOCKS},
    ("channel_mix", 2): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 32, 4, 2),
        64: (64, 64, 64, 4, 2),
        128: (64, 64, 128, 4, 2),
        256: (64, 64, 128, 8, 2),
        512: (64, 64, 128, 8, 2),
    },
    ("channel_mix", 4): {
        16: (64, 16, 16, 4, 2),
        32: (64, 32, 16, 4, 2),
        64: (64, 64, 32, 4, 2),
        128: (64, 64, 32, 4, 2),
        256: (64, 64, 16, 8, 2),
        512: (64, 64, 16, 8, 2),
    },
    ("channel_mix", 8): {d: (32, min(d, 32), 16, 4, 1) for d in BLOCKS},
}
_TABLE["map_backward", 4] = _TABLE["map_backward", 2]
_TABLE["map_backward", 8] = {d: (0, 16, 0, 16 if d > 128 else 8, 1) for d in BLOCKS}


def get(key: Key, arch: str) -> Config:
    return shipped(key, arch)


def launch(key: Key, arch: str, run: Callable[[Config], None]) -> None:
    run(get(key, arch))

"""Which image comes when: arithmetic of (seed, epoch, position), without state and without a word on images.

The images of an epoch stand in one order. Micro-batch i of W processes with batches of b takes positions
i W b to (i + 1) W b, and process r the b of them from (i W + r) b on: together W processes take what one process with
batches of W b takes.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch


class Shard(NamedTuple):
    """One of the data-parallel processes."""

    rank: int = 0
    world: int = 1


def hashed(*values: int | str) -> int:
    """64 bits that depend on all values, and on nothing else: the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def digest(*parts: np.ndarray | list[str]) -> str:
    """Of arrays and lists of names: other contents, order or lengths have another one."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        array = np.array([os.fsencode(name) for name in part], bytes) if isinstance(part, list) else part
        found.update(repr((array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's CPU generators start from `seed` inside, and go on outside as if nothing was."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (timm draws from these)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would seed GPUs as well
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` things in an epoch: (count,) int64."""
    return np.random.default_rng(hashed("order", seed, epoch)).permutation(count)


def positions(batch: int, batch_size: int, shard: Shard) -> range:
    """Where in an epoch's order the images of a process's micro-batch stand."""
    first = (batch * shard.world + shard.rank) * batch_size
    return range(first, first + batch_size)


def augmentation_seeds(seed: int, epoch: int, where: range) -> list[int]:
    return [hashed("augmentation", seed, epoch, position) for position in where]


def size_of(sizes: list[int], seed: int, epoch: int, batch: int) -> int:
    """The image size of a micro-batch: the same for all processes."""
    return sizes[hashed("size", seed, epoch, batch) % len(sizes)]

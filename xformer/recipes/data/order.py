"""Order of images as a stateless function of (seed, epoch, position), independent of the images themselves.

There is one order of images per epoch. With W processes and batch size b, micro-batch i takes positions i W b to
(i + 1) W b, of which process r takes b starting at (i W + r) b: W processes together take the same images as a single
process with batch size W b.
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


class Replica(NamedTuple):
    """One of the data-parallel processes."""

    rank: int = 0
    world: int = 1


SINGLE = Replica()
"""The only process."""


def hashed(*values: int | str) -> int:
    """64-bit hash of all values: the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little")


def digest(*parts: np.ndarray | list[str]) -> str:
    """Digest of arrays and lists of names; depends on contents, order and lengths."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        array = np.array([os.fsencode(name) for name in part], bytes) if isinstance(part, list) else part
        found.update(repr((array.dtype.str, array.shape)).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def seed_all(*numbers: int) -> None:
    """Seed Python's, numpy's and torch's generators from several numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (timm's mixup draws from it)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager that seeds Python's, numpy's and torch's CPU generators, and restores their states on exit."""
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
    """Order of `count` items in an epoch: (count,) int64."""
    return np.random.default_rng(hashed("order", seed, epoch)).permutation(count)


def positions(batch: int, batch_size: int, replica: Replica) -> range:
    """Positions, in the order of an epoch, of the images of a process's micro-batch."""
    first = (batch * replica.world + replica.rank) * batch_size
    return range(first, first + batch_size)


def augmentation_seeds(seed: int, epoch: int, where: range) -> list[int]:
    return [hashed("augmentation", seed, epoch, position) for position in where]


def size_of(sizes: list[int], seed: int, epoch: int, batch: int) -> int:
    """Image size of a micro-batch, the same for all processes."""
    return sizes[hashed("size", seed, epoch, batch) % len(sizes)]

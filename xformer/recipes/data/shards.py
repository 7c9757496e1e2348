"""Batches from tar shards, which are read sequentially.

In each epoch the shards are shuffled and distributed over lanes; a lane shuffles samples within a buffer. The global
batch (of all processes) takes the same number of samples from each lane. Lanes depend on the global batch size and on
the shards, not on the number of processes: each process opens the lanes from which its part of the batch comes. One
thread per process reads; its workers receive encoded images to decode.

A lane that ends before the epoch does restarts, so that a few images occur twice and as many not at all. With few
shards there is a single lane, in which this does not happen, and all processes read all shards.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from xformer.errors import UsageError
from xformer.recipes.data.images import Skipped, open_image
from xformer.recipes.data.loader import Batch
from xformer.recipes.data.order import Replica, augmentation_seeds, hashed, permutation, positions, size_of
from xformer.recipes.data.tars import Sample, library, read_samples

STRETCH = 16
"""Number of samples, or the batch size if larger, of which at least one must be readable."""
BUFFER = 2048
"""Size of the shuffle buffer in samples, over all lanes."""
LANES = 64
SHARDS_OF_A_LANE = 8
"""Minimum number of shards per lane: shards differ in size, but lanes should be similar."""


class Samples:
    """A source whose items are the samples themselves."""

    def name(self, item: Sample) -> str:
        return item.name

    def read(self, item: Sample) -> tuple[Image.Image, int]:
        return open_image(item.image), item.label

    def others(self, batch: Batch, index: int) -> Iterable[Sample]:
        return itertools.chain(batch.items[index + 1 :], batch.spare, batch.items[:index])


# not webdataset's pipelines: global batches would depend on the number of processes
@dataclass
class Stream:
    """Training or evaluation shards, as read by one process (`replica`: its rank and the world size)."""

    urls: list[str]
    classes: int
    replica: Replica
    batch_size: int
    sizes: list[int]
    seed: int
    skipped: Skipped

    def train_batches(self, epoch: int, start: int, batches: int) -> Iterator[Batch]:
        """Yield batches `start` to `batches` of an epoch; earlier ones are read, but not decoded."""
        spare = max(0, STRETCH - self.batch_size)
        stream, ready = self._endless(epoch), deque[list[Sample]]()
        for index in range(batches):
            while len(ready) <= -(-spare // self.batch_size):
                ready.append(next(stream))
            items = ready.popleft()
            if index >= start:
                seeds = augmentation_seeds(self.seed, epoch, positions(index, self.batch_size, self.replica))
                size = size_of(self.sizes, self.seed, epoch, index)
                yield Batch(items, size, seeds, list(itertools.chain(*ready))[:spare])

    def eval_batches(self) -> Iterator[Batch]:
        """Each sample once over all processes; split by shards, or by samples if shards are fewer than processes."""
        rank, world = self.replica
        if len(self.urls) >= world:
            share = self._read(self.urls[rank::world])
        else:
            share = itertools.islice(self._read(self.urls), rank, None, world)
        while items := list(itertools.islice(share, self.batch_size)):
            yield Batch(items, self.sizes[0], [], [])

    def _read(self, urls: list[str]) -> Iterator[Sample]:
        return read_samples(urls, self.classes, self.skipped.add, self.skipped.add_shard)

    def _endless(self, epoch: int) -> Iterator[list[Sample]]:
        """Yield this process's part of each global batch, without end."""
        together = self.batch_size * self.replica.world
        lanes = number_of_lanes(together, len(self.urls))
        each = together // lanes
        own = range(self.replica.rank * self.batch_size, (self.replica.rank + 1) * self.batch_size)
        opened = [
            (slice(max(0, own.start - first), min(each, own.stop - first)), self._lane(epoch, lane, lanes))
            for lane, first in enumerate(range(0, together, each))
            if first < own.stop and own.start < first + each
        ]
        while True:
            yield [sample for part, lane in opened for sample in list(itertools.islice(lane, each))[part]]

    def _lane(self, epoch: int, lane: int, lanes: int) -> Iterator[Sample]:
        urls = [self.urls[shard] for shard in permutation(len(self.urls), self.seed, epoch)[lane::lanes]]
        room, rng = BUFFER // lanes, random.Random(hashed("lane", self.seed, epoch, lane))
        while True:
            sample = None
            for sample in library().shuffle(room, room, rng)(self._read(urls)):
                yield sample
            if sample is None:
                wrong = self.skipped.reasons | self.skipped.damaged or {urls[0]: ""}
                raise UsageError(no_samples(len(urls), " ".join(next(iter(wrong.items())))))


def no_samples(shards: int, such_as: str) -> str:
    return f"data: none of {shards} shards has images with labels, such as {such_as}"


def number_of_lanes(together: int, shards: int) -> int:
    """Largest number of lanes, up to LANES, that divides the global batch and leaves each lane enough shards."""
    most = max(1, min(LANES, shards // SHARDS_OF_A_LANE))
    return max(lanes for lanes in range(1, most + 1) if together % lanes == 0)

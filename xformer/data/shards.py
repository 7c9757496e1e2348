"""Batches of tar shards, which are read from front to back.

The shards of an epoch, in an order of its own, are dealt to lanes; a lane mixes samples within a buffer. Each batch of
all processes together takes the same number from each lane. Lanes depend on that batch and on the shards, not on how
many processes there are: each opens the lanes that its part of the batch comes from. One thread of a process reads; its
workers get files of images to decode.

A lane that ends before the epoch does starts again, so that a few images come twice and as many not at all. With few
shards there is one lane, in which this does not happen, and all processes read all shards.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from xformer.data.images import Skipped, open_image
from xformer.data.loader import Batch
from xformer.data.order import Shard, augmentation_seeds, hashed, permutation, positions, size_of
from xformer.data.tars import Sample, library, read_samples
from xformer.errors import UsageError

STRETCH = 16
"""Samples in which one must be readable, if a batch has not more of them."""
BUFFER = 2048
"""Samples of all lanes from which the next are drawn."""
LANES = 64
SHARDS_OF_A_LANE = 8
"""At least so many: shards differ in size, and lanes should not."""


class Samples:
    """A source whose items are samples themselves."""

    def name(self, item: Sample) -> str:
        return item.name

    def read(self, item: Sample) -> tuple[Image.Image, int]:
        return open_image(item.image), item.label

    def others(self, batch: Batch, index: int) -> Iterable[Sample]:
        return itertools.chain(batch.items[index + 1 :], batch.spare, batch.items[:index])


@dataclass
class Stream:
    """Shards of training or evaluation, and the place of this process among all."""

    urls: list[str]
    classes: int
    shard: Shard
    batch_size: int
    sizes: list[int]
    seed: int
    skipped: Skipped

    def train_batches(self, epoch: int, start: int, batches: int) -> Iterator[Batch]:
        """Batches `start` to `batches` of an epoch; those before are read, but not decoded."""
        spare = max(0, STRETCH - self.batch_size)
        stream, ready = self._endless(epoch), deque[list[Sample]]()
        for index in range(batches):
            while len(ready) <= -(-spare // self.batch_size):
                ready.append(next(stream))
            items = ready.popleft()
            if index >= start:
                seeds = augmentation_seeds(self.seed, epoch, positions(index, self.batch_size, self.shard))
                size = size_of(self.sizes, self.seed, epoch, index)
                yield Batch(items, size, seeds, list(itertools.chain(*ready))[:spare])

    def eval_batches(self) -> Iterator[Batch]:
        """Every sample once over all processes: by shards, or by samples where shards are fewer than processes."""
        rank, world = self.shard
        if len(self.urls) >= world:
            share = self._read(self.urls[rank::world])
        else:
            share = itertools.islice(self._read(self.urls), rank, None, world)
        while items := list(itertools.islice(share, self.batch_size)):
            yield Batch(items, self.sizes[0], [], [])

    def _read(self, urls: list[str]) -> Iterator[Sample]:
        return read_samples(urls, self.classes, self.skipped.add, self.skipped.add_shard)

    def _endless(self, epoch: int) -> Iterator[list[Sample]]:
        """What this process takes of each batch of all processes, batch by batch."""
        together = self.batch_size * self.shard.world
        lanes = number_of_lanes(together, len(self.urls))
        each = together // lanes
        own = range(self.shard.rank * self.batch_size, (self.shard.rank + 1) * self.batch_size)
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
    """The largest number that divides a batch of all processes and leaves each lane enough shards."""
    most = max(1, min(LANES, shards // SHARDS_OF_A_LANE))
    return max(lanes for lanes in range(1, most + 1) if together % lanes == 0)

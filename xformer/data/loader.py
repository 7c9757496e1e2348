"""Batches from sources of images, for any task: worker processes, and what stands in for unreadable images.

A :class:`Batch` says all that a worker needs, so that what comes out does not depend on which worker makes it, nor on
what was made before.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from xformer.data.images import Skipped, Unreadable
from xformer.data.order import seeded
from xformer.errors import UsageError


class Batch(NamedTuple):
    """What is to be loaded.

    items: of a source. size: pixels. seeds: of the augmentation of each image; none in evaluation, where nothing is
    drawn and unreadable images are left out. spare: items that may stand in for unreadable ones.
    """

    items: list[Any]
    size: int
    seeds: list[int]
    spare: list[Any]


class Source(Protocol):
    """Images and what is to be learned of each of them."""

    def name(self, item: Any) -> str:
        """As warnings say it."""

    def read(self, item: Any) -> tuple[Image.Image, Any]:
        """RGB image and target; raises Unreadable."""

    def others(self, batch: Batch, index: int) -> Iterable[Any]:
        """What stands in for ``batch.items[index]``, in this order: a long stretch, but not without end."""


Prepare = Callable[[Image.Image, Any, int, bool], Any]
"""(image, target, size, training) to what a batch is collated of, of one task; raises Unreadable as sources do."""


class Loaded(NamedTuple):
    batch: Any
    images: int
    skipped: list[tuple[str, str]]
    error: str


class Batches(Dataset[Loaded]):
    """`Batch` to `Loaded`. All that goes wrong is told in the result: errors of workers carry their tracebacks."""

    def __init__(self, source: Source, prepare: Prepare, collate: Callable[[list[Any]], Any]) -> None:
        self.source, self.prepare, self.collate = source, prepare, collate

    def __getitem__(self, batch: Batch) -> Loaded:
        skipped: dict[str, str] = {}
        samples = []
        for index, item in enumerate(batch.items):
            others = self.source.others(batch, index) if batch.seeds else ()
            found = self._first(itertools.chain((item,), others), batch, index, skipped)
            if found is not None:
                samples.append(found[0])
            elif batch.seeds:
                name = self.source.name(item)
                return Loaded(None, 0, list(skipped.items()), f"none of the images from {name} on can be read")
        return Loaded(self.collate(samples) if samples else None, len(samples), list(skipped.items()), "")

    def _first(self, items: Iterable[Any], batch: Batch, index: int, skipped: dict[str, str]) -> tuple[Any] | None:
        """The first of some items that can be read and prepared."""
        for item in items:
            try:
                return (self._prepared(*self.source.read(item), batch, index),)
            except Unreadable as error:
                skipped[self.source.name(item)] = f"{error}"
        return None

    def _prepared(self, image: Image.Image, target: Any, batch: Batch, index: int) -> Any:
        if not batch.seeds:
            return self.prepare(image, target, batch.size, False)
        with seeded(batch.seeds[index]):
            return self.prepare(image, target, batch.size, True)


class Loader:
    """Runs batches through worker processes, which stay for the next run; in this process if `workers` is 0."""

    def __init__(self, dataset: Batches, workers: int, skipped: Skipped) -> None:
        self.dataset, self.workers, self.skipped = dataset, workers, skipped
        self._plan = _Plan()
        self._kept: DataLoader[Loaded] | None = None
        self._busy = False

    def run(self, batches: Iterator[Batch]) -> Iterator[Any]:
        """What is collated of each batch; nothing for batches of evaluation of which no image can be read.

        Raises:
            UsageError: no image of a long stretch of training, or of all batches, can be read; or what `batches` raise.
        """
        if self._busy:  # a second run beside the first has workers of its own
            yield from Loader(self.dataset, self.workers, self.skipped).run(batches)
            return
        if self._kept is None:
            self._kept = self._create()
        self._plan.batches = batches
        self._busy, images, unreadable, mistake = True, 0, 0, ""
        try:
            for loaded in self._kept:
                for name, reason in loaded.skipped:
                    self.skipped.add(name, reason)
                images, unreadable, mistake = images + loaded.images, unreadable + len(loaded.skipped), loaded.error
                if mistake:
                    break
                if loaded.images:
                    yield loaded.batch
        finally:
            self._busy = False
        if unreadable and not images:
            mistake = mistake or f"none of the {unreadable} images can be read, such as {self.skipped.names[-1]}"
        mistake = mistake or self._plan.mistake
        if mistake:
            self._kept = None  # ends its processes, in order, which the garbage collector would not do
            raise UsageError(mistake)

    def first(self, batches: Iterator[Batch], stretch: int) -> Any:
        """What is collated of the first readable image of evaluation, read in this process; None if there is no image.

        Raises:
            UsageError: none of the first images, `stretch` of them at most, can be read.
        """
        tried = 0
        items = (batch._replace(items=[item]) for batch in batches for item in batch.items)
        for one in itertools.islice(items, stretch):
            loaded = self.dataset[one]
            if loaded.images:
                return loaded.batch
            for name, reason in loaded.skipped:
                self.skipped.add(name, reason)
            tried += 1
        if tried:
            raise UsageError(
                f"none of the first {tried} evaluation images can be read, such as {self.skipped.names[-1]}"
            )
        return None

    def _create(self) -> DataLoader[Loaded]:
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=self._plan,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            worker_init_fn=_start_worker,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of its own: otherwise each epoch draws from the global one
        )


class _Plan:
    """The batches of the next run, as the sampler of a data loader that outlives it.

    A mistake found on the way ends the batches and is kept: raised here, it would leave worker processes half started.
    """

    batches: Iterator[Batch]
    mistake = ""

    def __iter__(self) -> Iterator[Batch]:
        self.mistake = ""
        try:
            yield from self.batches
        except UsageError as error:
            self.mistake = f"{error}"


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what an interrupt ends

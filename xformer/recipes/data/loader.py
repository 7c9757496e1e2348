"""Load batches from image sources, for any task, with worker processes and replacement of unreadable images.

A :class:`Batch` contains all that a worker needs, so that the result does not depend on which worker loads it, nor on
what was loaded before.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from xformer.errors import UsageError
from xformer.recipes.data.images import Skipped, Unreadable
from xformer.recipes.data.order import seeded


class Batch(NamedTuple):
    """Description of a batch to load.

    items: items of a source. size: image size in pixels. seeds: augmentation seed of each image; empty in evaluation,
    where there is no augmentation and unreadable images are skipped. spare: items that may replace unreadable ones.
    """

    items: list[Any]
    size: int
    seeds: list[int]
    spare: list[Any]


class Source(Protocol):
    """Images and their targets."""

    def name(self, item: Any) -> str:
        """Name used in warnings."""

    def read(self, item: Any) -> tuple[Image.Image, Any]:
        """RGB image and target; raises Unreadable."""

    def others(self, batch: Batch, index: int) -> Iterable[Any]:
        """Replacements for ``batch.items[index]`` if it is unreadable, in this order; many, but finitely many."""


SampleTransform = Callable[[Image.Image, Any, int, bool], Any]
"""(image, target, size, training) to the sample that is collated; specific to a task. May raise Unreadable."""


class Loaded(NamedTuple):
    batch: Any
    images: int
    skipped: list[tuple[str, str]]
    error: str


class Batches(Dataset[Loaded]):
    """`Batch` to `Loaded`. Errors are returned in the result, since exceptions in workers would include tracebacks."""

    def __init__(self, source: Source, prepare: SampleTransform, collate: Callable[[list[Any]], Any]) -> None:
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
        """Return the first item that can be read and prepared, as a 1-tuple; None if there is none."""
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


# not torchdata's StatefulDataLoader: there is no state, and the number of workers may change on resume
class Loader:
    """Loads batches in worker processes, which are kept for the next run; in this process if `workers` is 0."""

    def __init__(self, dataset: Batches, workers: int, skipped: Skipped) -> None:
        self.dataset, self.workers, self.skipped = dataset, workers, skipped
        self._plan = _Plan()
        self._kept: DataLoader[Loaded] | None = None
        self._busy = False

    def run(self, batches: Iterator[Batch]) -> Iterator[Any]:
        """Yield the collated batches; evaluation batches without any readable image are skipped.

        Raises:
            UsageError: no readable image among an image's replacements in training, or in any batch; or raised by
                `batches`.
        """
        if self._busy:  # a concurrent run uses separate workers
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
            self._kept = None  # shuts down the workers in order, which the garbage collector would not
            raise UsageError(mistake)

    def first(self, batches: Iterator[Batch], stretch: int) -> Any:
        """Return a batch of the first readable evaluation image, read in this process; None if there are no images.

        Raises:
            UsageError: none of the first `stretch` images can be read.
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
            generator=torch.Generator(),  # otherwise each epoch draws from the global generator
        )


class _Plan:
    """Sampler that yields the batches of the next run, for a data loader that is kept across runs.

    A UsageError of `batches` ends the iteration and is stored: raising it here would leave workers partly started.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # interrupts are handled by the main process

"""Samples of tar shards as WebDataset writes them: where shards are, what is in them, how many samples they have."""

from __future__ import annotations

import glob
import json
import logging
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xformer.errors import UsageError

logger = logging.getLogger("xformer.data")

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
LABEL = "cls"

Report = Callable[[str, str], None]
"""(name, reason) of what cannot be read."""


class Sample(NamedTuple):
    """A file of an image, not decoded, and its label."""

    name: str
    image: bytes
    label: int


def library() -> Any:
    try:
        import webdataset
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError as error:
        raise UsageError("tar shards need webdataset: pip install 'xformer-kernels[train]'") from error
    return webdataset


def is_remote(url: str) -> bool:
    return "://" in url or url.startswith("pipe:")


def find_shards(setting: str, pattern: str, root: str) -> list[str]:
    """Paths and URLs of `pattern`, whose braces and asterisks expand, inside the folder or URL `root`.

    Raises:
        UsageError: there are none, or not all; `setting` is the one that says which.
    """
    found: list[str] = []
    for url in library().shardlists.expand_urls(pattern):
        if is_remote(url):
            found.append(url)
        elif is_remote(root):
            found.append(f"{root.rstrip('/')}/{url}")
        else:
            paths = sorted(glob.glob(str(Path(root, url)))) or [str(Path(root, url))]
            missing = [path for path in paths if not Path(path).is_file()]
            if missing:
                raise UsageError(f"{setting} must name tar shards that exist, but there is no {missing[0]}")
            found += paths
    return found


def read_samples(urls: Iterable[str], classes: int, report: Report) -> Iterator[Sample]:
    """The samples of shards in order; what cannot be read of a shard is reported, and the next one follows.

    Raises:
        UsageError: a label that is no number, or not below `classes`.
    """
    read = library().tariterators.tarfile_samples
    for url in urls:

        def handler(error: Exception, url: str = url) -> bool:
            report(url, f"{error.args[0]}" if error.args else type(error).__name__)
            return True

        for raw in read([{"url": url}], handler=handler):
            sample = _sample(raw, report)
            if sample is None:
                continue
            if sample.label >= classes:
                raise UsageError(
                    f"labels must be below {classes}, the number of classes, got {sample.label} of {sample.name}"
                )
            yield sample


def _sample(raw: dict[str, Any], report: Report) -> Sample | None:
    """An image and its label of the files of one name."""
    name = f"{raw['__url__']}/{raw['__key__']}"
    image = next((raw[key] for key in IMAGES if key in raw), None)
    if image is None or LABEL not in raw:
        report(name, f"has no {'label (.cls)' if image is not None else 'image'}")
        return None
    text = raw[LABEL].decode(errors="replace").strip()
    if not text.isdecimal():
        raise UsageError(f"labels must be numbers from 0 on, got {text!r} of {name}")
    return Sample(name, image, int(text))


def count_samples(paths: Iterable[str]) -> tuple[int, int]:
    """Number of samples and of classes (one more than the largest label) of local shards; reads labels alone.

    Raises:
        UsageError: a label that is no number.
    """
    samples = classes = 0
    for path in paths:
        for raw in library().tariterators.group_by_keys(_labels(path), handler=lambda error: True):
            sample = _sample(raw, lambda name, reason: None)
            if sample is not None:
                samples, classes = samples + 1, max(classes, sample.label + 1)
    return samples, classes


def _labels(path: str) -> Iterator[dict[str, Any]]:
    """The files of a tar as webdataset groups them, those of images without what is in them."""
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.isreg():
                    file = tar.extractfile(entry) if entry.name.endswith(f".{LABEL}") else None
                    yield {"fname": entry.name, "data": file.read() if file else b"", "__url__": path}
    except (tarfile.TarError, OSError, EOFError) as error:
        logger.warning("counted only a part of %s: %s", path, error)


def said_sizes(paths: Iterable[str]) -> int | None:
    """Samples of shards by ``_info.json`` (shard_lengths of splits) or ``sizes.json`` ({name: number}) beside them."""
    total = 0
    known: dict[Path, dict[str, int]] = {}
    for path in map(Path, paths):
        if path.parent not in known:
            known[path.parent] = _said_in(path.parent)
        if path.name not in known[path.parent]:
            return None
        total += known[path.parent][path.name]
    return total


def _said_in(folder: Path) -> dict[str, int]:
    said: dict[str, int] = {}
    try:
        if (folder / "sizes.json").is_file():
            said.update(json.loads((folder / "sizes.json").read_text()))
        if (folder / "_info.json").is_file():
            for split in json.loads((folder / "_info.json").read_text())["splits"].values():
                said.update(zip(split["filenames"], split["shard_lengths"], strict=True))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"data: sizes.json or _info.json of {folder} is not as expected: {error!r}") from error
    return said

"""Tar shards in WebDataset format: finding shards, reading samples and counting them."""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xformer.errors import UsageError
from xformer.recipes.data.images import notice
from xformer.recipes.data.order import Replica

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
LABEL = "cls"

Report = Callable[[str, str], None]
"""Called with (name, reason) for what cannot be read."""


class Sample(NamedTuple):
    """An encoded image and its label."""

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
    """Expand braces and asterisks of `pattern` to paths and URLs, relative to the folder or URL `root`.

    Raises:
        UsageError: missing shards; the message names `setting`.
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


def read_samples(urls: Iterable[str], classes: int, report: Report, damaged: Report) -> Iterator[Sample]:
    """Yield the samples of shards in order; what cannot be read is reported and skipped.

    Args:
        classes: number of classes. report: called for incomplete samples. damaged: called for damaged shards.

    Raises:
        UsageError: a label that is not a number below `classes`, or a sample whose files are not consecutive.
    """
    read = library().tariterators.tarfile_samples
    for url in urls:
        count, lost = 0, False

        def handler(error: Exception, url: str = url) -> bool:
            nonlocal lost
            lost = True
            said = f"{error.args[0]}".partition(" @ ")[0] if error.args else type(error).__name__
            damaged(url, f"{said} after {count} samples, and what comes behind is lost")  # noqa: B023
            return True

        incomplete: dict[str, bool] = {}
        last: list[tuple[str, str]] = []  # if a shard is truncated, so is its last sample: not reported twice
        for raw in read([{"url": url}], handler=handler):
            for said in last:
                report(*said)
            last.clear()
            for sample in _samples(raw, lambda *said: last.append(said), incomplete):  # noqa: B023
                if sample.label >= classes:
                    raise UsageError(
                        f"labels must be below {classes}, the number of classes, got {sample.label} of {sample.name}"
                    )
                count += 1
                yield sample
        if not lost and _is_cut_off(url):
            lost = True
            damaged(url, f"it ends without the mark of its end after {count} samples: it is cut off")
        if not lost:
            for said in last:
                report(*said)


def _is_cut_off(url: str) -> bool:
    """Whether a local, uncompressed tar lacks the two blocks of zeros at its end."""
    if is_remote(url):
        return False
    with open(url, "rb") as file:
        plain = file.read(262)[257:] == b"ustar"
        file.seek(max(0, os.path.getsize(url) - 1024))
        return plain and any(file.read())


def _samples(raw: dict[str, Any], report: Report, incomplete: dict[str, bool]) -> Iterator[Sample]:
    """Yield the samples in a group of files, whose names are the same up to the first dot.

    A group is usually one sample: an image and a label, or ``input.png`` and ``cls``. With dots in names, such as
    ``a.1.png``, ``a.1.cls``, ``a.2.png``, ..., each pair is a sample. `incomplete`: previous groups of the shard that
    lack an image (False) or a label (True).
    """
    name = f"{raw['__url__']}/{raw['__key__']}"
    files = {suffix: content for suffix, content in raw.items() if not suffix.startswith("__")}
    images: dict[str, bytes] = {}
    labels: dict[str, bytes] = {}
    for suffix in sorted(files, key=lambda suffix: IMAGES.index(ending(suffix)) if ending(suffix) in IMAGES else 0):
        stem = suffix.removesuffix(ending(suffix)).removesuffix(".")
        if ending(suffix) in IMAGES:
            images.setdefault(stem, files[suffix])
        elif ending(suffix) == LABEL:
            labels[stem] = files[suffix]
    pairs: list[tuple[str, bytes, bytes]]
    if len(images) == len(labels) == 1:
        pairs = [(name, next(iter(images.values())), next(iter(labels.values())))]
    elif "" in images and "" in labels:
        pairs = [(name, images[""], labels[""])]
    else:
        pairs = [(f"{name}.{stem}", images[stem], labels[stem]) for stem in images if stem in labels]
    if not pairs:
        if incomplete.setdefault(name, bool(images)) != bool(images):
            raise UsageError(
                f"data: the files of a sample must follow each other in a shard, as tar --sort=name puts them, but "
                f"those of {name} are apart"
            )
        missing = "image" if not images else "label (.cls)" if not labels else "label (.cls) of the name of an image"
        report(name, f"has no {missing}: it has {', '.join(sorted(files)[:5])}")
    for whole_name, image, label in pairs:
        text = label.decode("utf-8-sig", errors="replace").strip()
        if not text.isdecimal():
            raise UsageError(f"labels must be numbers from 0 on, got {text!r} of {whole_name}")
        yield Sample(whole_name, image, int(text))


def ending(name: str) -> str:
    return name.rpartition(".")[2]


def count_samples(paths: Iterable[str], replica: Replica) -> tuple[int, int, str]:
    """Number of samples and classes (largest label + 1) of local shards; only reads labels.

    Also returns a message about the first incomplete sample, empty if there is none.

    Raises:
        UsageError: a label that is not a number, or a sample whose files are not consecutive.
    """
    samples = classes = 0
    wrong: list[str] = []

    def report(name: str, reason: str) -> None:
        if not wrong:
            wrong.append(f"{name} {reason}")

    for path in paths:
        incomplete: dict[str, bool] = {}
        for raw in library().tariterators.group_by_keys(_labels(path, replica), handler=lambda error: True):
            for sample in _samples(raw, report, incomplete):
                samples, classes = samples + 1, max(classes, sample.label + 1)
    return samples, classes, "".join(wrong)


def _labels(path: str, replica: Replica) -> Iterator[dict[str, Any]]:
    """Yield the files of a tar in the format that webdataset groups, with contents of label files only."""
    try:
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.isreg():
                    file = tar.extractfile(entry) if entry.name.lower().endswith(f".{LABEL}") else None
                    yield {"fname": entry.name, "data": file.read() if file else b"", "__url__": path}
    except (tarfile.TarError, OSError, EOFError) as error:
        notice(replica, "counted only a part of %s: %s", path, error)


def said_sizes(paths: Iterable[str]) -> int | None:
    """Total samples by ``_info.json`` (shard_lengths of splits) or ``sizes.json`` ({name: number}) beside the shards.

    None if these do not list all shards.
    """
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
            said.update(json.loads((folder / "sizes.json").read_bytes()))
        if (folder / "_info.json").is_file():
            for split in json.loads((folder / "_info.json").read_bytes())["splits"].values():
                said.update(zip(split["filenames"], split["shard_lengths"], strict=True))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"data: sizes.json or _info.json of {folder} is not as expected: {error!r}") from error
    for name, number in said.items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UsageError(
                f"data: sizes.json or _info.json of {folder} must have a number of samples for {name}, got {number!r}"
            )
    return said

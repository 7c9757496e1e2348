"""Atomic file writes, locks of folders, and JSON."""

from __future__ import annotations

import fcntl
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xformer.errors import UsageError

PART = ".part-"
"""Prefix of file and folder names until they are complete."""


def sync_folder(path: Path) -> None:
    """Flush a folder to disk, which makes renames in it durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(setting: str, path: str | Path) -> None:
    """Create a folder. Raises UsageError, naming `setting`, if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{setting}: there can be no folder {path}: {error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes."""
    part = path.with_name(f"{PART}{path.name}")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(setting: str, path: str | Path) -> Iterator[None]:
    """Convert write errors (no space, no permission) to a UsageError that names `setting`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{setting}: {path} cannot be written: {error}") from error


@contextmanager
def held(setting: str, folder: str | Path) -> Iterator[None]:
    """Lock a folder for one process at a time. The lock is released when the process ends.

    Raises:
        UsageError: another process holds the lock.
    """
    path = Path(folder) / ".lock"
    with writing(setting, path):
        file = open(path, "a")  # noqa: SIM115 (open as long as the folder is held)
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # per process: workers do not inherit it
        except BlockingIOError as error:
            raise UsageError(f"{setting}: another run is writing in {folder}: name another folder") from error
        except OSError:  # a file system without locks
            pass
        yield


def write_file(setting: str, path: str | Path, content: str | bytes) -> None:
    """Write atomically, to an existing folder. Raises UsageError, naming `setting`, if that fails."""
    with writing(setting, path):
        write_atomically(Path(path), content)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number: a float, or an integer within the range of floats."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def to_json(content: Any, indent: int | None = None) -> str:
    """Serialise to JSON; non-finite numbers, which JSON does not have, become null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(setting: str, path: str | Path, content: Any) -> None:
    """:func:`write_file` of :func:`to_json`."""
    write_file(setting, path, to_json(content, indent=1) + "\n")

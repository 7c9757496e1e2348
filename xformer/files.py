"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from xformer.errors import UsageError

PART = ".part-"
"""What names begin with until the file or folder is whole."""


def sync_folder(path: Path) -> None:
    """A rename is on the disk when its folder is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(setting: str, path: str | Path) -> None:
    """Raises UsageError, by the name of the setting, where there can be no such folder."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{setting}: there can be no folder {path}: {error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Text in UTF-8, or bytes."""
    part = path.with_name(f"{PART}{path.name}")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_file(setting: str, path: str | Path, content: str | bytes) -> None:
    """Atomically, in a folder that exists. Raises UsageError, by the name of the setting, where it cannot be."""
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise UsageError(f"{setting}: {path} cannot be written: {error}") from error


def write_json(setting: str, path: str | Path, content: Any) -> None:
    """As :func:`write_file`."""
    write_file(setting, path, json.dumps(content, indent=1) + "\n")

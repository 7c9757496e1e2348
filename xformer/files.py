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


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f"{PART}{path.name}")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(setting: str, path: str | Path, content: Any) -> None:
    """Raises UsageError, by the name of the setting, where there can be no such file."""
    try:
        write_atomically(Path(path), json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UsageError(f"{setting}: {path} cannot be written: {error}") from error

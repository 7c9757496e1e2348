"""Pictures written by ``predict``: colours, file names, and checks that only earlier pictures are overwritten."""

from __future__ import annotations

import colorsys
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from xformer.errors import UsageError
from xformer.files import write_file

if TYPE_CHECKING:
    from PIL import Image

SOFTWARE = "xformer predict"
"""PNG text entry ``Software`` of the pictures."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def colour(number: int) -> tuple[int, int, int]:
    """Fixed RGB colour of a class index: hues are spaced by the golden ratio, so that a few classes differ strongly."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(0.6180339887 * number % 1, 0.85, 0.95))
    return red, green, blue


def identity(path: str | Path) -> str:
    """Canonical form of a path: links to folders are resolved, but a link to a file stays a file of its own."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def is_picture(path: str | Path) -> bool:
    """Whether a file is a PNG written by :func:`write_picture`."""
    wanted = b"Software\0" + SOFTWARE.encode()
    try:
        with open(path, "rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                return False
            while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
                length = int.from_bytes(head[:4], "big")
                if head[4:] == b"tEXt" and length == len(wanted):
                    if file.read(length) == wanted:
                        return True
                    length = 0
                file.seek(length + 4, os.SEEK_CUR)  # 4 of the checksum
    except OSError:
        pass
    return False


def picture_paths(out: str | Path, images: Iterable[str | Path]) -> list[Path]:
    """Paths of the pictures in `out`, by the paths of the images relative to their common folder.

    The extension is replaced by ``.png``. If that makes two names equal, as for a.jpg and a.png, it is appended
    instead: a.jpg.png and a.png.png.
    """
    whole = [Path(identity(image)) for image in images]
    if not whole:
        return []
    common = os.path.commonpath([path.parent for path in whole])
    paths = [path.relative_to(common) for path in whole]
    names = [path.with_name(f"{path.stem}.png") for path in paths]
    while True:
        counts = Counter(names)
        folders = {parent for name in names for parent in name.parents}
        longer = [
            path.with_name(f"{path.name}.png") if counts[name] > 1 or name in folders else name
            for path, name in zip(paths, names, strict=True)
        ]
        if longer == names:
            return [Path(out) / name for name in names]
        names = longer


def check_files(pictures: Mapping[str, Path], json: str, read: Iterable[str]) -> None:
    """Check that no file would be overwritten by mistake.

    Args:
        pictures: paths of pictures by image.
        json: JSON file to write, or "".
        read: all files that are read.

    Raises:
        UsageError: a picture would overwrite an input file, or an existing file that is not an earlier picture; the
            JSON would overwrite an input file or a picture.
    """
    taken = {Path(path).resolve() for path in read if path}
    for image, picture in pictures.items():
        if picture.resolve() in taken:
            raise UsageError(f"out: the picture of {image} would replace {picture}: name another folder")
        check_picture(picture)
    if json and Path(json).resolve() in {*taken, *(picture.resolve() for picture in pictures.values())}:
        raise UsageError(f"json: it would replace {json}: name another file")


def check_picture(path: Path) -> None:
    """Raise UsageError if `path` exists and is not a picture of an earlier call."""
    if os.path.lexists(path) and not is_picture(path):
        raise UsageError(f"out: {path} is there and was not written by predict: remove it or name another folder")


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG to an existing folder; raises UsageError as :func:`check_picture`, or if it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    check_picture(path)
    said = PngInfo()
    said.add_text("Software", SOFTWARE)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=said)
    write_file("out", path, file.getvalue())

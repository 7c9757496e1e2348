"""Pictures that ``predict`` draws: their colours, their names, and that they replace nothing but earlier ones."""

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
"""PNG's text ``Software`` of what is written here."""
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def colour(number: int) -> tuple[int, int, int]:
    """RGB of a class, always the same: hues a golden section apart, so that few classes differ much."""
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(0.6180339887 * number % 1, 0.85, 0.95))
    return red, green, blue


def identity(path: str | Path) -> str:
    """The same for all ways to write a path. A link to a file is another file; folders count as where they are."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def is_picture(path: str | Path) -> bool:
    """Whether a file is a PNG that :func:`write_picture` wrote."""
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
    """Where images are drawn: in `out`, by their paths from the folder that all of them are in.

    ``.png`` takes the place of the extension. Where that gives two of them one name, as of a.jpg and a.png, it is
    added to the extension instead: a.jpg.png and a.png.png.
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
    """That no file is written over another one.

    Args:
        pictures: by the image of which they are.
        json: another file that is written, or "".
        read: all files that are read.

    Raises:
        UsageError: a picture that would replace a file which is read, or any other that is not a picture of an earlier
            call; a JSON that would replace what is read or drawn.
    """
    taken = {Path(path).resolve() for path in read if path}
    for image, picture in pictures.items():
        if picture.resolve() in taken:
            raise UsageError(f"out: the picture of {image} would replace {picture}: name another folder")
        check_picture(picture)
    if json and Path(json).resolve() in {*taken, *(picture.resolve() for picture in pictures.values())}:
        raise UsageError(f"json: it would replace {json}: name another file")


def check_picture(path: Path) -> None:
    """Raises UsageError if there is something of this name that is not a picture of an earlier call."""
    if os.path.lexists(path) and not is_picture(path):
        raise UsageError(f"out: {path} is there and was not written by predict: remove it or name another folder")


def write_picture(path: Path, picture: Image.Image) -> None:
    """As PNG, in a folder that exists; raises UsageError as :func:`check_picture`, or where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    check_picture(path)
    said = PngInfo()
    said.add_text("Software", SOFTWARE)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=said)
    write_file("out", path, file.getvalue())

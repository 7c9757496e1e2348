"""Images read and pictures written by ``predict``: file names, colours, checks that nothing else is overwritten."""

from __future__ import annotations

import colorsys
import glob
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from xformer.errors import UsageError
from xformer.recipes.data.files import SYSTEM, image_extensions, images_in
from xformer.recipes.files import write_file

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
    check_picture(path)
    said = PngInfo()
    said.add_text("Software", SOFTWARE)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=said)
    write_file("out", path, file.getvalue())


def find_images(arguments: Sequence[str]) -> list[str]:
    """Return image paths in the order of the arguments, without duplicates.

    A file is returned unchanged, whether it exists or not. A folder stands for all images in it, recursively and
    sorted, with the same extensions as in training and without hidden files. A pattern stands for the matching files,
    sorted, and the images in matching folders; if it does not end with an extension, only files with image extensions
    match. Folders and patterns skip pictures written by ``predict``.

    Raises:
        UsageError: a folder without images, a pattern without matches, or an empty argument.
    """
    found: dict[str, str] = {}
    for argument in arguments:
        if not argument:
            raise UsageError("images must be files, folders or patterns such as 'photos/*.jpg', got ''")
        if os.path.isdir(argument):
            paths = _of_folder(argument)
            if not paths:
                raise UsageError(f"images: there are no images in the folder {argument}, nor in folders within")
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            paths = _of_pattern(argument)
            if not paths:
                raise UsageError(f"images: the pattern {argument} matches no images")
        else:
            paths = [argument]
        for path in paths:
            found.setdefault(identity(path), path)
    return list(found.values())


def _of_folder(folder: str) -> list[str]:
    root = os.path.realpath(folder)
    paths = [path for path in images_in(Path(root), Counter()) if not is_picture(path)]
    return [os.path.join(folder, os.path.relpath(path, root)) for path in paths]


def _of_pattern(pattern: str) -> list[str]:
    ending = os.path.splitext(os.path.basename(pattern))[1]
    any_file = bool(ending) and not glob.has_magic(ending)
    unasked = set(SYSTEM) - set(Path(pattern).parts)
    extensions = image_extensions()
    paths: list[str] = []
    for path in sorted(glob.glob(pattern, recursive=True)):
        if unasked & set(Path(path).parts):
            continue
        if os.path.isdir(path):
            paths += _of_folder(path)
        elif (any_file or path.lower().endswith(extensions)) and not is_picture(path):
            paths.append(path)
    return paths

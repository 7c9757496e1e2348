"""Find the images named on the command line: files, folders and glob patterns."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from xformer.errors import UsageError
from xformer.pictures import identity, is_picture


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
    from xformer.data.files import images_in

    root = os.path.realpath(folder)
    paths = [path for path in images_in(Path(root), Counter()) if not is_picture(path)]
    return [os.path.join(folder, os.path.relpath(path, root)) for path in paths]


def _of_pattern(pattern: str) -> list[str]:
    from xformer.data.files import SYSTEM, image_extensions

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

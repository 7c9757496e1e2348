"""Decode files to 8-bit RGB images, and keep a list of those that cannot be decoded."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from xformer.recipes.data.order import Replica

logger = logging.getLogger("xformer.recipes.data")

SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats in which Pillow's mode I holds 16-bit integers; in others, such as TIFF, it holds 32-bit ones."""
ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
TURNED = "turned"
"""Key in an image's ``info``; see :func:`open_image`."""


class Unreadable(Exception):
    """An image cannot be decoded; the message says why."""


class Skipped:
    """Unreadable images and shards, each logged once as a warning and kept here with the reason.

    reasons: of images that cannot be decoded, by name. damaged: of shards that cannot be read completely, by URL.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.damaged: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        return list(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            logger.warning("skipped %s: %s", name, reason)

    def add_shard(self, url: str, reason: str) -> None:
        if url not in self.damaged:
            self.damaged[url] = reason
            logger.warning("damaged shard %s: %s", url, reason)

    def said(self) -> str:
        """Summary, to be appended to a line of the log; empty if nothing was skipped."""
        images = f", {self.count} unreadable images skipped" if self.count else ""
        return images + (f", {len(self.damaged)} shards damaged" if self.damaged else "")


def notice(replica: Replica, text: str, *values: object) -> None:
    """Log a warning about the whole data set, in the process of rank 0 only."""
    if replica.rank == 0:
        logger.warning(text, *values)


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open a file or bytes as RGB, transposed to upright by EXIF. Alpha is dropped; of 16 bits the upper 8 are kept.

    ``info[TURNED]`` of the image is the original EXIF orientation; 1 means that the image was upright. 32-bit integers
    are interpreted as 8 or 16 bits, and floats as 0 to 1 or 0 to 255, depending on their maximum.

    Raises:
        Unreadable: not an image, a truncated one, more pixels than Pillow's limit, or values outside these ranges.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS)
            upright, turned = _upright(image)
            rgb = to_rgb(upright, deep)
            rgb.info[TURNED] = turned
            return rgb
    except Image.UnidentifiedImageError as error:
        raise Unreadable("no image, or of an unknown format") from error
    except Unreadable:
        raise
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise Unreadable(f"{error}" or type(error).__name__) from error


def check_resized(height: float, width: float) -> None:
    """Check the size that an image is about to be resized to.

    Raises:
        Unreadable: more pixels than Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise Unreadable(f"resized it would have {height:.0f} x {width:.0f} pixels, and Pillow's limit is {limit}")


def to_rgb(image: Image.Image, deep: bool = True) -> Image.Image:
    """Convert an image of any Pillow mode to RGB. `deep`: integers are 16-bit, whatever their values."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_bytes(np.asarray(image), deep))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _bytes(values: np.ndarray, deep: bool) -> np.ndarray:
    """Convert the values of a grayscale image to uint8."""
    least, most = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    if not (least >= 0 and most < (65536 if whole else 256)):
        accepted = "from 0 to 65535" if whole else "from 0 to 1 or to 255"
        raise Unreadable(f"its numbers must be {accepted}, got {least:g} to {most:g}")
    if whole:
        return (values.astype(np.int64) >> (8 if deep or most > 255 else 0)).astype(np.uint8)
    return np.round(values * (255 if most <= 1 else 1)).clip(0, 255).astype(np.uint8)


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    """Return the image transposed to upright by EXIF, and its original EXIF orientation, 1 to 8; 1 if upright."""
    try:
        number = image.getexif().get(ORIENTATION, 1)
        return (ImageOps.exif_transpose(image), number) if number in range(2, 9) else (image, 1)
    except Exception:  # invalid EXIF does not make the image invalid
        return image, 1

"""Files to images, all of them 8 bits RGB, and the list of those that are none."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from xformer.data.order import Shard

logger = logging.getLogger("xformer.data")

SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
"""Formats whose integers are of 16 bits; others, such as TIFF, have 32."""
ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""
TURNED = "turned"
"""Key of an image's ``info``."""


class Unreadable(Exception):
    """What should be an image does not decode; the message says why."""


class Skipped:
    """What could not be read, each named once, with the reason: in a warning of the log, and here.

    reasons: of images that did not decode. damaged: of shards that did not, or only in part.
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
        """As the end of a line of the log; empty if there is nothing."""
        images = f", {self.count} unreadable images skipped" if self.count else ""
        return images + (f", {len(self.damaged)} shards damaged" if self.damaged else "")


def notice(shard: Shard, text: str, *values: object) -> None:
    """A warning of the log on the data as a whole: of one of the data-parallel processes, which all see it."""
    if shard.rank == 0:
        logger.warning(text, *values)


def open_image(source: str | Path | bytes) -> Image.Image:
    """A file or its bytes as an RGB image, upright as EXIF says. Alpha is dropped, 16 bits become their upper 8.

    ``info[TURNED]`` of the image is EXIF's number of how it was turned; 1: it was not.
    Integers of 32 bits are taken as 8 or as 16 bits, and floats as of 0 to 1 or of 0 to 255, by their largest value.

    Raises:
        Unreadable: it is no image, not a whole one, one of so many pixels that Pillow refuses it, or one of numbers
            that are in none of these ranges.
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
    """Of what an image is about to become.

    Raises:
        Unreadable: more pixels than Pillow's own limit, ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > limit:
        raise Unreadable(f"resized it would have {height:.0f} x {width:.0f} pixels, and Pillow's limit is {limit}")


def to_rgb(image: Image.Image, deep: bool = True) -> Image.Image:
    """An image of any of Pillow's modes as RGB. `deep`: integers are of 16 bits, whatever their values."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_bytes(np.asarray(image), deep))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _bytes(values: np.ndarray, deep: bool) -> np.ndarray:
    """Numbers of a gray image to uint8."""
    least, most = float(values.min()), float(values.max())
    whole = values.dtype.kind in "iu"
    if not (least >= 0 and most < (65536 if whole else 256)):
        accepted = "from 0 to 65535" if whole else "from 0 to 1 or to 255"
        raise Unreadable(f"its numbers must be {accepted}, got {least:g} to {most:g}")
    if whole:
        return (values.astype(np.int64) >> (8 if deep or most > 255 else 0)).astype(np.uint8)
    return np.round(values * (255 if most <= 1 else 1)).clip(0, 255).astype(np.uint8)


def _upright(image: Image.Image) -> tuple[Image.Image, int]:
    """An image as EXIF says, and EXIF's number from 1 to 8 of how it was turned; 1: it was not."""
    try:
        number = image.getexif().get(ORIENTATION, 1)
        return (ImageOps.exif_transpose(image), number) if number in range(2, 9) else (image, 1)
    except Exception:  # EXIF that does not parse says nothing about the image
        return image, 1

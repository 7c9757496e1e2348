"""Files to images, all of them 8 bits RGB, and the list of those that are none."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

logger = logging.getLogger("xformer.data")

ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""


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


def open_image(source: str | Path | bytes) -> Image.Image:
    """A file or its bytes as an RGB image, upright as EXIF says. Alpha is dropped, 16 bits become their upper 8.

    Raises:
        Unreadable: it is no image, not a whole one, or one of so many pixels that Pillow refuses it.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return to_rgb(_upright(image))
    except Image.UnidentifiedImageError as error:
        raise Unreadable("no image, or of an unknown format") from error
    except Exception as error:  # Pillow's decoders raise errors of any kind
        raise Unreadable(f"{error}" or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as RGB."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF that does not parse says nothing about the image
        return image

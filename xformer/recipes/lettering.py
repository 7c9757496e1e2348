"""Choose fonts that have the characters of class names, for drawing them in pictures."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from typing import Any

from PIL import ImageFont

LONGEST = 40
"""Maximum length of drawn names; longer ones are truncated with three dots."""
PROBE = 20
"""Font size used to check for glyphs."""
REGULAR = ("400", "normal", "regular")
"""Regular weights in matplotlib's font list."""
UNASSIGNED = "\U0010ffff"
"""A character that no font has."""


def legible(name: str, number: int) -> tuple[str, str]:
    """Return the text to draw for a class and the path of the font; "" is Pillow's default font.

    The text is the name if a font has all of its characters: Pillow's, else one found on the system or included in
    matplotlib. Otherwise it is the name with missing characters replaced by their NFKD decomposition without accents;
    if that cannot be drawn either, or is empty, ``class`` and its number.
    """
    return _legible(" ".join(name.split()), number)


@lru_cache(4096)
def _legible(name: str, number: int) -> tuple[str, str]:
    if len(name) > LONGEST:
        name = name[: LONGEST - 3] + "..."
    if name and not _missing(name, ""):
        return name, ""
    for path in system_fonts() if name else ():
        if not _missing(name, path):
            return name, path
    simpler = "".join(c if has_glyph("", c) else _simpler(c) for c in name)
    return (simpler, "") if simpler.strip() and not _missing(simpler, "") else (f"class {number}", "")


def _simpler(character: str) -> str:
    parts = unicodedata.normalize("NFKD", character)
    return "".join(c for c in parts if unicodedata.category(c) not in ("Mn", "Cf"))


def _missing(text: str, path: str) -> bool:
    return not all(has_glyph(path, c) for c in text)


@lru_cache(128)
def font(path: str, size: float) -> Any:
    """Load a font file, or Pillow's default font for ""."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@lru_cache(1 << 16)
def has_glyph(path: str, character: str) -> bool:
    """Whether a font has a glyph for a character, rather than drawing the box for missing ones."""
    if character == " ":
        return True
    if not character.isprintable():  # includes unassigned characters and surrogates
        return False
    if path:
        return ord(character) in _characters(path)
    drawn = _pixels(character)
    return drawn not in (_pixels(UNASSIGNED), _pixels(" "))


def _pixels(character: str) -> tuple[tuple[int, int], bytes]:
    mask = font("", PROBE).getmask(character)
    size: tuple[int, int] = mask.size
    return size, bytes(mask)


@lru_cache
def _characters(path: str) -> frozenset[int]:
    """Characters of a font file; empty if Pillow cannot draw it at any size, as with bitmap colour fonts."""
    from matplotlib.ft2font import FT2Font

    try:
        font(path, PROBE).getmask("a")
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@lru_cache(1)
def system_fonts() -> list[str]:
    """Font files: DejaVu Sans, then others, upright ones with regular weight first; empty without matplotlib."""
    try:
        from matplotlib.font_manager import fontManager
    except ImportError:
        return []
    entries = [e for e in fontManager.ttflist if not e.name.replace(" ", "").lstrip(".").startswith("LastResort")]
    entries.sort(key=lambda e: (e.name != "DejaVu Sans", e.style != "normal", f"{e.weight}" not in REGULAR, e.name))
    return list(dict.fromkeys(entry.fname for entry in entries))

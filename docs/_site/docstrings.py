"""Extension of griffe: docstrings in the repository's style as Markdown."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Roles become links, if what they name is on the site, and ``::`` before an indented block goes."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^(\s*)::\n", r"\1\n", obj.docstring.value, flags=re.M)
            text = re.sub(r"::\n\n(?=\s+\S)", ":\n\n", text)
            if obj.is_function and obj.returns is not None:  # the text begins with a shape, not with a type
                text = re.sub(r"^(Returns:\n\s+)", rf"\1{obj.returns}: ", text, flags=re.M)
            obj.docstring.value = ROLE.sub(_link, text)


def _link(match: re.Match[str]) -> str:
    name = match[1]
    found = [known for known in _documented() if known == name or known.split(".")[-1] == name.split(".")[-1]]
    label = name.rpartition(".")[2]
    return f"[`{label}`][{found[0]}]" if found else f"`{name}`"


@cache
def _documented() -> tuple[str, ...]:
    """What the pages of the reference show."""
    pages = sorted((Path(__file__).parents[1] / "api").glob("*.md"))
    return tuple(name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.M))

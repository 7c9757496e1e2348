"""Hooks of mkdocs: pages that lie beside docs, and links that leave it.

In the repository pages link to files by relative paths. On the site, CONTRIBUTING.md, CHANGELOG.md and
examples/README.md are pages, images of bench/results are copied, and links to other files become text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "examples/README.md": "examples.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(((?!\w+:|#)[^)#\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```)", re.S | re.M)


def on_files(files: Any, config: Any) -> Any:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    images = {target for page in ROOT.glob("docs/**/*.md") for target in _images(page)}
    for image in sorted(images):
        files.append(File.generated(config, _copied(image), abs_src_path=str(ROOT / image)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = next((name for name, at in PAGES.items() if at == here), f"docs/{here}")
    parts = FENCED.split(markdown)
    return "".join(part if i % 2 else LINK.sub(lambda m: _link(m, source, here), part) for i, part in enumerate(parts))


def _link(match: re.Match[str], source: str, here: str) -> str:
    image, label, link, anchor = match.groups()
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in PAGES:
        on_site = PAGES[target]
    elif target.startswith("docs/"):
        on_site = target.removeprefix("docs/")
    elif image:
        on_site = _copied(target)
    else:
        return label
    return f"{image}[{label}]({posixpath.relpath(on_site, posixpath.dirname(here) or '.')}{anchor or ''})"


def _images(page: Path) -> list[str]:
    """Paths from the root of the images outside docs that a page shows."""
    found = [m[3] for m in LINK.finditer(page.read_text()) if m[1]]
    paths = [os.path.relpath((page.parent / link).resolve(), ROOT).replace(os.sep, "/") for link in found]
    return [path for path in paths if not path.startswith("docs/")]


def _copied(image: str) -> str:
    return "files/" + image.replace("/", "-")

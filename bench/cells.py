"""Formatting of the tables' cells and of the lines above the tables."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
END = "<!-- end of results -->"


def opening(marker: str, folder: Path) -> str:
    """The first line of a table; it names the folder of the result files."""
    return marker.format(folder.relative_to(ROOT))


def machine(run: dict[str, Any]) -> str:
    """The machine, versions, date and commit of a run without yardsticks."""
    return (
        f"{run['machine']}, {run['threads']} threads, torch {run['versions']['torch']}, "
        f"timm {run['versions']['timm']}, {run['allocator']} allocator, {run['date'][:10]}, commit {run['commit']}"
    )


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

"""Cells of the tables, and what is said above them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
END = "<!-- end of results -->"


def opening(marker: str, folder: Path) -> str:
    """The first line of a table, which names the folder of its result files."""
    return marker.format(folder.relative_to(ROOT))


def machine(run: dict[str, Any]) -> str:
    """Where a run without yardsticks was made."""
    return (
        f"{run['machine']}, {run['threads']} threads, torch {run['versions']['torch']}, "
        f"timm {run['versions']['timm']}, {run['allocator']} allocator, {run['date'][:10]}, commit {run['commit']}"
    )


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

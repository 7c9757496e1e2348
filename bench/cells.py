"""Formatting of the tables' cells and of the lines above the tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
END = "<!-- end of results -->"
FIELDS = ("speedup_over_eager", "speedup_over_compile", "fraction_of_limit")


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


def directions(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["direction"] for row in run["rows"]))


def find(run: dict[str, Any], workload: str, direction: str) -> dict[str, Any]:
    rows = [r for r in run["rows"] if (r["workload"], r["direction"], r["provider"]) == (workload, direction, "cpp")]
    return rows[0] if rows else {}


def numbers(workload: str) -> list[int]:
    return [int(number) for number in workload.split("(")[1].strip(")").split(",")]


def many(workload: str) -> bool:
    """As workloads.LayerShape.many."""
    _, N, C, _ = numbers(workload)
    return N >= 8 * C


def mean(run: dict[str, Any], direction: str, field: str, many: Callable[[str], bool]) -> float | None:
    rows = [r for r in run["rows"] if r["direction"] == direction and r["provider"] == "cpp" and r.get(field)]
    values = [r[field] for r in rows if many(r["workload"])]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None

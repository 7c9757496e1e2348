"""Results as rows: a table on the terminal, CSV, JSON and plots."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One provider on one workload in one direction. Times in milliseconds, memory in MB (10^6 bytes)."""

    workload: str
    direction: str  # "forward" or "forward+backward"
    provider: str
    ms: float
    spread: float  # distance between the quartiles over the median
    samples: int
    gb_per_s: float | None  # least bytes / time; the minimum anyone must move
    limit_ms: float | None  # max(FLOPs / matrix peak, least bytes / copy bandwidth)
    fraction_of_limit: float | None
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    peak_extra_mb: float | None


def print_table(title: str, rows: list[Row], console: Console) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("workload")
    table.add_column("direction")
    table.add_column("provider")
    for heading in ("ms", "spread", "GB/s", "of limit", "x eager", "x compile", "peak MB"):
        table.add_column(heading, justify="right")
    last = ("", "")
    for row in rows:
        here = (row.workload, row.direction)
        if here != last and last[0]:
            table.add_section()
        style = None if row.provider in ("eager", "compile", "sdpa") else "bold"
        table.add_row(
            row.workload if here != last else "",
            row.direction if here != last else "",
            row.provider,
            _format(row.ms, 3),
            f"{row.spread:.0%}",
            _format(row.gb_per_s, 1),
            _format(row.fraction_of_limit, 2),
            _format(row.speedup_over_eager, 2),
            _format(row.speedup_over_compile, 2),
            _format(row.peak_extra_mb, 1),
            style=style,
        )
        last = here
    console.print(table)


def _format(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def save(stem: Path, facts: dict[str, Any], rows: list[Row]) -> list[Path]:
    """<stem>.json with everything, <stem>.csv with the rows, <stem>*.png; returns what was written."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    records = [{key: _rounded(value) for key, value in asdict(row).items()} for row in rows]
    written[0].write_text(json.dumps({**facts, "rows": records}, indent=1) + "\n")
    with written[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(records)
    return written + plot(stem, facts, rows)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def plot(stem: Path, facts: dict[str, Any], rows: list[Row]) -> list[Path]:
    """Bars of the time of every provider per workload, in units of the eager one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directions = list(dict.fromkeys(row.direction for row in rows))
    workloads = list(dict.fromkeys(row.workload for row in rows))
    providers = list(dict.fromkeys(row.provider for row in rows))
    figure, axes = plt.subplots(
        len(directions), 1, figsize=(2 + 1.6 * len(workloads), 4 * len(directions)), squeeze=False, layout="constrained"
    )
    for ax, direction in zip(axes[:, 0], directions, strict=True):
        for i, provider in enumerate(providers):
            mine = {row.workload: row for row in rows if (row.direction, row.provider) == (direction, provider)}
            at = [j + (i - (len(providers) - 1) / 2) * 0.8 / len(providers) for j in range(len(workloads))]
            heights = [mine[w].ms if w in mine else 0.0 for w in workloads]
            bars = ax.bar(at, heights, 0.8 / len(providers), label=provider)
            speedups = [mine[w].speedup_over_eager if w in mine else None for w in workloads]
            ax.bar_label(bars, [f"{x:.1f}x" if x else "" for x in speedups], fontsize=7, rotation=90, padding=2)
        for j, workload in enumerate(workloads):
            limit = next(
                (row.limit_ms for row in rows if row.workload == workload and row.direction == direction), None
            )
            if limit:
                ax.plot([j - 0.45, j + 0.45], [limit, limit], color="black", label="limit" if j == 0 else None)
        ax.set_yscale("log")
        ax.margins(y=0.2)
        ax.set_xticks(range(len(workloads)), workloads, fontsize=8)
        ax.set_ylabel(f"{direction}, ms")
        ax.legend(fontsize=8, ncols=3)
    figure.suptitle(_title(facts), fontsize=9)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def plot_over_tokens(stem: Path, facts: dict[str, Any], rows: list[Row], tokens: dict[str, int], series: str) -> Path:
    """Time against the number of tokens, with the limit, for workloads that differ in nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directions = list(dict.fromkeys(row.direction for row in rows))
    figure, axes = plt.subplots(
        1, len(directions), figsize=(6 * len(directions), 4.5), squeeze=False, layout="constrained"
    )
    for ax, direction in zip(axes[0], directions, strict=True):
        here = sorted(
            (r for r in rows if r.direction == direction and r.workload in tokens), key=lambda r: tokens[r.workload]
        )
        for provider in dict.fromkeys(row.provider for row in here):
            mine = [row for row in here if row.provider == provider]
            ax.plot([tokens[row.workload] for row in mine], [row.ms for row in mine], marker="o", label=provider)
        limit = {tokens[row.workload]: row.limit_ms for row in here if row.limit_ms}
        ax.plot(list(limit), list(limit.values()), color="black", linestyle="--", label="limit")
        ax.set(xscale="log", yscale="log", xlabel="tokens N", ylabel="ms", title=f"{direction}, {series}")
        ax.legend(fontsize=8)
    figure.suptitle(_title(facts), fontsize=9)
    path = stem.with_name(f"{stem.name}-{series}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _title(facts: dict[str, Any]) -> str:
    return (
        f"{facts['machine']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['versions']['torch']}, "
        f"allocator {facts['allocator']}, {facts['date'][:10]}"
    )

"""Results as rows, printed as tables and saved as CSV, JSON and, if matplotlib is installed, plots."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bench.terminal import Line, Terminal
from xformer_kernels.backends import PATHS

KERNELS = tuple(PATHS)


@dataclass(frozen=True)
class Row:
    """Result of one provider for one workload and direction. Times are in milliseconds, memory in MB (10^6 bytes)."""

    workload: str
    direction: str  # "forward" or "forward+backward"
    provider: str
    ms: float
    spread: float  # interquartile range over the median
    samples: int
    gb_per_s: float | None  # least bytes / time; least bytes: those that any implementation must read and write
    limit_ms: float | None  # max(FLOPs / matrix peak, least bytes / copy bandwidth)
    fraction_of_limit: float | None
    speedup_over_eager: float | None
    speedup_over_compile: float | None
    speedup_over_graphs: float | None  # over torch.compile with CUDA graphs
    peak_extra_mb: float | None  # of the process or of the GPU's allocator, including scratch of libraries
    peak_live_mb: float | None = None  # peak of live tensors, excluding the gradients of weights
    memory_of_eager: float | None = None  # peak_live_mb over that of eager
    form: str | None = None  # of a layer
    regret: float | None = None  # of the chosen form: time over the best of eager, compile and our other form, minus 1
    attention_share: float | None = None  # fraction of eager's time spent in modules that replace_attention replaces
    bound: float | None = None  # of the speedup over eager with any attention: 1 / (1 - attention_share)
    output_error: float | None = None  # largest difference from eager, relative to the largest element of the output
    gradient_error: float | None = None  # the same for the worst gradient


def is_ours(provider: str) -> bool:
    return re.split("[+-]", provider)[0] in KERNELS


def is_users(provider: str) -> bool:
    """Whether the provider is one of our backends with default options (no explicit form, graphs or compile)."""
    return provider in KERNELS


def print_table(title: str, rows: list[Row], terminal: Terminal) -> None:
    columns: tuple[tuple[str, str, int], ...] = (
        ("ms", "ms", 3),
        ("GB/s", "gb_per_s", 1),
        ("of limit", "fraction_of_limit", 2),
        ("x eager", "speedup_over_eager", 2),
        ("x compile", "speedup_over_compile", 2),
        ("x compile+graphs", "speedup_over_graphs", 2),
        ("peak MB", "peak_extra_mb", 1),
        ("live MB", "peak_live_mb", 1),
        ("of eager's", "memory_of_eager", 2),
        ("form", "form", 0),
        ("regret", "regret", 3),
        ("share", "attention_share", 3),
    )
    columns = tuple(c for c in columns if any(getattr(row, c[1]) is not None for row in rows))
    lines: list[Line] = []
    last: tuple[str, str] | None = None
    for row in rows:
        here = (row.workload, row.direction)
        numbers = [_format(getattr(row, field), digits) for _, field, digits in columns]
        numbers.insert(1, f"{row.spread:.0%}")
        names = (*(here if here != last else ("", "")), row.provider)
        lines.append(Line((*names, *numbers), last not in (None, here), is_ours(row.provider)))
        last = here
    headings = [heading for heading, _, _ in columns]
    headings.insert(1, "spread")
    terminal.table(title, ("workload", "direction", "provider", *headings), 3, lines)


def _format(value: float | str | None, digits: int) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def save(stem: Path, facts: dict[str, Any], rows: Sequence[Any]) -> list[Path]:
    """Writes facts and rows to <stem>.json, and the rows (dataclasses of one type) to <stem>.csv; returns the paths."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    records = [{key: _rounded(value) for key, value in asdict(row).items()} for row in rows]
    written[0].write_text(json.dumps({**facts, "rows": records}, indent=1) + "\n")
    with written[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(records)
    return written


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(stem: Path, facts: dict[str, Any], rows: list[Row]) -> list[Path]:
    """Bar chart of the time of each provider for each workload, labelled with the speedup over eager."""
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
    figure.suptitle(title(facts), fontsize=9)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def plot_over_tokens(stem: Path, facts: dict[str, Any], rows: list[Row], tokens: dict[str, int], series: str) -> Path:
    """Plot of time against the number of tokens, with the limit, for workloads that differ only in tokens."""
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
    figure.suptitle(title(facts), fontsize=9)
    path = stem.with_name(f"{stem.name}-{series}.png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def print_means(rows: list[Row], many: set[str], label: str, terminal: Terminal) -> None:
    """Prints geometric means of our kernels, over all workloads and over those with many tokens."""
    ours = [row for row in rows if is_ours(row.provider)]
    for direction, name in dict.fromkeys((row.direction, row.provider) for row in ours):
        mine = [row for row in ours if (row.direction, row.provider) == (direction, name)]
        for chosen, which in ((mine, "all"), ([row for row in mine if row.workload in many], label)):
            if chosen and (chosen is mine or len(chosen) < len(mine)):
                means = ", ".join(filter(None, (_mean(chosen, *field) for field in MEANS)))
                terminal.print(f"{name}, {direction}, {which}, geometric mean: {means}")


def print_regrets(rows: list[Row], terminal: Terminal) -> None:
    """Prints the worst regret of each provider and direction."""
    known = [row for row in rows if row.regret is not None]
    for direction, name in dict.fromkeys((row.direction, row.provider) for row in known):
        worst = max((r for r in known if (r.direction, r.provider) == (direction, name)), key=lambda r: r.regret or 0.0)
        terminal.print(f"{name}, {direction}: worst regret {worst.regret:.1%}, {worst.form} at {worst.workload}")


def print_gains(rows: list[Row], terminal: Terminal) -> None:
    """Prints, for whole models, the speedup, its upper bound, and the errors relative to eager."""
    for row in rows:
        if row.attention_share is None or not is_users(row.provider) or row.speedup_over_eager is None:
            continue
        text = (
            f"{row.provider}, {row.workload}, {row.direction}: {row.speedup_over_eager:.2f}x eager; attention is "
            f"{row.attention_share:.0%} of its time"
        )
        text += "" if row.bound is None else f", so at most {row.bound:.2f}x"
        if row.output_error is not None:
            text += f"; worst relative error: output {row.output_error:.1e}, gradients {row.gradient_error:.1e}"
        terminal.print(text)


MEANS = (
    ("speedup_over_eager", "x eager"),
    ("speedup_over_compile", "x compile"),
    ("speedup_over_graphs", "x compile+graphs"),
    ("fraction_of_limit", "of limit"),
    ("memory_of_eager", "of eager's memory"),
)


def _mean(rows: list[Row], field: str, label: str) -> str:
    values = [value for row in rows if (value := getattr(row, field))]
    if not values:
        return ""
    worst = f"most {max(values):.2f}" if field == "memory_of_eager" else f"least {min(values):.2f}"
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f} {label} ({worst})"


def title(facts: dict[str, Any]) -> str:
    """Title of a plot: machine, settings, versions and date."""
    return (
        f"{facts['machine']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['versions']['torch']}, "
        f"allocator {facts['allocator']}, {facts['date'][:10]}"
    )

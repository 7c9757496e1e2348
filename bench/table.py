"""The README's table, from result files: ``python -m bench.table bench/results/<machine>`` rewrites it in place."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: python -m bench.table {} -->", "<!-- end of results -->"
# (dtype, allocator) of the runs; the first one is shown in full
RUNS = (("float32", "default"), ("float32", "raised"), ("bfloat16", "raised"))
FIELDS = ("speedup_over_eager", "speedup_over_compile", "fraction_of_limit")


def render(folder: Path) -> str:
    """Ratios of our kernels for each workload, then geometric means of every run over the workloads of many tokens."""
    runs = {run: _load(folder, *run) for run in RUNS}
    first = runs[RUNS[0]]
    lines = [
        BEGIN.format(folder.relative_to(ROOT)),
        f"{first['machine']}, {first['threads']} threads, torch {first['versions']['torch']}, {first['date'][:10]}, "
        f"commit {first['commit']}; copy {first['copy_gb_per_s']:.0f} GB/s, matrix product "
        f"{first['matmul_gflop_per_s']:.0f} GFLOP/s.",
        "",
        "| (B,N,H,D) | forward: x eager | x compiled | of limit | forward+backward: x eager | x compiled | of limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in first["rows"]):
        cells = [_cell(_find(first, workload, d).get(field)) for d in _directions(first) for field in FIELDS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    for (dtype, allocator), run in runs.items():
        label = dtype if allocator == "default" else f"{dtype}, {allocator} allocator"
        means = [_cell(_mean(run, direction, field)) for direction in _directions(first) for field in FIELDS]
        lines.append(f"| mean of N >= 1024, {label} | {' | '.join(means)} |")
    return "\n".join([*lines, END])


def _load(folder: Path, dtype: str, allocator: str) -> dict[str, Any]:
    """A result file, which must be what its name says."""
    path = folder / f"op-cpu-{dtype}{'-raised' if allocator == 'raised' else ''}.json"
    run: dict[str, Any] = json.loads(path.read_text())
    if (run["dtype"], run["allocator"]) != (dtype, allocator):
        raise ValueError(f"{path} is a run of {run['dtype']} with the {run['allocator']} allocator")
    return run


def _directions(run: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["direction"] for row in run["rows"]))


def _find(run: dict[str, Any], workload: str, direction: str) -> dict[str, Any]:
    rows = [r for r in run["rows"] if (r["workload"], r["direction"], r["provider"]) == (workload, direction, "cpp")]
    return rows[0] if rows else {}


def _mean(run: dict[str, Any], direction: str, field: str) -> float | None:
    rows = [r for r in run["rows"] if r["direction"] == direction and r["provider"] == "cpp" and r[field]]
    values = [r[field] for r in rows if int(r["workload"].strip("()").split(",")[1]) >= 1024]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 2 else f"{value:.1f}"


def replace(readme: str, table: str) -> str:
    """The text with the table where one was."""
    before, rest = readme.split(BEGIN.split("{}")[0], 1)
    return before + table + rest.split(END, 1)[1]


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    readme = ROOT / "README.md"
    readme.write_text(replace(readme.read_text(), render(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

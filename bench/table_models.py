"""The table of the README, and that of whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cells import END, FIELDS, cell, directions, find, machine, many, mean, numbers, opening

SUMMARY = "<!-- summary: python -m bench.table {} -->"
MODELS = "<!-- models: python -m bench.table {} -->"
RUNTIMES = "<!-- runtimes on machines: python -m bench.table {} -->"
RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
# what the README shows: rows over which means are taken, by the file of their run
MEANS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "the operator, mean of N ≥ 1024": ("op-cpu-float32", lambda workload: numbers(workload)[1] >= 1024),
    "the layer, mean of N ≥ 8 C": ("layer-cpu-float32", many),
    "the half block, mean of N ≥ 8 C": ("layer-cpu-float32-blocks", many),
}


def render_summary(folder: Path) -> str:
    """For the README: means of the operator, layers and half blocks, and whole models, of one machine."""
    runs = {what: (_load(folder / f"{name}.json"), among) for what, (name, among) in MEANS.items()}
    models = _load(folder / "model-cpu-float32.json")
    lines = [
        opening(SUMMARY, folder),
        f"{models['machine']}, {models['threads']} threads, {models['dtype']}, torch {models['versions']['torch']}.",
        "",
        "| | forward: x eager | x compiled | forward+backward: x eager | x compiled | memory of eager's | run |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for what, (run, among) in runs.items():
        both = directions(run)
        values = [mean(run, direction, field, among) for direction in both for field in FIELDS[:2]]
        memory = mean(run, both[-1], "memory_of_eager", among)
        lines.append(f"| {what} | {' | '.join(map(cell, [*values, memory]))} | {_origin(run)} |")
    for workload in dict.fromkeys(row["workload"] for row in models["rows"]):
        found = [find(models, workload, direction) for direction in directions(models)]
        values = [row.get(field) for row in found for field in FIELDS[:2]]
        memory = found[-1].get("memory_of_eager")
        lines.append(f"| {workload} | {' | '.join(map(cell, [*values, memory]))} | {_origin(models)} |")
    return "\n".join([*lines, END])


def render_models(folder: Path) -> str:
    """For the page of benchmarks: whole models before and after replacement, and what no attention could exceed."""
    run = _load(folder / "model-cpu-float32.json")
    lines = [
        opening(MODELS, folder),
        f"{machine(run)}.",
        "",
        "| model, image | forward: x eager | forward+backward: x eager | memory of eager's "
        "| attention's share of forward | most that attention could gain | output error | gradient error |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
        forward, both = (find(run, workload, direction) for direction in directions(run))
        cells = [
            *(cell(row["speedup_over_eager"]) for row in (forward, both)),
            cell(both["memory_of_eager"]),
            f"{forward['attention_share']:.0%}",
            cell(forward["bound"]),
            f"{forward['output_error']:.0e}",
            f"{both['gradient_error']:.0e}",
        ]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def _load(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text())
    return run


def _origin(run: dict[str, Any]) -> str:
    return f"{run['date'][:10]}, {run['commit']}"


def render_runtimes(folder: Path) -> str:
    """For the backbone page: time of other runtimes over that of our fused models, for each run on a CPU."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.parent.glob("*/backbones-forward-cpu-*.json"))]
    runs = [run for run in runs if any(row["variant"] in RUNTIME_NAMES for row in run["rows"])]
    rows = [row for run in runs for row in run["rows"]]
    models = sorted({(row["model"], row["images"]) for row in rows if row["model"].startswith("xformer_")})
    lines = [
        opening(RUNTIMES, folder),
        f"| machine, date, allocator | runtime | {' | '.join(f'{model} {images}' for model, images in models)} |",
        f"|---|---|{'---:|' * len(models)}",
    ]
    for run in runs:
        times = {(row["model"], row["images"], row["variant"]): row["ms"] for row in run["rows"]}
        for variant, name in RUNTIME_NAMES.items():
            known = [(times.get((*model, variant)), times.get((*model, "fused"))) for model in models]
            ratios = [cell(theirs / ours if theirs and ours else None) for theirs, ours in known]
            about = f"{run['machine']}, {run['date'][:10]}, {run['allocator']}"
            lines.append(f"| {about} | {name} | {' | '.join(ratios)} |")
    return "\n".join([*lines, END])

"""Tables of trained models and of the speed of segmentation."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench.cells import END, cell, machine, opening, spread

LEARNING = {
    "learning": "<!-- learning: python -m bench.table {} -->",
    "learning-cifar10": "<!-- learning of CIFAR-10: python -m bench.table {} -->",
}
SCENES = "<!-- scenes, {}: python -m bench.table {{}} -->"
SEGMENTATION = "<!-- segmentation: python -m bench.table {} -->"
# metrics of each task on the synthetic scenes, in percent: field of a row -> heading
METRICS = {"detect": {"map50": "mAP at 0.5", "map": "mAP"}, "segment": {"miou": "mIoU", "pixels": "pixel accuracy"}}


def render_learning(stem: str, folder: Path) -> str:
    """For the training page: accuracy of models of similar size trained with the same recipe, over seeds."""
    begin = opening(LEARNING[stem], folder)
    path = folder / f"{stem}.json"
    if not path.exists():
        return f"{begin}\nNot measured yet.\n{END}"
    run = json.loads(path.read_text())
    sets = {row["data"]: row["epochs"] for row in run["rows"]}
    seeds = sorted({row["seed"] for row in run["rows"]})
    lines = [
        begin,
        f"{_trained(run)}. Top-1 accuracy in percent after the last epoch, mean (least to most) of seeds "
        f"{', '.join(map(str, seeds))}; minutes of one processor.",
        "",
        f"| model | {' | '.join(f'{data}, {epochs} epochs | minutes' for data, epochs in sets.items())} |",
        f"|---|{'---:|' * 2 * len(sets)}",
    ]
    for model in dict.fromkeys(row["model"] for row in run["rows"]):
        cells = []
        for data in sets:
            rows = [row for row in run["rows"] if (row["model"], row["data"]) == (model, data)]
            cells += [spread([row["top1"] for row in rows]), _minutes(rows)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_segmentation(folder: Path) -> str:
    """For the segmentation page: images per second and memory of each attention and model, and how they scale."""
    begin = opening(SEGMENTATION, folder)
    path = folder / "model-segment-cpu-float32.json"
    if not path.exists():
        return f"{begin}\nNot measured yet.\n{END}"
    run = json.loads(path.read_text())
    rows = {(row["height"] * row["width"], row["provider"], row["variant"]): row for row in run["rows"]}
    lines = [
        begin,
        f"{machine(run)}; {run['model']}, {run['classes']} classes, {run['rows'][0]['images']} image a call.",
        "",
        "| image | tokens at stride 8 | attention or model | parameters | GMACs | FPS | time, x ours | fused: FPS "
        "| time, x ours | memory, MB | x ours | process, MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for (pixels, provider, variant), row in rows.items():
        if variant != "unfused":
            continue
        fused = rows.get((pixels, provider, "fused"), {})
        numbers = [row["fps"], row["over_ours"], fused.get("fps"), fused.get("over_ours")]
        memory = [f"{row[field]:.0f}" if row[field] else "-" for field in ("live_mb", "extra_mb")]
        cells = [*map(cell, numbers), memory[0], cell(row["live_over_ours"]), memory[1]]
        size = f"{row['height']} x {row['width']}"
        parameters = f"{row['parameters'] / 1e6:.2f}M" if row.get("parameters") else "-"
        of_model = f"{row['tokens'] or '-'} | {provider} | {parameters} | {cell(row.get('gmacs'))}"
        lines.append(f"| {size} | {of_model} | {' | '.join(cells)} |")
        if row["not_run"]:
            notes.append(f"{provider} at {size}: {row['not_run']}")
    few, many = (limit(pixels for pixels, *_ in rows) for limit in (min, max))
    for provider in dict.fromkeys(provider for _, provider, _ in rows):
        small, large = rows[few, provider, "unfused"], rows[many, provider, "unfused"]
        if few < many and not large["not_run"]:
            time, live = (cell(large[field] / small[field]) for field in ("ms", "live_mb"))
            notes.append(
                f"{many / few:.0f} times the pixels take {provider} {time} times the time, {live} times the memory"
            )
    return "\n".join([*lines, "", f"{'; '.join(notes)}.", END])


def render_scenes(task: str, folder: Path) -> str:
    """For the page of a task: our model and others, trained alike on synthetic scenes, over seeds."""
    begin = opening(SCENES.format(task), folder)
    path = folder / f"scenes-{task}.json"
    if not path.exists():
        return f"{begin}\nNot measured yet.\n{END}"
    run = json.loads(path.read_text())
    first = run["rows"][0]
    lines = [
        begin,
        f"{_trained(run)}, torchvision {run['versions']['torchvision']}. {first['epochs']} epochs of "
        f"{first['images']} scenes; percent after the last epoch, mean (least to most) of seeds; minutes of one "
        "processor.",
        "",
        f"| model | parameters | seeds | {' | '.join(METRICS[task].values())} | minutes |",
        f"|---|---:|---|{'---:|' * len(METRICS[task])}---:|",
    ]
    for model in dict.fromkeys(row["model"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["model"] == model]
        cells = [spread([row[metric] for row in rows]) for metric in METRICS[task]]
        seeds = ", ".join(str(seed) for seed in sorted(row["seed"] for row in rows))
        size = f"{rows[0]['parameters'] / 1e6:.2f}M"
        lines.append(f"| {model} | {size} | {seeds} | {' | '.join(cells)} | {_minutes(rows)} |")
    return "\n".join([*lines, END])


def _trained(run: dict[str, Any]) -> str:
    """The machine, versions and date of a run, with the commits of all rows."""
    return machine({**run, "commit": " and ".join(dict.fromkeys(row["commit"] for row in run["rows"]))})


def _minutes(rows: list[dict[str, Any]]) -> str:
    """Mean minutes of the runs that were not interrupted."""
    known = [row["minutes"] for row in rows if row["minutes"] is not None]
    return f"{statistics.mean(known):.1f}" if known else "-"

"""Tables of the documents, from result files: ``python -m bench.table bench/results/<machine>`` rewrites them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: python -m bench.table {} -->", "<!-- end of results -->"
LAYERS = "<!-- layers: python -m bench.table {} -->"
GPU = "<!-- gpu: python -m bench.table {} -->"
BACKBONES = "<!-- backbones: python -m bench.table {} -->"
FORWARD = "<!-- backbones, forward: python -m bench.table {} -->"
LEARNING = "<!-- learning: python -m bench.table {} -->"
SCENES = "<!-- scenes, {}: python -m bench.table {{}} -->"
TRAINING = "<!-- backbones, training: python -m bench.table {} -->"
VARIANTS = "<!-- variants: python -m bench.table {} -->"
SEGMENTATION = "<!-- segmentation: python -m bench.table {} -->"
# what each backbone is measured against, and how many times as fast it should be, for one image and for eight
GOALS = {
    ("xformer_s", "edgenext_small"): {1: 1.3, 8: 1.5},
    ("xformer_s", "mobilevit_s"): {1: 2.1, 8: 2.4},
    ("xformer_xs", "edgenext_x_small"): {1: 1.15, 8: 1.15},
    ("xformer_xs", "mobilevit_xs"): {1: 2.0, 8: 2.0},
    ("xformer_xxs", "edgenext_xx_small"): {1: 1.15, 8: 1.15},
    ("xformer_xxs", "mobilevit_xxs"): {1: 2.0, 8: 2.0},
}
EAGER = ("unfused", "folded", "fused")
# (dtype, allocator) of the runs; the first one is shown in full
RUNS = (("float32", "default"), ("float32", "raised"), ("bfloat16", "raised"))
# of each task of the made scenes: metrics in percent, as rows and readers name them
METRICS = {"detect": {"map50": "mAP at 0.5", "map": "mAP"}, "segment": {"miou": "mIoU", "pixels": "pixel accuracy"}}
FIELDS = ("speedup_over_eager", "speedup_over_compile", "fraction_of_limit")


def render(folder: Path) -> str:
    """Ratios of our kernels for each workload, then geometric means of every run over the workloads of many tokens."""
    runs = {run: _load(folder, *run) for run in RUNS}
    first = runs[RUNS[0]]
    lines = [
        BEGIN.format(folder.relative_to(ROOT)),
        f"{_origin(first)}.",
        "",
        "| (B,N,H,D) | forward: x eager | x compiled | of limit | forward+backward: x eager | x compiled | of limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in first["rows"]):
        cells = [_cell(_find(first, workload, d).get(field)) for d in _directions(first) for field in FIELDS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    for (dtype, allocator), run in runs.items():
        label = dtype if allocator == "default" else f"{dtype}, {allocator} allocator"
        means = [
            _cell(_mean(run, direction, field, lambda workload: _numbers(workload)[1] >= 1024))
            for direction in _directions(first)
            for field in FIELDS
        ]
        lines.append(f"| mean of N >= 1024, {label} | {' | '.join(means)} |")
    return "\n".join([*lines, END])


def render_layers(folder: Path) -> str:
    """What users get of layers and half blocks, each with its means over the workloads where N >= 8C."""
    begin = LAYERS.format(folder.relative_to(ROOT))
    paths = [folder / f"layer-cpu-float32{suffix}.json" for suffix in ("", "-blocks")]
    if not all(path.exists() for path in paths):
        return f"{begin}\nNot measured yet.\n{END}"
    runs = [json.loads(path.read_text()) for path in paths]
    regrets = [_regrets(run, direction) for run in runs for direction in _directions(run)]
    lines = [
        begin,
        f"{_origin(runs[0])}. Of the forms chosen, the worst regret is {max(regrets)[0]:.0%}, at {max(regrets)[1]}.",
        "",
        "| (B,N,C,heads) | forward: x eager | x compiled | forward+backward: x eager | x compiled | memory of eager's "
        "| form |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for run, kind in zip(runs, ("layers", "blocks"), strict=True):
        directions = _directions(run)
        for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
            found = [_find(run, workload, direction) for direction in directions]
            cells = [_cell(row.get(field)) for row in found for field in FIELDS[:2]]
            forms = dict.fromkeys(row["form"] for row in found if row.get("form"))
            lines.append(
                f"| {workload} | {' | '.join(cells)} | {_cell(found[-1].get('memory_of_eager'))} "
                f"| {', then '.join(forms) or '-'} |"
            )
        means = [_cell(_mean(run, direction, field, _many)) for direction in directions for field in FIELDS[:2]]
        memory = _cell(_mean(run, directions[-1], "memory_of_eager", _many))
        lines.append(f"| mean of {kind} where N >= 8C | {' | '.join(means)} | {memory} | |")
    return "\n".join([*lines, END])


def render_gpu(folder: Path) -> str:
    """Both backends of every run of the operator on this GPU."""
    lines = [GPU.format(folder.relative_to(ROOT))]
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("op-cuda-*.json"))]
    fields = {"x eager": FIELDS[0], "x compiled": FIELDS[1], "of limit": FIELDS[2]}
    for run in runs:
        fields = {name: field for name, field in fields.items() if any(row.get(field) for row in run["rows"])}
        columns = [(backend, name) for backend in ("triton", "cuda") for name in fields]
        lines += [
            f"{_origin(run)}; {run['dtype']}:",
            "",
            f"| (B,N,H,D) | | {' | '.join(': '.join(column) for column in columns)} |",
            f"|---|---|{'---:|' * len(columns)}",
        ]
        rows = {(row["workload"], row["direction"], row["provider"]): row for row in run["rows"]}
        for workload, direction in dict.fromkeys(key[:2] for key in rows):
            found = {backend: rows.get((workload, direction, backend), {}) for backend, _ in columns}
            cells = [_cell(found[backend].get(fields[name])) for backend, name in columns]
            lines.append(f"| {workload} | {direction} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_backbones(folder: Path) -> str:
    """For the README: time of timm's models over that of ours, unfused and fused alike."""
    begin = BACKBONES.format(folder.relative_to(ROOT))
    (run,) = _backbones(folder, "forward", ("",))
    if run is None:
        return f"{begin}\nNot measured yet.\n{END}"
    lines = [
        begin,
        f"{_machine(run)}.",
        "",
        f"| model | images | {' | '.join(f'{of}: {how}' for of in ('x EdgeNeXt', 'x MobileViT') for how in EAGER)} |",
        f"|---|---:|{'---:|' * 6}",
    ]
    for ours in dict.fromkeys(ours for ours, _ in GOALS):
        peers = [peer for mine, peer in GOALS if mine == ours]
        for images in GOALS[ours, peers[0]]:
            cells = [_cell(_over_ours(run, ours, peer, images, (how,))) for peer in peers for how in EAGER]
            lines.append(f"| {ours} | {images} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_forward(folder: Path) -> str:
    """For the page of the backbone: also the fastest variant of theirs over that of ours, the raised allocator,
    compiled models and the goals."""
    begin = FORWARD.format(folder.relative_to(ROOT))
    default, raised, compiled = _backbones(folder, "forward", ("", "-raised", "-compile"))
    runs = [run for run in (default, raised, compiled) if run is not None]
    if default is None:
        return f"{begin}\nNot measured yet.\n{END}"
    columns = [(variant, default, (variant,)) for variant in EAGER] + [("fastest", default, EAGER)]
    if raised is not None:
        columns += [(f"{variant}, raised", raised, (variant,)) for variant in ("unfused", "fused")]
    if compiled is not None:
        columns += [("compiled", compiled, ("compiled",))]
    lines = [
        begin,
        f"{'; '.join(map(_machine, runs))}.",
        "",
        f"| model | images | x | {' | '.join(heading for heading, _, _ in columns)} | goal |",
        f"|---|---:|---|{'---:|' * len(columns)}---:|",
    ]
    for (ours, peer), goals in GOALS.items():
        for images, goal in goals.items():
            cells = [_cell(_over_ours(run, ours, peer, images, variants)) for _, run, variants in columns]
            lines.append(f"| {ours} | {images} | {peer} | {' | '.join(cells)} | {goal} |")
    gains = []
    for ours in dict.fromkeys(ours for ours, _ in GOALS):
        times = {(row["images"], row["variant"]): row["ms"] for row in default["rows"] if row["model"] == ours}
        for images in sorted({images for images, _ in times}):
            ratios = {how: times[images, "unfused"] / ms for (n, how), ms in times.items() if n == images}
            gains.append(f"{ours} {images}: {_cell(ratios.get('fused'))} ({_cell(ratios.get('folded'))})")
    said = "Times as fast by `fuse_for_inference` (in brackets with `kernels=False`), by model and images at once"
    lines += ["", f"{said}: {'; '.join(gains)}."]
    return "\n".join([*lines, END])


def render_training(folder: Path) -> str:
    """For the page of the backbone: a step with other attention over one with our kernels, and how ours grows."""
    begin = TRAINING.format(folder.relative_to(ROOT))
    runs = [run for run in _backbones(folder, "training", ("", "-raised")) if run is not None]
    if not runs:
        return f"{begin}\nNot measured yet.\n{END}"
    lines = [
        begin,
        f"{'; '.join(map(_machine, runs))}.",
        "",
        "| allocator | pixels | images | eager XFA: time | memory | softmax: time | memory "
        "| ours per pixel: time | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        rows = {(row["size"], row["provider"]): row for row in run["rows"]}
        sizes = sorted({row["size"] for row in run["rows"]})
        first = rows[sizes[0], "xfa"]
        for size in sizes:
            ours = rows[size, "xfa"]
            cells: list[str] = []
            for provider in ("eager", "softmax"):
                row = rows[size, provider]
                times = [row["over_ours"], row["memory_over_ours"]]
                cells += ["did not fit"] * 2 if row["failure"] else map(_cell, times)
            for field in ("ms_per_image", "live_mb_per_image"):
                known = ours[field] is not None and first[field] is not None
                grown = ours[field] / first[field] * (first["size"] / size) ** 2 if known else None
                cells.append(_cell(grown))
            lines.append(f"| {run['allocator']} | {size} | {ours['images']} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def _backbones(folder: Path, what: str, suffixes: tuple[str, ...]) -> list[dict[str, Any] | None]:
    paths = [folder / f"backbones-{what}-cpu-float32{suffix}.json" for suffix in suffixes]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _over_ours(run: dict[str, Any], ours: str, peer: str, images: int, variants: tuple[str, ...]) -> float | None:
    """Time of the peer over that of ours, each in the fastest of these variants."""
    times = []
    for model in (peer, ours):
        of_model = [row for row in run["rows"] if (row["model"], row["images"]) == (model, images)]
        times.append(min((row["ms"] for row in of_model if row["variant"] in variants), default=None))
    return times[0] / times[1] if times[0] and times[1] else None


def _machine(run: dict[str, Any]) -> str:
    """Where a run without yardsticks was made."""
    return (
        f"{run['machine']}, {run['threads']} threads, torch {run['versions']['torch']}, "
        f"timm {run['versions']['timm']}, {run['allocator']} allocator, {run['date'][:10]}, commit {run['commit']}"
    )


def _regrets(run: dict[str, Any], direction: str) -> tuple[float, str]:
    """The worst one."""
    rows = [r for r in run["rows"] if (r["direction"], r["provider"]) == (direction, "cpp") and r["regret"] is not None]
    return max((r["regret"], f"{r['workload']} {direction}") for r in rows)


def _origin(run: dict[str, Any]) -> str:
    return (
        f"{run['machine']}, {run['threads']} threads, torch {run['versions']['torch']}, {run['date'][:10]}, "
        f"commit {run['commit']}; copy {run['copy_gb_per_s']:.0f} GB/s, matrix product "
        f"{run['matmul_gflop_per_s']:.0f} GFLOP/s"
    )


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


def _numbers(workload: str) -> list[int]:
    return [int(number) for number in workload.split("(")[1].strip(")").split(",")]


def _many(workload: str) -> bool:
    """As workloads.LayerShape.many."""
    _, N, C, _ = _numbers(workload)
    return N >= 8 * C


def _mean(run: dict[str, Any], direction: str, field: str, many: Callable[[str], bool]) -> float | None:
    rows = [r for r in run["rows"] if r["direction"] == direction and r["provider"] == "cpp" and r[field]]
    values = [r[field] for r in rows if many(r["workload"])]
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def render_learning(folder: Path) -> str:
    """For the page of training: accuracy of models of one size by one recipe, over seeds."""
    begin = LEARNING.format(folder.relative_to(ROOT))
    path = folder / "learning.json"
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
            cells += [_spread([row["top1"] for row in rows]), _minutes(rows)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_variants(folder: Path) -> str:
    """For the page of integrations: our kernels against the code of each model."""
    begin = VARIANTS.format(folder.relative_to(ROOT))
    run = json.loads((folder / "variants-cpu-float32.json").read_text())
    lines = [
        begin,
        f"{_machine(run)}, float32.",
        "",
        "| model (B,N,H,D) | forward: x eager | x compiled | of limit "
        "| forward+backward: x eager | x compiled | of limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
        cells = [_cell(_find(run, workload, d).get(field)) for d in _directions(run) for field in FIELDS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_segmentation(folder: Path) -> str:
    """For the page of segmentation: images per second and memory with each attention, and how both grow with pixels."""
    begin = SEGMENTATION.format(folder.relative_to(ROOT))
    path = folder / "model-segment-cpu-float32.json"
    if not path.exists():
        return f"{begin}\nNot measured yet.\n{END}"
    run = json.loads(path.read_text())
    rows = {(row["height"] * row["width"], row["provider"], row["variant"]): row for row in run["rows"]}
    lines = [
        begin,
        f"{_machine(run)}; {run['model']}, {run['classes']} classes, {run['rows'][0]['images']} image a call.",
        "",
        "| image | tokens at stride 8 | attention | FPS | time, x ours | fused: FPS | time, x ours | memory, MB "
        "| x ours | process, MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    notes = []
    for (pixels, provider, variant), row in rows.items():
        if variant != "unfused":
            continue
        fused = rows.get((pixels, provider, "fused"), {})
        numbers = [row["fps"], row["over_ours"], fused.get("fps"), fused.get("over_ours")]
        memory = [f"{row[field]:.0f}" if row[field] else "-" for field in ("live_mb", "extra_mb")]
        cells = [*map(_cell, numbers), memory[0], _cell(row["live_over_ours"]), memory[1]]
        size = f"{row['height']} x {row['width']}"
        lines.append(f"| {size} | {row['tokens']} | {provider} | {' | '.join(cells)} |")
        if row["not_run"]:
            notes.append(f"{provider} at {size}: {row['not_run']}")
    few, many = (limit(pixels for pixels, *_ in rows) for limit in (min, max))
    for provider in dict.fromkeys(provider for _, provider, _ in rows):
        small, large = rows[few, provider, "unfused"], rows[many, provider, "unfused"]
        if few < many and not large["not_run"]:
            time, live = (_cell(large[field] / small[field]) for field in ("ms", "live_mb"))
            notes.append(
                f"{many / few:.0f} times the pixels take {provider} {time} times the time, {live} times the memory"
            )
    return "\n".join([*lines, "", f"{'; '.join(notes)}.", END])


def render_scenes(task: str, folder: Path) -> str:
    """For the page of a task: our model and torchvision's by one recipe on made scenes, over seeds."""
    begin = SCENES.format(task).format(folder.relative_to(ROOT))
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
        cells = [_spread([row[metric] for row in rows]) for metric in METRICS[task]]
        seeds = ", ".join(str(seed) for seed in sorted(row["seed"] for row in rows))
        size = f"{rows[0]['parameters'] / 1e6:.2f}M"
        lines.append(f"| {model} | {size} | {seeds} | {' | '.join(cells)} | {_minutes(rows)} |")
    return "\n".join([*lines, END])


def _trained(run: dict[str, Any]) -> str:
    """The machine, with the commits of all rows."""
    return _machine({**run, "commit": " and ".join(dict.fromkeys(row["commit"] for row in run["rows"]))})


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _minutes(rows: list[dict[str, Any]]) -> str:
    """Of the runs that were not stopped on their way."""
    known = [row["minutes"] for row in rows if row["minutes"] is not None]
    return f"{statistics.mean(known):.1f}" if known else "-"


def replace(readme: str, table: str) -> str:
    """The text with the table where one was that begins alike."""
    begins = (
        BEGIN,
        LAYERS,
        GPU,
        BACKBONES,
        FORWARD,
        TRAINING,
        LEARNING,
        VARIANTS,
        SEGMENTATION,
        *map(SCENES.format, METRICS),
    )
    kinds = [begin.split("{}")[0] for begin in begins]
    kind = next(kind for kind in kinds if table.startswith(kind))
    before, rest = readme.split(kind, 1)
    return before + table + rest.split(END, 1)[1]


ON_GPU: dict[str, tuple[Callable[[Path], str], ...]] = {"README.md": (render_gpu,)}
ON_CPU: dict[str, tuple[Callable[[Path], str], ...]] = {
    "README.md": (render, render_layers, render_backbones),
    "docs/backbone.md": (render_forward, render_training),
    "docs/training.md": (render_learning,),
    "docs/detection.md": (partial(render_scenes, "detect"),),
    "docs/segmentation.md": (partial(render_scenes, "segment"), render_segmentation),
    "docs/integrations.md": (render_variants,),
}


def main() -> int:
    folder = Path(sys.argv[1]).resolve()
    documents = ON_GPU if any(folder.glob("op-cuda-*.json")) else ON_CPU
    for name, tables in documents.items():
        path = ROOT / name
        text = path.read_text()
        for table in tables:
            # what was not measured on this machine stays that of another
            with contextlib.suppress(FileNotFoundError):
                rendered = table(folder)
                text = text if "Not measured yet." in rendered else replace(text, rendered)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

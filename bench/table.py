"""Rewrites the tables of the documents from result files: ``python -m bench.table bench/results/<machine>``.

These are the tables whose comment names the folder, and those of all machines. To show another machine in a table,
write its folder into the comment first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.cells import END, FIELDS, ROOT, cell, directions, find, machine, many, mean, numbers, opening
from bench.table_models import MODELS, RUNTIMES, SUMMARY, render_models, render_runtimes, render_summary
from bench.table_tasks import (
    LEARNING,
    METRICS,
    SCENES,
    SEGMENTATION,
    render_learning,
    render_scenes,
    render_segmentation,
)

BEGIN = "<!-- results: python -m bench.table {} -->"
LAYERS = "<!-- layers: python -m bench.table {} -->"
GPU = "<!-- gpu: python -m bench.table {} -->"
BACKBONES = "<!-- backbones: python -m bench.table {} -->"
FORWARD = "<!-- backbones, forward: python -m bench.table {} -->"
TRAINING = "<!-- backbones, training: python -m bench.table {} -->"
MACHINES = "<!-- machines: python -m bench.table {} -->"
LAYER_MACHINES = "<!-- layers on machines: python -m bench.table {} -->"
VARIANTS = "<!-- variants: python -m bench.table {} -->"
# (our backbone, the one it is compared with) -> {batch size: speedup to reach}
GOALS = {
    ("xformer_s", "edgenext_small"): {1: 1.3, 8: 1.5},
    ("xformer_s", "mobilevit_s"): {1: 2.1, 8: 2.4},
    ("xformer_xs", "edgenext_x_small"): {1: 1.15, 8: 1.15},
    ("xformer_xs", "mobilevit_xs"): {1: 2.0, 8: 2.0},
    ("xformer_xxs", "edgenext_xx_small"): {1: 1.15, 8: 1.15},
    ("xformer_xxs", "mobilevit_xxs"): {1: 2.0, 8: 2.0},
}
EAGER = ("unfused", "folded", "fused")
# (dtype, allocator) of the runs; only the first one is shown for each workload
RUNS = (("float32", "default"), ("float32", "raised"), ("bfloat16", "raised"))


def render(folder: Path) -> str:
    """Ratios of our kernels for each workload, then geometric means of each run over the workloads with many tokens."""
    runs = {run: _load(folder, *run) for run in RUNS}
    first = runs[RUNS[0]]
    lines = [
        opening(BEGIN, folder),
        f"{_origin(first)}.",
        "",
        "| (B,N,H,D) | forward: x eager | x compiled | of limit | forward+backward: x eager | x compiled | of limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in first["rows"]):
        cells = [cell(find(first, workload, d).get(field)) for d in directions(first) for field in FIELDS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    for (dtype, allocator), run in runs.items():
        label = dtype if allocator == "default" else f"{dtype}, {allocator} allocator"
        means = map(cell, _means(run))
        lines.append(f"| mean of N >= 1024, {label} | {' | '.join(means)} |")
    return "\n".join([*lines, END])


def render_machines(folder: Path) -> str:
    """Geometric means of each run of the operator on a CPU, over the workloads with many tokens."""
    lines = [
        opening(MACHINES, folder),
        "| machine, date | dtype, allocator | forward: x eager | x compiled | of limit | forward+backward: x eager "
        "| x compiled | of limit |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for path in sorted(folder.parent.glob("*/op-cpu-*.json")):
        run = json.loads(path.read_text())
        means = [cell(value) for value in _means(run)]
        lines.append(
            f"| {run['machine']}, {run['date'][:10]} | {run['dtype']}, {run['allocator']} | {' | '.join(means)} |"
        )
    return "\n".join([*lines, END])


def _means(run: dict[str, Any]) -> list[float | None]:
    """Geometric means of each field in each direction, over the workloads with many tokens."""
    return [
        mean(run, direction, field, lambda workload: numbers(workload)[1] >= 1024)
        for direction in directions(run)
        for field in FIELDS
    ]


def render_layers(folder: Path) -> str:
    """Layers and half blocks with default options, each with means over the workloads where N >= 8C."""
    begin = opening(LAYERS, folder)
    paths = [folder / f"layer-cpu-float32{suffix}.json" for suffix in ("", "-blocks")]
    if not all(path.exists() for path in paths):
        return f"{begin}\nNot measured yet.\n{END}"
    runs = [json.loads(path.read_text()) for path in paths]
    regrets = [_regrets(run, direction) for run in runs for direction in directions(run)]
    lines = [
        begin,
        f"{_origin(runs[0])}. Of the forms chosen, the worst regret is {max(regrets)[0]:.0%}, at {max(regrets)[1]}.",
        "",
        "| (B,N,C,heads) | forward: x eager | x compiled | forward+backward: x eager | x compiled | memory of eager's "
        "| form |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for run, kind in zip(runs, ("layers", "blocks"), strict=True):
        both = directions(run)
        for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
            found = [find(run, workload, direction) for direction in both]
            cells = [cell(row.get(field)) for row in found for field in FIELDS[:2]]
            forms = dict.fromkeys(row["form"] for row in found if row.get("form"))
            lines.append(
                f"| {workload} | {' | '.join(cells)} | {cell(found[-1].get('memory_of_eager'))} "
                f"| {', then '.join(forms) or '-'} |"
            )
        means = [cell(mean(run, direction, field, many)) for direction in both for field in FIELDS[:2]]
        memory = cell(mean(run, both[-1], "memory_of_eager", many))
        lines.append(f"| mean of {kind} where N >= 8C | {' | '.join(means)} | {memory} | |")
    return "\n".join([*lines, END])


def render_layer_machines(folder: Path) -> str:
    """Geometric means of each run of layers and half blocks on a CPU over the workloads where N >= 8C, and the worst of
    all workloads."""
    lines = [
        opening(LAYER_MACHINES, folder),
        "| machine, date | what | forward: x eager | x compiled | forward+backward: x eager | x compiled "
        "| least x compiled | worst regret |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, stem in (("layers", "layer-cpu-float32"), ("half blocks", "layer-cpu-float32-blocks")):
        for path in sorted(folder.parent.glob(f"*/{stem}.json")):
            run = json.loads(path.read_text())
            both = directions(run)
            means = [cell(mean(run, direction, field, many)) for direction in both for field in FIELDS[:2]]
            ratios = [row[FIELDS[1]] for row in run["rows"] if row["provider"] == "cpp"]
            least, regret = cell(min(filter(None, ratios))), max(_regrets(run, direction) for direction in both)[0]
            lines.append(
                f"| {run['machine']}, {run['date'][:10]} | {kind} | {' | '.join(means)} | {least} | {regret:.0%} |"
            )
    return "\n".join([*lines, END])


def render_gpu(folder: Path) -> str:
    """Both GPU backends, for each run of the operator on this GPU."""
    lines = [opening(GPU, folder)]
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
            cells = [cell(found[backend].get(fields[name])) for backend, name in columns]
            lines.append(f"| {workload} | {direction} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_backbones(folder: Path) -> str:
    """For the page of benchmarks: time of timm's models over that of ours, unfused and fused alike."""
    begin = opening(BACKBONES, folder)
    (run,) = _backbones(folder, "forward", ("",))
    if run is None:
        return f"{begin}\nNot measured yet.\n{END}"
    lines = [
        begin,
        f"{machine(run)}.",
        "",
        f"| model | images | {' | '.join(f'{of}: {how}' for of in ('x EdgeNeXt', 'x MobileViT') for how in EAGER)} |",
        f"|---|---:|{'---:|' * 6}",
    ]
    for ours in dict.fromkeys(ours for ours, _ in GOALS):
        peers = [peer for mine, peer in GOALS if mine == ours]
        for images in GOALS[ours, peers[0]]:
            cells = [cell(_over_ours(run, ours, peer, images, (how,))) for peer in peers for how in EAGER]
            lines.append(f"| {ours} | {images} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def render_forward(folder: Path) -> str:
    """For the backbone page: also their fastest variant over our fastest one, the raised allocator, compiled models and
    the goals."""
    begin = opening(FORWARD, folder)
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
        f"{'; '.join(map(machine, runs))}.",
        "",
        f"| model | images | x | {' | '.join(heading for heading, _, _ in columns)} | goal |",
        f"|---|---:|---|{'---:|' * len(columns)}---:|",
    ]
    for (ours, peer), goals in GOALS.items():
        for images, goal in goals.items():
            cells = [cell(_over_ours(run, ours, peer, images, variants)) for _, run, variants in columns]
            lines.append(f"| {ours} | {images} | {peer} | {' | '.join(cells)} | {goal} |")
    gains = []
    for ours in dict.fromkeys(ours for ours, _ in GOALS):
        times = {(row["images"], row["variant"]): row["ms"] for row in default["rows"] if row["model"] == ours}
        for images in sorted({images for images, _ in times}):
            ratios = {how: times[images, "unfused"] / ms for (n, how), ms in times.items() if n == images}
            gains.append(f"{ours} {images}: {cell(ratios.get('fused'))} ({cell(ratios.get('folded'))})")
    said = "Times as fast by `fuse_for_inference` (in brackets with `kernels=False`), by model and images at once"
    return "\n".join([*lines, "", f"{said}: {'; '.join(gains)}.", END])


def render_training(folder: Path) -> str:
    """For the backbone page: a training step with other attention over one with our kernels, and how ours scales."""
    begin = opening(TRAINING, folder)
    runs = [run for run in _backbones(folder, "training", ("", "-raised")) if run is not None]
    if not runs:
        return f"{begin}\nNot measured yet.\n{END}"
    lines = [
        begin,
        f"{'; '.join(map(machine, runs))}.",
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
                cells += ["did not fit"] * 2 if row["failure"] else map(cell, times)
            for field in ("ms_per_image", "live_mb_per_image"):
                known = ours[field] is not None and first[field] is not None
                grown = ours[field] / first[field] * (first["size"] / size) ** 2 if known else None
                cells.append(cell(grown))
            lines.append(f"| {run['allocator']} | {size} | {ours['images']} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def _backbones(folder: Path, what: str, suffixes: tuple[str, ...]) -> list[dict[str, Any] | None]:
    paths = [folder / f"backbones-{what}-cpu-float32{suffix}.json" for suffix in suffixes]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _over_ours(run: dict[str, Any], ours: str, peer: str, images: int, variants: tuple[str, ...]) -> float | None:
    """Time of the peer over the time of ours, each in its fastest one of these variants."""
    times = []
    for model in (peer, ours):
        of_model = [row for row in run["rows"] if (row["model"], row["images"]) == (model, images)]
        times.append(min((row["ms"] for row in of_model if row["variant"] in variants), default=None))
    return times[0] / times[1] if times[0] and times[1] else None


def _regrets(run: dict[str, Any], direction: str) -> tuple[float, str]:
    """The worst regret, and the workload and direction where it occurs."""
    rows = [r for r in run["rows"] if (r["direction"], r["provider"]) == (direction, "cpp") and r["regret"] is not None]
    return max((r["regret"], f"{r['workload']} {direction}") for r in rows)


def _origin(run: dict[str, Any]) -> str:
    return (
        f"{run['machine']}, {run['threads']} threads, torch {run['versions']['torch']}, {run['date'][:10]}, "
        f"commit {run['commit']}; copy {run['copy_gb_per_s']:.0f} GB/s, matrix product "
        f"{run['matmul_gflop_per_s']:.0f} GFLOP/s"
    )


def _load(folder: Path, dtype: str, allocator: str) -> dict[str, Any]:
    """Loads a result file; raises ValueError if its content does not match its name."""
    path = folder / f"op-cpu-{dtype}{'-raised' if allocator == 'raised' else ''}.json"
    run: dict[str, Any] = json.loads(path.read_text())
    if (run["dtype"], run["allocator"]) != (dtype, allocator):
        raise ValueError(f"{path} contains a run in {run['dtype']} with the {run['allocator']} allocator")
    return run


def render_variants(folder: Path) -> str:
    """For the integrations page: our kernels compared with the original code of each model."""
    begin = opening(VARIANTS, folder)
    run = json.loads((folder / "variants-cpu-float32.json").read_text())
    lines = [
        begin,
        f"{machine(run)}, float32.",
        "",
        "| model (B,N,H,D) | forward: x eager | x compiled | of limit "
        "| forward+backward: x eager | x compiled | of limit |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workload in dict.fromkeys(row["workload"] for row in run["rows"]):
        cells = [cell(find(run, workload, d).get(field)) for d in directions(run) for field in FIELDS]
        lines.append(f"| {workload} | {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def replace(readme: str, table: str) -> str:
    """`readme` with the table of the same kind replaced by `table`."""
    begins = (
        SUMMARY,
        MODELS,
        BEGIN,
        LAYERS,
        GPU,
        BACKBONES,
        FORWARD,
        TRAINING,
        *LEARNING.values(),
        VARIANTS,
        MACHINES,
        LAYER_MACHINES,
        RUNTIMES,
        SEGMENTATION,
        *map(SCENES.format, METRICS),
    )
    kinds = [begin.split("{}")[0] for begin in begins]
    kind = next(kind for kind in kinds if table.startswith(kind))
    before, rest = readme.split(kind, 1)
    return before + table + rest.split(END, 1)[1]


OF_ALL_MACHINES = (render_machines, render_layer_machines, render_runtimes)
ON_GPU: dict[str, tuple[Callable[[Path], str], ...]] = {"docs/benchmarks.md": (render_gpu,)}
ON_CPU: dict[str, tuple[Callable[[Path], str], ...]] = {
    "README.md": (render_summary,),
    "docs/benchmarks.md": (
        render,
        render_machines,
        render_layers,
        render_layer_machines,
        render_models,
        render_backbones,
    ),
    "docs/backbone.md": (render_forward, render_runtimes, render_training),
    "docs/training.md": tuple(partial(render_learning, stem) for stem in LEARNING),
    "docs/detection.md": (partial(render_scenes, "detect"),),
    "docs/segmentation.md": (partial(render_scenes, "segment"), render_segmentation),
    "docs/integrations.md": (render_variants,),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("folder", type=Path, help="bench/results/<machine>")
    folder = parser.parse_args().folder.resolve()
    if not any(folder.glob("*.json")):
        parser.error(f"{folder} has no results")
    documents = ON_GPU if any(folder.glob("op-cuda-*.json")) else ON_CPU
    for name, tables in documents.items():
        path = ROOT / name
        text = path.read_text()
        for table in tables:
            # tables without results of this machine are kept, and those that name the results of another one
            with contextlib.suppress(FileNotFoundError):
                rendered = table(folder)
                shown = rendered.splitlines()[0] in text or table in OF_ALL_MACHINES
                text = replace(text, rendered) if shown and "Not measured yet." not in rendered else text
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

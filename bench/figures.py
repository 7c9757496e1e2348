"""Figures of the documents, as SVG in docs/figures: ``python -m bench.figures`` draws them again.

``speed`` is drawn from result files, ``forms`` and ``costs`` from the definition and the cost model of the two forms of
a layer. Each file has the numbers that it shows in its description, by which a test knows whether it is current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.cells import ROOT
from xformer_kernels.layer import cost

FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "bench" / "results" / "amd-zen3-2-cores-avx2"
LAYERS = ("(1,65536,64,4)", "(1,16384,128,4)", "(8,3136,96,4)")
STACK = "mdta_48 (1,3,128,128)"
GREY, BLUE, ORANGE = "#8c8c8c", "#1f77b4", "#ff7f0e"
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "cpp": "xformer-kernels"}


def speed() -> dict[str, Any]:
    """Time and memory of forward and backward over those of eager PyTorch: layers, and a Restormer-like stack."""
    runs = {name: json.loads((RESULTS / f"{name}-cpu-float32.json").read_text()) for name in ("layer", "model")}
    wanted = [(f"XCA layer\n{shape}", "layer", shape) for shape in LAYERS]
    wanted.append(("Restormer-like\nstack, 128 x 128", "model", STACK))
    shown: dict[str, dict[str, list[float | None]]] = {}
    for label, name, workload in wanted:
        rows = {
            row["provider"]: row
            for row in runs[name]["rows"]
            if (row["workload"], row["direction"]) == (workload, "forward+backward")
        }
        shown[label] = {
            provider: [rows[provider]["ms"] / rows["eager"]["ms"], rows[provider]["memory_of_eager"]]
            for provider in NAMES
            if provider in rows
        }
    run = runs["layer"]
    machine = f"{run['machine']}, {run['threads']} threads, {run['dtype']}, torch {run['versions']['torch']}"
    return {"machine": f"{machine}, {run['date'][:10]}", "of eager": shown}


def draw_speed(plt: Any, facts: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    groups = list(facts["of eager"].items())
    for number, (axis, title) in enumerate(zip(axes, ("time", "memory"), strict=True)):
        for offset, (provider, colour) in enumerate(zip(NAMES, (GREY, ORANGE, BLUE), strict=True)):
            present = [(i, values[provider][number]) for i, (_, values) in enumerate(groups) if provider in values]
            at = [i + 0.27 * (offset - 1) for i, _ in present]
            bars = axis.bar(at, [value for _, value in present], 0.25, color=colour, label=NAMES[provider])
            axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
        axis.set_title(f"{title} of forward + backward, eager = 1 (less is better)", fontsize=10)
        axis.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
        axis.set_ylim(0, 1.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, loc="upper left", ncols=3, frameon=False)
    figure.supxlabel(f"{facts['machine']}. Layers: (images, tokens, channels, heads).", fontsize=8, color=GREY)
    return figure


def forms() -> dict[str, Any]:
    """What the two forms of a layer compute and save: tensors of N tokens, and maps of features."""
    return {
        "direct": [("x", "N x C"), ("q, k, v", "N x 3C"), ("A", "H x D x D"), ("A v", "N x C"), ("y", "N x C")],
        "gram": [
            ("x", "N x C"),
            ("S = xᵀx", "C x C"),
            ("A", "H x D x D"),
            ("M = Wₒ A Wᵥ", "C x C"),
            ("y = M x", "N x C"),
        ],
    }


def draw_forms(plt: Any, facts: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(2, 1, figsize=(8.5, 3.4), layout="constrained")
    arrows = {
        "direct": ("project", "qᵀk, norms, softmax", "mix", "project"),
        "gram": ("one pass over x", "Wq S Wkᵀ, norms, softmax", "multiply", "one pass over x"),
    }
    for axis, (form, boxes) in zip(axes, facts.items(), strict=True):
        axis.set_xlim(-0.5, 4.5)
        axis.set_ylim(-0.75, 0.75)
        axis.axis("off")
        axis.set_title(f'form="{form}"', loc="left", fontsize=10)
        for i, (name, shape) in enumerate(boxes):
            colour = BLUE if shape.startswith("N") else ORANGE
            style = {"boxstyle": "round,pad=0.5", "facecolor": colour, "alpha": 0.2, "edgecolor": colour}
            axis.text(i, 0, f"{name}\n{shape}", ha="center", va="center", fontsize=9, bbox=style)
            if i:
                axis.annotate("", (i - 0.3, 0), (i - 0.7, 0), arrowprops={"arrowstyle": "->", "color": GREY})
                axis.text(i - 0.5, -0.55, arrows[form][i - 1], ha="center", fontsize=7.5, color="#444444")
    figure.supxlabel(
        "Blue: as large as the image. Orange: independent of the number of tokens.", fontsize=8, color=GREY
    )
    return figure


def costs() -> dict[str, Any]:
    """FLOPs and bytes of both forms against tokens, by the cost model: an image of 128 channels, training."""
    C, H = 128, 4
    tokens = [2**i for i in range(4, 17)]
    shapes = [cost.Shape(1, N, C, H, C, C, 4, True) for N in tokens]
    unit = cost.Machine(1, 1, 1, 1, 0)
    works = {"direct": cost.direct, "gram": cost.gram}
    priced = {form: [work(shape, unit) for shape in shapes] for form, work in works.items()}
    return {
        "tokens": tokens,
        "channels": C,
        "GFLOP": {form: [price.flops / 1e9 for price in prices] for form, prices in priced.items()},
        "MB": {form: [price.bytes / 1e6 for price in prices] for form, prices in priced.items()},
    }


def draw_costs(plt: Any, facts: dict[str, Any]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), layout="constrained")
    for axis, unit in zip(axes, ("GFLOP", "MB"), strict=True):
        for form, colour in (("direct", ORANGE), ("gram", BLUE)):
            axis.loglog(facts["tokens"], facts[unit][form], "o-", ms=3, color=colour, label=f'form="{form}"')
        axis.set_xlabel("tokens N")
        axis.set_title(f"{unit}, forward and backward", fontsize=10)
        axis.axvline(facts["channels"], color=GREY, lw=0.8, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.supxlabel(
        "One image, 128 channels, 4 heads, float32. Dotted: N = C. Estimates of layer/cost.py.", fontsize=8
    )
    return figure


FIGURES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any, dict[str, Any]], Any]]] = {
    "speed": (speed, draw_speed),
    "forms": (forms, draw_forms),
    "costs": (costs, draw_costs),
}


def description(name: str) -> str:
    """The numbers that a figure shows."""
    return json.dumps(FIGURES[name][0](), ensure_ascii=True)


def main(folder: Path = FOLDER) -> int:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "xformer-kernels", "font.family": "DejaVu Sans"}):
        for name, (facts, draw) in FIGURES.items():
            metadata = {"Description": description(name), "Date": None}
            draw(plt, facts()).savefig(folder / f"{name}.svg", metadata=metadata)
            plt.close()
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__).parse_args()
    sys.exit(main())

"""What each part of the detector's recipe contributes on made scenes: ``python -m experiments.ablation``.

Runs of `detect_shapes` without one of the parts in which it differs from YOLOv3's rules, and with none of them. Shown
are the metrics after the last epoch, on the held-out scenes.

Runs that are done stay done: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench import machine
from experiments import runs
from experiments.scenes import make_scenes, recipe_of, row_of
from xformer.recipes.tasks import register
from xformer.recipes.tasks.detect import Detect

# name of a row: arguments of the loss, options of the model
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe": ({}, {}),
    "without-iou-objectness": ({"objectness": "one"}, {}),
    "without-several-anchors": ({"anchor_iou": 1.0}, {}),
    "without-several-cells": ({}, {"centre_scale": 1.0}),
    "yolov3": ({"objectness": "one", "anchor_iou": 1.0}, {"centre_scale": 1.0}),
}
for _name, (_loss, _) in CHANGES.items():
    register(f"detect-{_name}")(type(_name, (Detect,), {"loss_options": {**Detect.loss_options, **_loss}}))


def learn(folder: Path, change: str, seed: str, epochs: str) -> runs.Row:
    """One run."""
    recipe = recipe_of(
        "detect", task=f"detect-{change}", data=str(folder.parent / "shapes" / "coco"), out=str(folder),
        seed=int(seed), epochs=int(epochs),
    )  # fmt: skip
    recipe.model_options |= CHANGES[change][1]
    return row_of(recipe, task="detect", model=change)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.ablation", description=__doc__)
    parser.add_argument("--rules", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--epochs", type=int, default=9)
    runs.add_options(parser, [0], "runs/scenes")
    options = parser.parse_args(arguments)
    if options.one:
        runs.write_one(options.one, learn)
        return
    make_scenes(options.work)
    asked = [(rules, seed, options.epochs) for seed in options.seeds for rules in options.rules]
    rows = runs.all_of("experiments.ablation", options.work, asked, options.jobs)
    if options.out:
        facts = {**machine.facts("cpu"), "threads": 1, "recipe": recipe_of("detect").to_dict()}
        runs.save(options.out / machine.slug("cpu") / "scenes-ablation", facts, rows)


if __name__ == "__main__":
    main()

"""What our detector and segmenter learn of made scenes, beside others': ``python -m experiments.scenes``.

All models of a task are trained from scratch, by the same recipe (`detect_shapes`, `segment_shapes`) on the same scenes
(``python -m xformer make-shapes``) in the same order: ours, ours with MobileNetV2 as the backbone, and torchvision's.
Shown are the metrics after the last epoch, on the held-out scenes: no epoch is picked by them.

Scenes are those of WORK/shapes, made by the defaults if there are none. Runs that are done stay done: the same command
goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from bench import machine
from experiments import lraspp, runs, ssdlite  # noqa: F401 (registers the tasks of these names)
from experiments.shapes import make_shapes
from xformer.recipes.settings import Recipe, load_recipe
from xformer.recipes.tasks import find_task

OURS, OTHER = "xformer_xxs", "timm:mobilenetv2_100"
# models of a task, and the registered task of each
MODELS = {
    "detect": {OURS: "detect", OTHER: "detect", "ssdlite320_mobilenet_v3_large": "ssdlite"},
    "segment": {OURS: "segment", OTHER: "segment", "lraspp_mobilenet_v3_large": "lraspp"},
}
FOLDERS = {"detect": "coco", "segment": "cityscapes"}


def recipe_of(of: str, **changes: Any) -> Recipe:
    return load_recipe(f"{of}_shapes", {**changes, **runs.ALONE})


def make_scenes(work: Path) -> None:
    """WORK/shapes, which is whole or not there."""
    folder, part = work / "shapes", work / f"shapes.part-{os.getpid()}"
    if not folder.exists():
        make_shapes(part)
        part.rename(folder)


def learn(folder: Path, task: str, model: str, seed: str, epochs: str) -> runs.Row:
    """One run."""
    data = folder.parent / "shapes" / FOLDERS[task]
    options: dict[str, Any] = {} if MODELS[task][model] == task else {"model_options": {}}
    recipe = recipe_of(
        task, task=MODELS[task][model], model=model, data=str(data), out=str(folder), seed=int(seed),
        epochs=int(epochs), **options,
    )  # fmt: skip
    return row_of(recipe, task=task, model=model)


def row_of(recipe: Recipe, **said: str) -> runs.Row:
    """The row of a run, after training it."""
    result, facts = runs.trained(recipe)
    trained = find_task(recipe.task)(recipe)
    about = {
        "seed": recipe.seed, "epochs": recipe.epochs, "images": trained.data.train_images,
        "parameters": sum(p.numel() for p in trained.build().parameters()),
    }  # fmt: skip
    return {**said, **about, **{name: value for name, value in result.items() if name != "best"}, **facts}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.scenes", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--models", nargs="+", help="those of these names alone")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    runs.add_options(parser, [0, 1], "runs/scenes")
    options = parser.parse_args(arguments)
    if options.one:
        runs.write_one(options.one, learn)
        return
    make_scenes(options.work)
    for task in options.tasks:
        recipe = recipe_of(task)
        models = [model for model in MODELS[task] if model in (options.models or MODELS[task])]
        asked = [(task, model, seed, options.epochs or recipe.epochs) for seed in options.seeds for model in models]
        rows = runs.all_of("experiments.scenes", options.work, asked, options.jobs)
        if options.out and rows:
            facts = {**machine.facts("cpu"), "threads": 1, "recipe": recipe.to_dict()}
            runs.save(options.out / machine.slug("cpu") / f"scenes-{task}", facts, rows)


if __name__ == "__main__":
    main()

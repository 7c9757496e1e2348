"""``python -m xformer train`` and ``eval``."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from xformer.card import Card
from xformer.errors import UsageError
from xformer.files import write_json
from xformer.recipe import Recipe, add_options, from_options
from xformer_kernels.layer import calibration


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train", help="train a model", description="Train. Under torchrun or accelerate launch: on many devices."
    )
    parser.add_argument("--config", default="", help="a .toml or .yaml recipe, or the name of one that comes along")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    parser.add_argument("--show", action="store_true", help="print the settings and stop")
    add_options(parser)
    parser.set_defaults(run=run_train)
    parser = subparsers.add_parser(
        "eval",
        help="metrics of weights",
        description="Evaluate weights on the evaluation images, which are prepared as the weights say.",
    )
    parser.add_argument("--config", default="", help="as in train")
    parser.add_argument("--json", default="", help="also write the metrics to this file")
    add_options(parser)
    parser.set_defaults(run=run_eval)


def run_train(options: argparse.Namespace) -> None:
    recipe = from_options(options.config, options)
    if options.show:
        print(json.dumps(recipe.to_dict(), indent=1))
        return
    from xformer.engine.loop import train

    # a resumed run must use the same forms of layers: none may be chosen by timing
    os.environ.setdefault(calibration.ENVIRONMENT, "off")
    result = train(recipe, options.resume)
    if os.environ.get("RANK", "0") == "0":
        print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))


def run_eval(options: argparse.Namespace) -> None:
    recipe = from_options(options.config, options)
    result = eval_weights(recipe, set(vars(options)), print)
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    if options.json:
        write_json("json", os.path.expanduser(options.json), result)


OF_IMAGES = ("image_size", "crop_pct", "interpolation")


def eval_weights(
    recipe: Recipe, given: set[str] | frozenset[str] = frozenset(), say: Callable[[str], object] = lambda text: None
) -> dict[str, float]:
    """Evaluate ``recipe.weights`` on the evaluation images, in this process, with batch norms folded.

    Images are preprocessed according to the weights' card, except for settings named in `given`. Training images are
    not required. `say` is called with the weights and preprocessing used, and with the number of evaluated images.

    Raises:
        UsageError: no weights or data, weights with other classes than the data, or metrics that are not finite.
    """
    import torch

    from xformer.engine.evaluation import check_finite, evaluate
    from xformer.engine.task import task_class
    from xformer.fuse import fuse_for_inference
    from xformer.weights import load_model

    if not recipe.weights:
        raise UsageError("weights: name the safetensors to evaluate")
    asked: dict[str, Any] = {}
    if "model_options" in given or "attention" in given:
        asked = recipe.model_options | ({"attention": recipe.attention} if recipe.attention else {})
    changes = {"options": asked} if asked else {}
    model, card = load_model(recipe.weights, recipe.model if "model" in given else "", **changes)
    if card.in_chans != 3:
        raise UsageError(f"weights: {recipe.weights} must be of RGB images, got one of {card.in_chans} channels")
    if "task" in given and recipe.task != card.task:
        raise UsageError(f"task: {recipe.weights} is of task {card.task}, got {recipe.task}")
    card = replace(card, **{name: getattr(recipe, name) for name in OF_IMAGES if name in given})
    for name in (*OF_IMAGES, "task"):
        setattr(recipe, name, getattr(card, name))
    recipe.model_options, recipe.attention = dict(card.options), ""
    if recipe.task != "classify" and "batch_size" not in given:
        recipe.batch_size = 1
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    task = task_class(recipe.task)(recipe, weights=card)
    _check_classes(recipe, card, task.data.classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = task.metrics(device)
    say(f"{recipe.weights}: {card.model}, images of {card.preparation()}")
    evaluate(fuse_for_inference(model).to(device), task, metrics, device, recipe.channels_last)
    result = metrics.compute()
    say(f"{task.data.eval_images - task.data.skipped.count} images{task.data.skipped.said()}")
    check_finite(result, task.metric, "the evaluation")
    return result


def _check_classes(recipe: Recipe, card: Card, classes: Sequence[str]) -> None:
    """Raise UsageError if the data and the weights have different classes."""
    if card.num_classes != len(classes):
        raise UsageError(
            f"weights: {recipe.weights} has {card.num_classes} classes, and {recipe.data} has {len(classes)}"
        )
    if card.classes and card.classes != list(classes):
        one = next(pair for pair in zip(card.classes, classes, strict=True) if pair[0] != pair[1])
        raise UsageError(f"weights: {recipe.weights} has a class {one[0]!r} where {recipe.data} has {one[1]!r}")

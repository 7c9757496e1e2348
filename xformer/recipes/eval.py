"""Evaluation: in training, of weights by the command ``eval``, and a trial of one image before training starts."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xformer.errors import UsageError
from xformer.fuse import fuse_for_inference
from xformer.recipes.card import Card
from xformer.recipes.files import write_json
from xformer.recipes.settings import Recipe, add_settings, from_options
from xformer.recipes.tasks import Task, find_task
from xformer.recipes.weights import load_model
from xformer.registry import default_cfgs


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    metrics: Any,
    device: Any,
    channels_last: bool = True,
    autocast: Any = nullcontext,
    together: bool = False,
) -> None:
    """Add this process's share of the evaluation images to `metrics`.

    `together`: the forward is a collective (FSDP), so processes that are done repeat their last batch until all are.
    """
    batches, batch = task.data.evaluate(), None
    while True:
        following = next(batches, None)
        if together:
            left = torch.tensor(float(following is not None), device=device)
            dist.all_reduce(left)
            if not left:
                return
        elif following is None:
            return
        batch = following or batch
        if batch is None:
            raise UsageError("eval_samples: there are fewer evaluation batches than processes")
        outputs, targets = _forward(model, batch, device, channels_last, autocast)
        if following is not None:
            metrics.update(outputs, targets)


def _forward(model: nn.Module, batch: Any, device: Any, channels_last: bool, autocast: Any) -> tuple[Any, Any]:
    from accelerate.utils import send_to_device

    images, targets = send_to_device(batch, device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast():
        return model(images), targets


@torch.no_grad()
def try_evaluation(
    model: nn.Module | None, task: Task, device: Any, channels_last: bool = True, autocast: Any = nullcontext
) -> None:
    """Try everything that an evaluation needs on one image; the model is skipped if None.

    Raises:
        UsageError: missing packages, unreadable images or image sizes for which training or evaluation would fail.
    """
    metrics = task.metrics(device)
    batch = task.data.first_held_out()
    if batch is None or model is None:
        return
    training = model.training
    model.eval()
    images: Tensor = batch[0]
    recipe = task.recipe
    # our models support any size, and check at construction whether it is too small
    others = [] if recipe.model in default_cfgs else [size for size in recipe.sizes if size != images.shape[-1]]
    try:
        metrics.update(*_forward(model, batch, device, channels_last, autocast))
        for size in others:
            images = torch.zeros(1, 3, size, size)
            _forward(model, (images, None), device, channels_last, autocast)
    except (AssertionError, ValueError, RuntimeError) as error:
        if recipe.model in default_cfgs or isinstance(error, (UsageError, torch.OutOfMemoryError)):
            raise
        said = f"{error}".partition("\n")[0]
        raise UsageError(
            f"image_size: {recipe.model} does not take images of {images.shape[-2]} x {images.shape[-1]} pixels "
            f"({said}); many models of timm take model_options img_size"
        ) from error
    finally:
        model.train(training)


def check_finite(metrics: Mapping[str, float], metric: str, evaluation: str) -> None:
    """Check the metrics of an evaluation; `evaluation` names it in the message.

    Raises:
        UsageError: the task's metric or the loss is not finite.
    """
    for name in (metric, "loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            cause = "the model's outputs are not finite" if name == "loss" else "the evaluation data may have no labels"
            raise UsageError(f"data: {evaluation} gives {name} {metrics[name]}: {cause}")


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
    kind = find_task(card.task)
    if kind.eval_batch is not None and "batch_size" not in given:
        recipe.batch_size = kind.eval_batch
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    task = kind(recipe, weights=card)
    _check_classes(recipe, card, task.data.classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    metrics = task.metrics(device)
    say(f"{recipe.weights}: {card.model}, images of {task.preprocessing(card)}")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Evaluate weights on the evaluation images, which are prepared as the weights say."
    parser.add_argument("--config", default="", help="as in train")
    parser.add_argument("--json", default="", help="also write the metrics to this file")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the metrics."""
    recipe = from_options(options.config, options)
    result = eval_weights(recipe, set(vars(options)), print)
    print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
    if options.json:
        write_json("json", os.path.expanduser(options.json), result)

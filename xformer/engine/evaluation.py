"""Evaluation, and a trial evaluation of one image before training starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xformer.engine.task import Task
from xformer.errors import UsageError
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

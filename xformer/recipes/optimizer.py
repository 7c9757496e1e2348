"""Create timm's optimizer and scheduler from the settings of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from xformer.errors import UsageError
from xformer.recipes.settings import Recipe


def create_optimizer(model: nn.Module, recipe: Recipe) -> Any:
    """Create a timm optimizer with timm's parameter groups.

    Raises:
        UsageError: an optimizer that timm does not have, that needs a missing package or device, or that needs second
            derivatives; layer decay for a model whose parameters are all in one layer.
    """
    from timm.optim import create_optimizer_v2

    try:
        optimizer: Any = create_optimizer_v2(
            model, recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay or None
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UsageError(
            f"opt must be an optimiser of timm's, got {recipe.opt!r}: {f'{error}' or type(error).__name__}"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"opt must be an optimiser of first derivatives, got {recipe.opt!r}, which needs create_graph")
    scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
    if recipe.layer_decay not in (0, 1) and len(scales) == 1:
        raise UsageError(
            f"layer_decay must be 0 for {recipe.model}, all of whose parameters are one layer to timm, got "
            f"{recipe.layer_decay}"
        )
    return optimizer


def create_scheduler(optimizer: Any, recipe: Recipe, updates_per_epoch: int) -> Any:
    """Create a cosine schedule with linear warm-up, updated per step."""
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=recipe.epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    return scheduler

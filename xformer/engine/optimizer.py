"""timm's optimiser and schedule from the settings of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from xformer.errors import UsageError
from xformer.recipe import Recipe


def create_optimizer(model: nn.Module, recipe: Recipe) -> Any:
    """Of timm, with parameters in its groups.

    Raises:
        UsageError: an optimiser that timm does not have, that needs a package or device that is not there, or second
            derivatives; layer decay of a model whose parameters are all of one layer.
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
    """A cosine behind a linear warm-up, by steps."""
    from timm.scheduler import create_scheduler_v2

    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=recipe.epochs, min_lr=recipe.min_lr, warmup_lr=recipe.warmup_lr,
        warmup_epochs=recipe.warmup_epochs, step_on_epochs=False, updates_per_epoch=updates_per_epoch,
    )  # fmt: skip
    return scheduler

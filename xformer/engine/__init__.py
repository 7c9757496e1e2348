"""Training engine for all tasks: training, evaluation, checkpoints, logs."""

from __future__ import annotations

from typing import Any

__all__ = ["evaluate", "train"]


def __getattr__(name: str) -> Any:
    """Lazy imports: the help of the commands requires neither accelerate nor timm."""
    if name in __all__:
        from xformer.engine import evaluation, loop

        return {"evaluate": evaluation.evaluate, "train": loop.train}[name]
    raise AttributeError(name)

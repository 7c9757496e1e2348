"""One engine for all tasks: training, evaluation, checkpoints, logs."""

from xformer.engine.train import evaluate, train

__all__ = ["evaluate", "train"]

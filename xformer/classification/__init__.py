"""Image classification."""

from xformer.classification.task import Classify

__all__ = ["Classify"]

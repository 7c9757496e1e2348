"""Images into classes."""

from xformer.classification.task import Classify

__all__ = ["Classify"]

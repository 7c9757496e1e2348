"""Data of training and evaluation: batches that are a function of seed, epoch and place alone.

``order`` says which image comes when, ``loader`` runs worker processes and replaces unreadable images, both for any
task; ``files`` are sources of images, ``classify`` is the task of images and their classes.
"""

from xformer.data.classify import Data, open_data
from xformer.data.images import Skipped, Unreadable, open_image
from xformer.data.order import Shard
from xformer.data.transforms import eval_transform

__all__ = ["Data", "Shard", "Skipped", "Unreadable", "eval_transform", "open_data", "open_image"]

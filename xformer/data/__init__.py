"""Data of training and evaluation: batches that are a function of seed, epoch and place alone (docs/data.md).

``order`` says which image comes when, ``images`` decodes, ``loader`` runs worker processes and replaces unreadable
images, all three for any task. ``files``, and ``shards`` with ``tars``, are sources of images and labels, which
``classify`` makes batches of.
"""

from xformer.data.classify import Data, open_data
from xformer.data.images import Skipped, Unreadable, open_image
from xformer.data.order import Shard
from xformer.data.transforms import eval_transform

__all__ = ["Data", "Shard", "Skipped", "Unreadable", "eval_transform", "open_data", "open_image"]

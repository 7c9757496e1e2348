"""Data loading: batches depend only on seed, epoch and position (docs/data.md).

``order`` determines the order of images, ``images`` decodes, ``loader`` runs worker processes and replaces unreadable
images, all three for any task. ``files``, and ``shards`` with ``tars``, are sources of images and labels, which
``classify`` combines into batches.
"""

from xformer.data.classify import Data, open_data
from xformer.data.images import Skipped, Unreadable, open_image
from xformer.data.order import Shard
from xformer.data.transforms import eval_transform

__all__ = ["Data", "Shard", "Skipped", "Unreadable", "eval_transform", "open_data", "open_image"]

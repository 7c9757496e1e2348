"""Data loading: batches depend only on seed, epoch and position (docs/data.md).

``order`` determines the order of images, ``images`` decodes, ``loader`` runs worker processes and replaces unreadable
images, all three for any task. ``files``, and ``shards`` with ``tars``, are sources of images and labels, which
``classification`` combines into batches; ``detection`` (with ``coco``) and ``segmentation`` have sources of their own.
"""

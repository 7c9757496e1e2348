"""Compute anchors for a data set: ``python -m experiments.anchors instances_train.json``.

k-means over (w, h) of the boxes, with the distance 1 - IoU of two boxes with the same centre (arXiv 1612.08242).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xformer.detection.boxes import shape_iou
from xformer.errors import UsageError
from xformer.recipes.data.coco import read_annotations


def mean_iou(sizes: Tensor, anchors: Tensor) -> float:
    """Mean over boxes (n, 2) of the IoU with the best anchor (k, 2): the objective that k-means maximises."""
    return float(shape_iou(sizes, anchors).amax(1).mean())


def kmeans(sizes: Tensor, k: int = 9, seed: int = 0, steps: int = 100) -> tuple[Tensor, list[float]]:
    """Return anchors (k, 2) by increasing area, and the mean IoU after each step. Deterministic for a given seed.

    Each step assigns every box to its best anchor. Each anchor then becomes the mean or the median of its boxes or
    stays unchanged, whichever has the largest mean IoU with them; the mean alone does not always improve it. So the
    mean IoU never decreases. Initialisation is as in k-means++; iteration stops when no anchor changes.

    Args:
        sizes: (w, h) of the boxes, (n, 2). k: number of anchors. seed: for the initialisation. steps: maximum number.

    Raises:
        UsageError: sizes with a wrong shape, not finite or not positive, or fewer than k distinct ones; k below 1.
    """
    if k < 1:
        raise UsageError(f"k must be 1 or more, got {k}")
    if sizes.dim() != 2 or sizes.shape[1] != 2:
        raise UsageError(f"sizes must be of shape (n, 2), got {tuple(sizes.shape)}")
    sizes = sizes.double().cpu()
    wrong = ~((sizes > 0) & sizes.isfinite()).all(1)
    if wrong.any():
        raise UsageError(f"sizes must be positive and finite, got {tuple(sizes[wrong][0].tolist())}")
    different = len(sizes.unique(dim=0))
    if different < k:
        raise UsageError(f"sizes must be of k={k} different boxes or more, got {different}")
    anchors = _start(sizes, k, torch.Generator().manual_seed(seed))
    history = [mean_iou(sizes, anchors)]
    for _ in range(steps):
        owner = shape_iou(sizes, anchors).argmax(1)
        moved = torch.stack([_centre(sizes[owner == i], anchor) for i, anchor in enumerate(anchors)])
        if torch.equal(moved, anchors):
            break
        anchors = moved
        history.append(mean_iou(sizes, anchors))
    return anchors[anchors.prod(1).argsort(stable=True)], history


def _start(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k distinct boxes, each drawn with probability proportional to its distance to the nearest one so far."""
    chosen = sizes[torch.randint(len(sizes), (1,), generator=generator)]
    for _ in range(k - 1):
        far = 1 - shape_iou(sizes, chosen).amax(1)
        chosen = torch.cat((chosen, sizes[far.clamp_min(0).multinomial(1, generator=generator)]))
    return chosen


def _centre(members: Tensor, anchor: Tensor) -> Tensor:
    if not len(members):
        return anchor
    options = torch.stack((anchor, members.mean(0), members.median(0).values))
    return options[shape_iou(members, options).mean(0).argmax()]


def coco_sizes(path: str | Path, image_size: int = 416) -> Tensor:
    """(w, h), shape (n, 2), of the boxes in a COCO file, scaled to images whose longer side is `image_size`.

    Crowds and boxes without area are skipped.

    Raises:
        UsageError: missing file, or not a COCO instances file.
    """
    said = read_annotations(Path(path))
    image = np.repeat(np.arange(len(said.ids)), np.diff(said.bounds))
    sides = (said.boxes[:, 2:] - said.boxes[:, :2]) * (image_size / said.sizes.max(1)[image])[:, None]
    return torch.from_numpy(sides[~said.crowd].astype(np.float64))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.anchors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("annotations", help="a file of COCO's instances")
    parser.add_argument("--image-size", type=int, default=416, help="what images are resized to")
    parser.add_argument("-k", type=int, default=9, help="how many anchors")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        sizes = coco_sizes(options.annotations, options.image_size)
        anchors, history = kmeans(sizes, options.k, options.seed)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pairs = ", ".join(f"({w:.{_digits(w)}f}, {h:.{_digits(h)}f})" for w, h in anchors.tolist())
    print(f"anchors = ({pairs})\n# mean IoU {history[-1]:.4f} of {len(sizes)} boxes at {options.image_size}")
    return 0


def _digits(value: float) -> int:
    return max(0, 2 - int(math.log10(value)))


if __name__ == "__main__":
    sys.exit(main())

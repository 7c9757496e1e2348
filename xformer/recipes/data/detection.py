"""Data set in COCO's folder layout: batches of images and their boxes.

The target of an image is a dict: boxes (n, 4) float32 as (x0, y0, x1, y1) in pixels of the model's input, labels (n,)
int64, iscrowd (n,) bool, image_id; in evaluation also size and original, the (H, W) of the image in the batch without
padding and of the image in the file.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.data.coco import Annotations, read_annotations
from xformer.recipes.data.images import Skipped, Unreadable, check_resized, notice, open_image
from xformer.recipes.data.order import SINGLE, Replica, digest
from xformer.recipes.data.sets import DataSet, Indexed, indexed, scale_of
from xformer.recipes.data.transforms import Statistics, to_tensor
from xformer.recipes.settings import Recipe
from xformer.registry import MEAN, STD

KEPT = 0.25
"""Minimum fraction of a box's area that must remain in a crop."""

Target = dict[str, Any]


class Pictures(Indexed):
    """Image files of a folder and their annotations."""

    def __init__(self, folder: Path, annotations: Annotations) -> None:
        self.folder, self.annotations = folder, annotations
        self.count = len(annotations.ids)

    def digest(self) -> str:
        said = self.annotations
        return digest(said.ids, said.names, said.sizes, said.boxes, said.labels, said.crowd, said.bounds)

    def name(self, item: int) -> str:
        return str(self.folder / os.fsdecode(self.annotations.names[item]))

    def read(self, item: int) -> tuple[Image.Image, Target]:
        """RGB image and its target in pixels of the file, without sizes."""
        said = self.annotations
        image = open_image(self.name(item))
        height, width = said.sizes[item].tolist()
        if image.size != (width, height):
            turned = image.size == (height, width)
            why = ": EXIF says that the image is turned, and annotations are not" if turned else ""
            raise Unreadable(f"it is {image.width}x{image.height}, and its annotations are of {width}x{height}{why}")
        of_it = slice(said.bounds[item], said.bounds[item + 1])
        arrays = {"boxes": said.boxes[of_it], "labels": said.labels[of_it], "iscrowd": said.crowd[of_it]}
        target: Target = {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}
        return image, target | {"image_id": int(said.ids[item])}


def fitted(image: Image.Image, longer: float) -> tuple[int, int]:
    """(H, W) of the image resized so that its longer side is `longer`."""
    factor = longer / max(image.size)
    return max(1, round(image.height * factor)), max(1, round(image.width * factor))


def letterbox(
    image: Image.Image, target: Target, size: int, mean: Statistics = MEAN, std: Statistics = STD
) -> tuple[Tensor, Target]:
    """Resize to fit and pad at the bottom and right: (3, size, size) float32, and the target."""
    height, width = fitted(image, size)
    x = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR), mean, std)
    factors = torch.tensor((width / image.width, height / image.height) * 2)
    sizes = {"size": (height, width), "original": (image.height, image.width)}
    return F.pad(x, (0, size - width, 0, size - height)), target | sizes | {"boxes": target["boxes"] * factors}


def restore(boxes: Tensor, target: Target) -> Tensor:
    """Boxes (n, 4) in pixels of a letterboxed image to pixels of the file."""
    (height, width), (whole_height, whole_width) = target["size"], target["original"]
    return boxes * boxes.new_tensor((whole_width / width, whole_height / height) * 2)


class DetectTransform:
    """Convert image and target of :class:`Pictures` to (3, size, size) float32 and the target in its pixels.

    In training: horizontal flip, color jitter, resizing so that the longer side is `size` times a random factor from
    ``scale``, and a crop or padding at a random position. Boxes are clipped; those that keep less than KEPT of their
    area or have a side below one pixel are dropped. In evaluation: :func:`letterbox`. Padding has the mean colour.
    """

    def __init__(self, recipe: Recipe, weights: Card | None = None) -> None:
        from torchvision.transforms import v2

        self.scale, hflip, color_jitter = scale_of(recipe), recipe.hflip, recipe.color_jitter
        self.statistics = (MEAN, STD) if weights is None else (weights.mean, weights.std)
        changes = [v2.RandomHorizontalFlip(hflip)]
        if color_jitter:
            changes.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter))
        self.change = v2.Compose(changes)

    def __call__(self, image: Image.Image, target: Target, size: int, training: bool) -> tuple[Tensor, Target]:
        if not training:
            return letterbox(image, target, size, *self.statistics)
        from torchvision.transforms.v2 import functional as transforms
        from torchvision.tv_tensors import BoundingBoxes

        boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(image.height, image.width))
        image, boxes = self.change(image, boxes)
        height, width = fitted(image, size * random.uniform(*self.scale))
        check_resized(height, width)
        image, boxes = (transforms.resize(part, [height, width]) for part in (image, boxes))
        left, top = (random.randint(min(0, side - size), max(0, side - size)) for side in (width, height))
        x = transforms.crop(to_tensor(image), top, left, size, size)
        cut = transforms.clamp_bounding_boxes(transforms.crop(boxes, top, left, size, size))
        before, after = (part.as_subclass(Tensor) for part in (boxes, cut))
        sides = after[:, 2:] - after[:, :2]
        kept = (sides >= 1).all(1) & (sides.prod(1) >= KEPT * (before[:, 2:] - before[:, :2]).prod(1))
        rest = {key: target[key][kept] for key in ("labels", "iscrowd")}
        return x, target | rest | {"boxes": after[kept]}


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Stack images to (B, 3, size, size); targets stay a list."""
    return torch.stack([x for x, _ in samples]), [target for _, target in samples]


TRAIN, VAL = "train2017", "val2017"


def open_coco(root: Path, replica: Replica = SINGLE) -> tuple[Pictures, Pictures]:
    """Open the training and evaluation images; the latter with the data set for pycocotools.

    Raises:
        UsageError: missing files or folders, annotations rejected by :func:`read_annotations`, different categories in
            the two files, or a file without boxes other than crowds.
    """
    train, held_out = (open_split(root, split, replica) for split in (TRAIN, VAL))
    ours, theirs = train.annotations.categories, held_out.annotations.categories
    if ours != theirs:
        one = sorted(set(ours.items()) ^ set(theirs.items()))[0]
        raise UsageError(f"annotations: the files in {root} must have the same categories, but one alone has {one}")
    return train, held_out


def open_split(root: Path, split: str, replica: Replica) -> Pictures:
    """Open the images of TRAIN or VAL.

    Raises:
        UsageError: as :func:`open_coco`.
    """
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file() or not (root / split).is_dir():
        raise UsageError(f"data must be a folder with {split}/ and annotations/{file.name}, got {str(root)!r}")
    said = read_annotations(file, truth=split == VAL)
    if said.dropped:
        notice(replica, "%s: %d boxes without area are left out", file, said.dropped)
    if said.root:
        notice(replica, "%s: category %s is of no box and above all others: it is no class", file, said.root)
    if said.crowd.all():
        raise UsageError(
            f"annotations: {file.name} in {root} has no boxes to be found, but for {len(said.crowd)} of crowds"
        )
    return Pictures(root / split, said)


class CocoData(DataSet):
    """Data set of a folder with annotations/, train2017/ and val2017/.

    ``classes`` are the category names, ``held_out`` the annotations of the evaluation images. `weights`: see
    :class:`xformer.recipes.tasks.Task`.

    Raises:
        UsageError: as :func:`open_coco`; invalid settings, fewer images than a batch.
    """

    def __init__(self, recipe: Recipe, replica: Replica, weights: Card | None = None) -> None:
        prepare, root = DetectTransform(recipe, weights), Path(recipe.data)
        train, held_out = open_coco(root, replica) if weights is None else (None, open_split(root, VAL, replica))
        self.held_out = held_out.annotations
        self.classes = list(self.held_out.categories.values())
        self.dropped = sum(source.annotations.dropped for source in (train, held_out) if source is not None)
        super().__init__(recipe, replica, indexed(recipe, replica, train, held_out), prepare, collate, Skipped())

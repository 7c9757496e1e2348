"""A task in one file: the brightness of an image, from 0 to 1, given in its file name: ``a-0.75.png``."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from xformer.recipes.data.images import Skipped, open_image
from xformer.recipes.data.order import digest
from xformer.recipes.data.sets import DataSet, Indexed, indexed
from xformer.recipes.data.transforms import to_tensor
from xformer.recipes.tasks import Option, Predictor, Task, register


class Brightness(nn.Module):
    """Images (B, 3, H, W) to a number (B, 1) between 0 and 1."""

    def __init__(self, name, num_classes, in_chans=3, width=8):
        super().__init__()
        self.conv, self.head = nn.Conv2d(in_chans, width, 3, padding=1), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3))).sigmoid()


class Photos(Indexed):
    def __init__(self, folder):
        self.paths = sorted(folder.glob("*.png"))
        self.count = len(self.paths)

    def digest(self):
        return digest([path.name for path in self.paths])

    def name(self, item):
        return str(self.paths[item])

    def read(self, item):
        return open_image(self.paths[item]), float(self.paths[item].stem.partition("-")[2])


class PhotoData(DataSet):
    classes = ("brightness",)

    def __init__(self, recipe, replica, weights):
        train, held_out = (Photos(Path(recipe.data, part)) for part in ("train", "val"))
        content = indexed(recipe, replica, train if weights is None else None, held_out)
        super().__init__(recipe, replica, content, prepared, collate, Skipped())


def prepared(image, target, size, training):
    return to_tensor(image), target


def collate(samples):
    images, targets = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(targets)[:, None]


class Closeness:
    """1 minus the mean error."""

    def __init__(self):
        self.errors = []

    def update(self, outputs, targets):
        self.errors += (outputs - targets).abs().flatten().tolist()

    def compute(self):
        return {"closeness": 1 - sum(self.errors) / len(self.errors)}


class BrightnessPredictor(Predictor):
    columns = ("brightness",)

    def __init__(self, model, card, names, percent=False):
        super().__init__(model, card, names)
        self.percent = percent

    def __call__(self, images):
        return [({"brightness": float(self.model(to_tensor(image)[None]))}, None) for image in images]

    def rows(self, found):
        return [(f"{found['brightness']:.0%}" if self.percent else f"{found['brightness']:.2f}",)]


@register("brightness")
class BrightnessTask(Task):
    metric, model, dataset, predictor = "closeness", Brightness, PhotoData, BrightnessPredictor
    options = {"percent": Option(False, "print percent")}  # noqa: RUF012
    unused = ("mixup", "cutmix")

    def loss(self, outputs, targets):
        return F.mse_loss(outputs, targets)

    def metrics(self, device):
        return Closeness()

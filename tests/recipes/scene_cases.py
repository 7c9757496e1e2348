"""Synthetic scenes in the layouts of COCO and Cityscapes, and recipes with a few steps on them."""

from __future__ import annotations

from experiments.shapes import make_shapes
from xformer.recipes.settings import load_recipe

ANCHORS = [[6, 6], [8, 8], [10, 10], [12, 12], [14, 14], [16, 16], [20, 20], [24, 24], [30, 30]]
LAYOUTS = {"detect": "coco", "segment": "cityscapes"}
OPTIONS = {  # predictions of random weights depend on all of them
    "detect": {"widths": [16, 16, 16], "anchors": ANCHORS, "centre_scale": 2.0, "zero_init_last": False},
    "segment": {"width": 32, "zero_init_last": False},
}


def make_scenes(folder):
    """Writes 8 training and 3 evaluation scenes of 64 x 96 pixels in both layouts."""
    make_shapes(folder, images=8, held_out=3, size=(64, 96))
    return folder


def recipe(task, folder, out="unused", **changes):
    settings = {
        "task": task, "data": str(folder / LAYOUTS[task]), "out": str(out), "image_size": 64, "batch_size": 4,
        "epochs": 2, "scale": [0.75, 1.5], "workers": 0, "threads": 1, "tensorboard": False, "log_every": 1, "lr": 1e-3,
        "color_jitter": 0.2, "model_options": OPTIONS[task], "warmup_epochs": 0.0,
    }  # fmt: skip
    return load_recipe("", settings | changes)

"""Helpers that start training runs as processes and compare the files that they write."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from xformer.recipes.settings import load_recipe
from xformer.recipes.weights import load_model, load_weights

ROOT = Path(__file__).parents[2]
CLASSES = ("dark", "light", "middle")


def make_images(root):
    """Writes 48 training and 12 evaluation images of noise around a brightness, which determines the class."""
    numbers = torch.Generator().manual_seed(0)
    for split, count in (("train", 16), ("val", 4)):
        for name, level in zip(CLASSES, (60, 200, 130), strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-40, 40, (40, 40, 3), generator=numbers)
                Image.fromarray((noise + level).to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return root


def settings(images, out, **changes):
    return {
        "data": str(images), "out": str(out), "epochs": 2, "batch_size": 8, "workers": 0, "warmup_epochs": 0.0,
        "log_every": 2, "lr": 1e-3, "ema": 0.0, "threads": 1, "tensorboard": False, **changes,
    }  # fmt: skip


def recipe(images, out, **changes):
    return load_recipe("small", settings(images, out, **changes))


def command(images, out, *more, **changes):
    options = []
    for key, value in settings(images, out, **changes).items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return ["-m", "xformer", "train", "--config", "small", *options, *more]


HARD = {"ema": 0.9, "drop_path": 0.2, "mixup": 0.2, "reprob": 0.3, "sizes": [32, 48], "checkpoint_every": 4}
"""All settings that use random numbers, and checkpoints within an epoch."""


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def run(arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment()
    )


def rows(path, *without):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def curves(out):
    return rows(out / "train.csv", "images/s"), rows(out / "eval.csv")


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same_run(a, b):
    assert curves(a) == curves(b)
    assert same_tensors(*(load_weights(out / "last.safetensors")[0] for out in (a, b)))


def assert_equal_steps(a, b, tolerance=1e-3):
    """Asserts equal losses and parameters, up to the rounding of sums in a different order."""
    losses, others = (curves(out)[0] for out in (a, b))
    assert [row["step"] for row in losses] == [row["step"] for row in others]
    for row, other in zip(losses, others, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=tolerance / 10)
    first, second = (load_model(out / "last.safetensors")[0] for out in (a, b))
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        scale = parameter.abs().max().clamp_min(1e-3)
        assert (parameter - other).abs().max() <= tolerance * scale, name

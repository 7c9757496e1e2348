"""Checkpoints, written atomically as folders.

    out/checkpoints/step-00001234/   model.safetensors  ema.safetensors  optimizer.pt  state.json

A checkpoint is written under a temporary name and renamed once it is completely on disk. Loading one executes no code:
tensors are safetensors, or loaded by ``torch.load(weights_only=True)``. One process writes, all processes read.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.files import PART, sync_folder, to_json, write_atomically, writing
from xformer.recipes.settings import Recipe
from xformer.recipes.tasks import Data
from xformer.recipes.weights import load_weights, save_weights

STATE: dict[str, tuple[type, ...]] = {
    "step": (int,), "evaluated": (int,), "best": (int, float, type(None)), "world": (int,), "loss_sum": (int, float),
    "loss_count": (int,), "scaler": (dict, type(None)), "recipe": (dict,), "classes": (list,), "samples": (dict,),
}  # fmt: skip
"""Contents of ``state.json``. evaluated: step of the last evaluation. samples: digests of the lists of samples."""

FREE = {
    "out", "data", "train_shards", "eval_shards", "workers", "threads", "compile", "channels_last", "eval_every",
    "checkpoint_every", "keep", "log_every", "tensorboard", "weights", "partial", "grad_checkpointing",
}  # fmt: skip
"""Settings that may change when a run is resumed: they do not affect its result, except for rounding."""


# not accelerate's save_state: it pickles random states, and a killed run leaves a part of it
class Checkpoints:
    """The checkpoints of a run, newest last.

    Args:
        out: folder of the run.
        keep: number of checkpoints to keep.
    """

    def __init__(self, out: str | Path, keep: int = 2) -> None:
        self.folder = Path(out) / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        found = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name))
        return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.partition("-")[2]))

    def save(
        self,
        step: int,
        card: Card,
        weights: Mapping[str, Mapping[str, Tensor]],
        optimizer: dict[str, Any],
        state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint, and remove those beyond `keep` and leftovers of killed runs.

        Raises:
            UsageError: it cannot be written; earlier checkpoints are kept.
        """
        with writing("out", self.folder):
            return self._save(step, card, weights, optimizer, state)

    def _save(
        self,
        step: int,
        card: Card,
        weights: Mapping[str, Mapping[str, Tensor]],
        optimizer: dict[str, Any],
        state: dict[str, Any],
    ) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        part = self.folder / f"{PART}{step}"
        part.mkdir()
        for name, tensors in weights.items():
            save_weights(part / f"{name}.safetensors", tensors, card)
        with open(part / "optimizer.pt", "wb") as file:
            try:
                torch.save(optimizer, file)
            except RuntimeError as error:  # torch's zip writer hides the OSError of the file
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            file.flush()
            os.fsync(file.fileno())
        write_atomically(part / "state.json", to_json(state, indent=1))
        sync_folder(part)
        path = self._path(step)
        if path.exists():  # a checkpoint of the same step is replaced
            self._remove(path)
        part.rename(path)
        sync_folder(self.folder)
        for old in self.all()[: -self.keep]:
            self._remove(old)
        return path

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def amend(self, step: int, changes: dict[str, Any]) -> None:
        """Update some of the state of a checkpoint.

        Raises:
            UsageError: it cannot be written.
        """
        path = self._path(step) / "state.json"
        with writing("out", path):
            write_atomically(path, to_json(json.loads(path.read_text()) | changes, indent=1))

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint. It is renamed first, so that a folder named as a checkpoint is always complete."""
        trash = path.with_name(f"{PART}old-{path.name}")
        path.rename(trash)
        shutil.rmtree(trash)

    def _clear(self) -> None:
        for left in self.folder.glob(f"{PART}*"):
            shutil.rmtree(left)

    def load(self, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
        """Return the weights by name, the optimizer state, and the contents of ``state.json``.

        Raises:
            UsageError: the checkpoint cannot be read.
        """
        hint = "remove it to go on from an earlier one"
        weights = {file.stem: load_weights(file)[0] for file in path.glob("*.safetensors")}
        try:
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
            state = json.loads((path / "state.json").read_text())
        except Exception as error:  # zip, pickle, JSON and file errors
            said = f"{error}".partition("\n")[0]
            raise UsageError(f"resume: {path} cannot be read ({said}): {hint}") from error
        for key, kinds in STATE.items():
            if not isinstance(state, dict) or key not in state or not isinstance(state[key], kinds):
                raise UsageError(f"resume: {path} is damaged: its state.json has no {key} as runs write it: {hint}")
        if "model" not in weights:
            raise UsageError(f"resume: {path} has no model.safetensors: {hint}")
        return weights, optimizer, state


def check_same_run(path: Path, state: dict[str, Any], recipe: Recipe, world: int, data: Data) -> None:
    """Check that a checkpoint is of a run with these settings, classes and samples.

    Raises:
        UsageError: it is not.
    """
    now = recipe.to_dict() | {"world": world}
    then = state["recipe"] | {"world": state["world"]}
    changed = [key for key in now if key not in FREE and now[key] != then.get(key)]
    if changed:
        key = changed[0]
        raise UsageError(
            f"resume: {path} was made with {key}={then.get(key)!r}, and this run has {now[key]!r}"
            + (f" ({', '.join(changed[1:])} differ too)" if changed[1:] else "")
        )
    was, own = state["classes"], list(data.classes)
    if was != own:
        pairs = enumerate(itertools.zip_longest(was, own))
        number, (old, new) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        raise UsageError(
            f"resume: {path} has {len(was)} classes and {recipe.data} has {len(own)}, of which number {number} was "
            f"{old!r} and is {new!r}"
        )
    for part, digest in data.samples.items():
        if digest != state["samples"].get(part):
            raise UsageError(
                f"resume: {path} was made with other {part} samples than {recipe.data} has now: give back those that "
                f"were there, or name another --out"
            )

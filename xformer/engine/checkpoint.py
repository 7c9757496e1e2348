"""Checkpoints: folders that are whole or not there.

    out/checkpoints/step-00001234/   model.safetensors  ema.safetensors  optimizer.pt  state.json

A checkpoint is written under another name and renamed when all of it is on the disk. Reading one runs no code:
tensors are safetensors, or ``torch.load(weights_only=True)``. It is written by one process and read by all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xformer.errors import UsageError
from xformer.files import PART, sync_folder, write_atomically
from xformer.weights import Card, load_weights, save_weights


class Checkpoints:
    """Those of a run, newest last.

    Args:
        out: the run's folder.
        keep: how many stay.
    """

    def __init__(self, out: str | Path, keep: int = 2) -> None:
        self.folder = Path(out) / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.partition("-")[2]))

    def save(
        self,
        step: int,
        card: Card,
        weights: Mapping[str, Mapping[str, Tensor]],
        optimizer: dict[str, Any],
        state: dict[str, Any],
    ) -> Path:
        """Write one, then remove those beyond `keep` and what killed runs have left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        part = self.folder / f"{PART}{step}"
        part.mkdir()
        for name, tensors in weights.items():
            save_weights(part / f"{name}.safetensors", tensors, card)
        with open(part / "optimizer.pt", "wb") as file:
            torch.save(optimizer, file)
            file.flush()
            os.fsync(file.fileno())
        write_atomically(part / "state.json", json.dumps(state, indent=1))
        sync_folder(part)
        path = self.folder / f"step-{step:08d}"
        if path.exists():  # of the same step, and the run says that it is to be replaced
            self._remove(path)
        part.rename(path)
        sync_folder(self.folder)
        for old in self.all()[: -self.keep]:
            self._remove(old)
        return path

    def _remove(self, path: Path) -> None:
        """Its name goes first: what has a checkpoint's name is a whole one."""
        trash = path.with_name(f"{PART}old-{path.name}")
        path.rename(trash)
        shutil.rmtree(trash)

    def _clear(self) -> None:
        for left in self.folder.glob(f"{PART}*"):
            shutil.rmtree(left)

    def load(self, path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
        """Weights by name, the optimiser's state, and what else there is.

        Raises:
            UsageError: a checkpoint that cannot be read.
        """
        weights = {file.stem: load_weights(file)[0] for file in path.glob("*.safetensors")}
        try:
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
            state = json.loads((path / "state.json").read_text())
        except Exception as error:  # zip, pickle, JSON and file errors
            said = f"{error}".partition("\n")[0]
            raise UsageError(
                f"resume: {path} cannot be read ({said}): remove it to go on from an earlier one"
            ) from error
        return weights, optimizer, state

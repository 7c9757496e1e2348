"""Logging of a run: CSV files, TensorBoard events and a progress bar. Only the main process logs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xformer.errors import UsageError
from xformer.recipes.files import write_file, writing


# not accelerate's trackers: they would keep the rows that a resumed run writes again
class Table:
    """A CSV file with a step per row; on resume, rows after step `after` are removed."""

    def __init__(self, path: Path, after: int) -> None:
        self.path = path
        rows: list[dict[str, Any]] = []
        if path.is_file():
            rows = _rows(path, after)
        self.names = list(rows[0]) if rows else []
        text = io.StringIO()
        self._writer(text, bool(rows)).writerows(rows)
        write_file("out", path, text.getvalue())

    def _writer(self, file: Any, header: bool) -> csv.DictWriter[str]:
        writer = csv.DictWriter(file, self.names, extrasaction="ignore", lineterminator="\n")
        if header:
            writer.writeheader()
        return writer

    def add(self, row: dict[str, Any]) -> None:
        first = not self.names
        if first:
            self.names = list(row)
        with writing("out", self.path), open(self.path, "a", newline="") as file:
            self._writer(file, first).writerow(row)


def _rows(path: Path, after: int) -> list[dict[str, Any]]:
    """Rows of a CSV file up to step `after`.

    Raises:
        UsageError: the file cannot be read, or a row is invalid; an incomplete last line is ignored.
    """
    rows = []
    try:
        whole = path.read_text(encoding="utf-8-sig").rpartition("\n")[0]  # a killed run may leave an incomplete line
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"resume: {path} cannot be read: {error}") from error
    for number, row in enumerate(csv.DictReader(whole.splitlines()), 2):
        step = row.get("step") or ""
        if not step.isdecimal() or None in row:
            raise UsageError(
                f"resume: line {number} of {path} is no row of this log, which has one value for each name of the "
                f"first line: mend it or remove the file"
            )
        if int(step) <= after:
            rows.append(row)
    return rows


class Log:
    """Log of a run in the folder `out`, at `step` of `steps`, last evaluated at step `evaluated`."""

    def __init__(self, out: Path, step: int, evaluated: int, steps: int, tensorboard: bool, main: bool) -> None:
        self.main = main
        self.console = Console(stderr=True, quiet=not main)
        self.writer: Any = None
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        self.progress = Progress(*columns, console=self.console, disable=not (main and self.console.is_terminal))
        self.bar = self.progress.add_task("train", total=steps, completed=step, said="")
        if main:
            self.tables = {"train": Table(out / "train.csv", step), "eval": Table(out / "eval.csv", evaluated)}
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Log:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def add(self, table: str, row: dict[str, Any]) -> None:
        """Add a row to ``train.csv`` or ``eval.csv``, and the same values to TensorBoard."""
        if not self.main:
            return
        self.tables[table].add({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
        if self.writer is not None:
            with writing("out", self.writer.log_dir):
                for name, value in row.items():
                    if name != "step":
                        self.writer.add_scalar(f"{table}/{name}", value, row["step"])
                self.writer.flush()
        shown = "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        if table == "train" and self.console.is_terminal:
            self.progress.update(self.bar, said=shown)
        else:
            self.say(f"{table}  {shown}")

    def advance(self, step: int) -> None:
        self.progress.update(self.bar, completed=step)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

"""The performance figures of this machine, from which ``form="auto"`` chooses: measured once and kept in a file.

At the first layer on the CPU for which the built-in figures estimate the costs of the two forms to be within a factor
of CLOSE, both forms are timed for a few shapes, and the figures are fitted to these times. If the measured figures
estimate the costs of a layer's forms to be within a factor of cost.MARGIN, both are timed for that layer; the result is
used for layers of its shape, with batch size and number of tokens rounded to an eighth of an octave. Figures and
results are kept in the user's cache directory, in one file per processor, number of threads, torch version and
instruction level.

``XFORMER_KERNELS_CALIBRATION=off`` selects the built-in figures and disables measurements; any other value is the path
of the file. The built-in figures are also used if results must not depend on timings
(``torch.use_deterministic_algorithms``) or on the machine (a group of ranks). If a compiler, mode, transform or
profiler observes the call, nothing is measured, and the figures known so far are used.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from xformer_kernels import backends
from xformer_kernels.layer import cost, timing

ENVIRONMENT = "XFORMER_KERNELS_CALIBRATION"
VERSION = 6
"""Version of the format of the file and of the speed of the layers: figures of slower ones are measured again."""
CLOSE = 3.0
MOST_FORMS = 4096


@dataclass(frozen=True)
class Key:
    """The configuration that measured figures are valid for."""

    processor: str
    threads: int
    torch: str
    level: str

    @property
    def file_name(self) -> str:
        text = f"layer-{VERSION}-{self.processor}-{self.threads}-{self.torch}-{self.level}"
        return re.sub(r"[^A-Za-z0-9._+]+", "-", text) + ".json"


@dataclass
class Known:
    """The contents of a file: ``machines`` by dtype, ``timed`` by shape.

    ``path`` is None if no file is written. ``measures`` becomes False if no figures fit the measured times: layers are
    then timed if the built-in figures put their forms within a factor of CLOSE, and nothing more is written.
    """

    path: Path | None
    date: str = ""
    machines: dict[str, cost.Machine] = field(default_factory=dict)
    timed: dict[str, str] = field(default_factory=dict)
    measures: bool = True

    def source(self, dtype: torch.dtype) -> str:
        if name(dtype) not in self.machines:
            return "built-in" if self.measures else "built-in, since none fit what was measured"
        return f"measured {self.date}, " + (f"in {self.path}" if self.path else "kept in this process")


_known: dict[tuple[str, int], Known] = {}
_forms: dict[tuple[Any, ...], str] = {}
_measuring = threading.Lock()


def forget() -> None:
    """Clears the caches: files are read again, and forms chosen again."""
    _known.clear()
    _forms.clear()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------------------------------------------------- choosing


def decided(s: cost.Shape, dtype: torch.dtype) -> str | None:
    """The form of a layer on the CPU, if :func:`decide` has cached it; looked up at every call."""
    return _forms.get(_key_of(s, dtype))


def _key_of(s: cost.Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """The shape and dtype with everything else that the form depends on."""
    return os.environ.get(ENVIRONMENT), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), dtype, s


def decide(s: cost.Shape, dtype: torch.dtype, seconds: Callable[[str], float] | None) -> str:
    """The form of a layer on the CPU. ``seconds(form)`` times the layer; None: nothing may be measured now."""
    known = in_use()
    if known is None:
        found = cost.cheaper(s, cost.built_in("cpu"))
    elif seconds is None or not _measuring.acquire(blocking=False):
        figures = known.machines.get(name(dtype), cost.built_in("cpu"))
        return known.timed.get(_bucket(s, dtype)) or cost.cached(s, figures)
    else:
        try:
            found = _measured(s, dtype, known, seconds)
        finally:
            _measuring.release()
    if len(_forms) >= MOST_FORMS:
        _forms.clear()
    _forms[_key_of(s, dtype)] = found
    return found


def is_off() -> bool:
    """Whether results must not depend on measurements, or the clock is too coarse to measure."""
    return (
        os.environ.get(ENVIRONMENT) == "off"
        or torch.are_deterministic_algorithms_enabled()
        or not timing.usable_clock()
    )


def in_use() -> Known | None:
    """The current figures and timings, read from the file at the first call; None: use the built-in figures."""
    if is_off():
        return None
    where = (os.environ.get(ENVIRONMENT) or "", torch.get_num_threads())
    if where not in _known:
        _known[where] = load(path(), key())
    return _known[where]


def machine(device: str, dtype: torch.dtype) -> tuple[cost.Machine, str]:
    """The figures known so far, and their source; measures nothing."""
    known = in_use() if device == "cpu" else None
    if known is None:
        return cost.built_in(device), "built-in"
    return known.machines.get(name(dtype), cost.built_in(device)), known.source(dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant(device: str, dtype: torch.dtype) -> list[float]:
    """The figures of :func:`machine`, as a constant for graphs."""
    return list(machine(device, dtype)[0])


def answer(s: cost.Shape, dtype: torch.dtype) -> str | None:
    """The form that was faster when both were timed for a layer of this shape; None if they were not."""
    known = in_use()
    return None if known is None else known.timed.get(_bucket(s, dtype))


def _measured(s: cost.Shape, dtype: torch.dtype, known: Known, seconds: Callable[[str], float]) -> str:
    figures, margin = known.machines.get(name(dtype)), cost.MARGIN
    if figures is None:
        figures, margin = cost.built_in("cpu"), CLOSE
        found = timing.measure(dtype) if known.measures and cost.within(CLOSE, s, figures) else None
        if found is not None:
            known.machines[name(dtype)], known.date = found, now()
            save(known, key())
            figures, margin = found, cost.MARGIN
        elif cost.within(CLOSE, s, figures):
            known.measures = False
    if not cost.within(margin, s, figures):
        return cost.cheaper(s, figures)
    bucket = _bucket(s, dtype)
    if bucket not in known.timed:
        known.timed[bucket] = timing.faster(seconds, cost.ratio(s, figures))
        if known.measures:
            save(known, key())
    return known.timed[bucket]


def _bucket(s: cost.Shape, dtype: torch.dtype) -> str:
    """The shape, with batch size and number of tokens rounded to an eighth of an octave, as they vary with images."""
    B, N = (round(2 ** (round(8 * math.log2(n)) / 8)) if n > 0 else 0 for n in (s.B, s.N))
    numbers = dict(
        s._asdict(), B=B, N=N, training=int(s.training), layer_norm=int(s.layer_norm), kernels=int(s.kernels)
    )
    return " ".join([name(dtype), *(f"{field}={number}" for field, number in numbers.items())])


# ----------------------------------------------------------------------------------------------------------------- file


@cache
def _processor() -> str:
    from xformer_kernels.info import processor_name

    return processor_name()


def key() -> Key:
    cpp = backends.load("cpp")[0]
    level = "none" if cpp is None else cpp.module.LEVEL or "baseline"
    return Key(_processor(), torch.get_num_threads(), torch.__version__, level)


def path() -> Path:
    """The path of the file in use, whether or not it exists."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named).expanduser()
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "xformer-kernels" / key().file_name


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


_BAD = (OSError, ValueError, TypeError, KeyError, AttributeError)
"""The exceptions raised when a malformed file is read."""


def load(file: Path, of: Key) -> Known:
    """Reads a file. If it is malformed or of another key, warns, leaves it unchanged and disables writing."""
    try:
        return _read(file, of)
    except (FileNotFoundError, NotADirectoryError):
        return Known(file)
    except _BAD as error:
        warnings.warn(
            f"{file} is not used: {error}; python -m xformer_kernels.calibrate --force writes a new one",
            RuntimeWarning,
            stacklevel=2,
        )
        return Known(None)


def _read(file: Path, of: Key) -> Known:
    held = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(held, dict) or held.get("version") != VERSION:
        raise ValueError(f"it is no calibration of version {VERSION}")
    if set(held) != {"version", "key", "date", "machines", "timed"} or held["key"] != asdict(of):
        raise ValueError(f"it is not of {of}")
    machines = {dtype: cost.Machine(**figures) for dtype, figures in held["machines"].items()}
    for figure in (x for figures in machines.values() for x in figures):
        if not isinstance(figure, (int, float)) or isinstance(figure, bool) or not 0 < figure < math.inf:
            raise ValueError(f"{figure!r} is no figure above 0")
    if not all(each in timing.FORMS for each in held["timed"].values()) or not isinstance(held["date"], str):
        raise ValueError("it holds what is no form, or no date")
    return Known(file, held["date"], machines, dict(held["timed"]))


def save(known: Known, of: Key, merge: bool = True) -> str:
    """Writes the file atomically, merged with timings that other processes have added. Returns the error, or ""."""
    if known.path is None:
        return "a file is there that cannot be used"
    try:
        if merge:
            with contextlib.suppress(*_BAD):
                known.timed = {**_read(known.path, of).timed, **known.timed}
        machines = {dtype: figures._asdict() for dtype, figures in known.machines.items()}
        held = {"version": VERSION, "key": asdict(of), "date": known.date, "machines": machines, "timed": known.timed}
        known.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=known.path.parent, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            json.dump(held, file, indent=1)
        os.replace(file.name, known.path)
    except OSError as error:
        return str(error)
    return ""

"""Autotuning configs (block sizes, num_warps, num_stages) of every kernel: a built-in table, and an autotuner.

A config depends on the kernel, the dtype, the number of features, the map and the architecture, but not on the number
of tokens, batches or heads. With ``XFORMER_KERNELS_AUTOTUNE=1``, the first launch with a new cache key times the
candidate configs, and stores the fastest in ``tuned.json`` under ``XFORMER_KERNELS_CACHE``
(``~/.cache/xformer-kernels``). Later processes read this file if ``XFORMER_KERNELS_AUTOTUNE=1`` is set.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from xformer_kernels.backends.triton import replay
from xformer_kernels.backends.triton.table import TABLE

Result = TypeVar("Result")
AUTOTUNE = "XFORMER_KERNELS_AUTOTUNE"
CACHE = "XFORMER_KERNELS_CACHE"


class Config(NamedTuple):
    """Block sizes and compiler options of a kernel.

    block_n: tokens per tile. block_o: output features per tile. block_k: features per step of a matrix product.
    warps: num_warps. stages: num_stages. registers: maxnreg, the maximum number of registers per thread (0: chosen by
    ptxas, which spills a few values for higher occupancy).
    """

    block_n: int
    block_o: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """The compiler options."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return {**options, "maxnreg": self.registers} if self.registers else options


class Key(NamedTuple):
    """Autotuning cache key, without the architecture. `features`: number of features of the widest operand."""

    kernel: str
    dtype: torch.dtype
    features: int
    map: str


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KERNELS = ("gram", "gram_normalised", "apply", "forward", "map_backward", "gradients", "channel_mix")
IN_PARTS = ("gram_tf32x3", "apply_tf32x3", "forward_tf32x3", "gradients_tf32x3", "layer_gram_tf32x3")
"""Variants of the kernels whose float32 products are three products of tf32."""
LAYER_KERNELS = ("layer_sample", "layer_statistics", "layer_gram", "layer_mix", "layer_mix_backward")
"""The kernels of a layer in Gram form that read tokens."""
MAPS_KERNELS = ("layer_maps", "layer_maps_backward", "layer_rows")
"""The kernels of a layer in Gram form that compute maps. Each of their programs holds whole maps."""
LINEAR_KERNELS = ("linear_maxima", "linear_sums", "linear_apply", "linear_queries", "linear_keys")
"""The kernels of linear attention. Each of their programs holds a whole map."""
REGISTERS = 65536
"""Registers per multiprocessor."""
WIDEST_INTERPRETED = 64
"""Features per step in the interpreter, unless the table has a larger number."""


def block(features: int) -> int:
    """The smallest power of two that holds this many features, at least 16 (the minimum for tensor cores)."""
    return max(16, 1 << (features - 1).bit_length())


@cache
def shipped(key: Key, arch: str) -> Config:
    """The config from the table. Architectures and dtypes without their own row use the common row."""
    d = block(key.features)
    rows = TABLE[key.kernel, key.dtype.itemsize]
    config = Config(*rows.get((d, arch), rows.get((d, key.dtype), rows[d])))
    if arch == "interpreter":
        # run time depends on the number of operations, not on their size; wide tokens are still split into tiles
        o, k = (x and max(x, min(d, WIDEST_INTERPRETED)) for x in (config.block_o, config.block_k))
        return config._replace(block_n=128, block_o=o, block_k=k)
    if arch.startswith("gfx"):
        # half the shared memory, and loops are pipelined through registers
        return config._replace(stages=min(config.stages, 2), registers=0)
    return config


def get(key: Key, arch: str) -> Config:
    """The tuned config if autotuning is enabled and has stored one, otherwise the config from the table."""
    return (_tuned().get(_name(key, arch)) if autotuning() else None) or shipped(key, arch)


def launch(key: Key, arch: str, run: Callable[[Config], Result]) -> Result:
    """Returns `run(config)` for the best known config. Autotuning calls `run` many times, so it must not read its own
    results."""
    if autotuning() and _name(key, arch) not in _tuned():
        if not _capturing():
            with replay.paused():
                _remember(_name(key, arch), fastest(candidates(key, arch), run))
        elif recorder := replay.recorder():
            recorder.repeatable = False
    return run(get(key, arch))


# ---------------------------------------------------------------------------------------------------------------- tuner


def autotuning() -> bool:
    return os.environ.get(AUTOTUNE, "0") not in ("", "0")


def candidates(key: Key, arch: str) -> list[Config]:
    """The config from the table and variants with the same features per tile, on which the token splits depend."""
    first = shipped(key, arch)
    least = 16
    tokens = {first.block_n} if first.block_n == 0 else {max(least, first.block_n * x // 2) for x in (1, 2, 4)}
    warps = {max(1, first.warps // 2), first.warps, min(16, first.warps * 2)}
    stages = {first.stages} if first.stages == 1 else {2, 3, 4}
    found = [
        Config(n, first.block_o, first.block_k, w, s, first.registers)
        for n in sorted(tokens)
        for w in sorted(warps)
        for s in sorted(stages)
        if first.registers * 32 * w <= REGISTERS
    ]
    return [first, *(config for config in found if config != first)]


def fastest(configs: list[Config], run: Callable[[Config], object]) -> Config:
    """The fastest config. Configs that exceed the device's resources are skipped."""
    times: dict[Config, float] = {}
    for config in configs:
        try:
            times[config] = _seconds(lambda config=config: run(config))  # type: ignore[misc]
        except (OutOfResources, PTXASError):
            continue
    if not times:
        raise RuntimeError(f"none of {len(configs)} configurations runs on this device")
    return min(times, key=times.__getitem__)


def _seconds(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        return float(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _name(key: Key, arch: str) -> str:
    dtype = str(key.dtype).removeprefix("torch.")
    return "/".join((triton.__version__, arch, key.kernel, dtype, str(key.features), key.map))


def cache_file() -> Path:
    folder = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "xformer-kernels"
    return Path(folder).expanduser() / "tuned.json"


@cache
def _tuned() -> dict[str, Config]:
    """Tuned configs by name: those read from the file, and those of this process."""
    return _in_file()


def _in_file() -> dict[str, Config]:
    try:
        return {name: Config(*values) for name, values in json.loads(cache_file().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _remember(name: str, config: Config) -> None:
    """Stores a config in memory and, atomically, in the file. If writing fails, later processes tune again."""
    _tuned()[name] = config
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            # keep the configs that other processes have stored
            json.dump({**_in_file(), **_tuned()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuned configurations are not kept: {error}", RuntimeWarning, stacklevel=2)

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
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from xformer_kernels.backends.triton import replay

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
IN_PARTS = ("gram_tf32x3", "apply_tf32x3", "forward_tf32x3", "gradients_tf32x3")
"""Variants of the kernels whose float32 products are three products of tf32."""
LAYER_KERNELS = ("layer_statistics", "layer_gram", "layer_gram_tf32x3", "layer_mix", "layer_mix_backward")
"""The passes of a layer in Gram form."""
LINEAR_KERNELS = ("linear_maxima", "linear_sums", "linear_apply", "linear_queries", "linear_keys")
"""The kernels of linear attention. Each of their programs holds a whole map."""
BLOCKS = (16, 32, 64, 128, 256)
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
    rows = _TABLE[key.kernel, key.dtype.itemsize]
    config = Config(*rows.get((d, arch), rows.get((d, key.dtype), rows[d])))
    if arch == "interpreter":
        # run time depends on the number of operations, not on their size; wide tokens are still split into tiles
        o, k = (x and max(x, min(d, WIDEST_INTERPRETED)) for x in (config.block_o, config.block_k))
        return config._replace(block_n=128, block_o=o, block_k=k)
    if arch.startswith("gfx"):
        # half the shared memory, and loops are pipelined through registers
        return config._replace(stages=min(config.stages, 2), registers=0)
    return config


# (kernel, element size in bytes): {features, or (features, arch or dtype): (block_n, block_o, block_k, warps, stages
# [, registers])}
# Chosen by the resource usage of compiled kernels, not yet by timing: no spills, shared memory that fits on every
# architecture, tensor cores and 128-bit loads. Matrix products in ieee float32 use 16 features per step, because the
# multiply-adds of a whole tile would not fit in registers.
_TABLE: dict[tuple[str, int], dict[Any, tuple[int, ...]]] = {
    ("gram", 2): {
        16: (128, 16, 0, 4, 3, 255),
        32: (128, 32, 0, 4, 3, 255),
        64: (64, 64, 0, 4, 3, 255),
        128: (64, 128, 0, 8, 3),
        256: (64, 128, 0, 8, 3),
    },
    ("gram", 4): {
        16: (64, 16, 0, 4, 3, 255),
        32: (32, 32, 0, 2, 3, 255),
        64: (32, 64, 0, 4, 3),
        128: (32, 128, 0, 8, 3, 255),
        256: (32, 128, 0, 8, 3, 255),
    },
    ("gram", 8): {d: (16, min(d, 32), 0, 4, 2, 255) for d in BLOCKS},
    ("gram_normalised", 4): {d: (64 if d == 16 else 32, min(d, 64), 0, 4, 3, 255) for d in BLOCKS},
    ("gram_normalised", 8): {d: (16, min(d, 32), 0, 4, 2, 255) for d in BLOCKS},
    ("apply", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (64, 64, 64, 4, 3),
        128: (64, 128, 128, 8, 3, 255),
        256: (32, 64, 256, 8, 3, 255),
        (256, "gfx942"): (32, 32, 256, 8, 1),
    },
    ("apply", 4): {
        16: (64, 16, 16, 4, 3, 255),
        32: (64, 32, 32, 4, 3),
        64: (32, 64, 64, 4, 3, 255),
        128: (32, 64, 128, 8, 3, 255),
        256: (16, 64, 256, 8, 3, 255),
        (256, "gfx942"): (16, 32, 256, 8, 1),
    },
    ("apply", 8): {d: (16, min(d, 32), d, 4, 1) for d in BLOCKS},
    ("forward", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3, 255),
        64: (64, 64, 64, 4, 3),
        128: (32, 128, 128, 8, 3, 255),
        (128, "gfx942"): (64, 128, 128, 8, 1),
    },
    ("forward", 4): {
        16: (32, 16, 16, 4, 3),
        32: (32, 32, 32, 4, 3),
        64: (32, 64, 64, 8, 3),
        128: (16, 128, 128, 8, 2, 255),
    },
    ("forward", 8): {d: (16, d, d, 4, 1) for d in (16, 32, 64)},
    ("map_backward", 2): {
        16: (0, 16, 0, 4, 1),
        32: (0, 32, 0, 4, 1),
        64: (0, 32, 0, 4, 1, 255),
        128: (0, 16, 0, 4, 1, 255),
        256: (0, 16, 0, 8, 1, 255),
    },
    ("map_backward", 8): {d: (0, 8, 0, 16, 1) if d > 128 else (0, 8, 0, 8, 1, 255) for d in BLOCKS},
    ("gradients", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (64, 64, 64, 4, 3),
        (64, torch.float16): (32, 64, 64, 4, 3),
        128: (32, 64, 64, 4, 3, 255),
        256: (32, 64, 64, 8, 3, 255),
        (128, "gfx942"): (32, 32, 32, 4, 1),
        (256, "gfx942"): (32, 32, 32, 8, 1),
    },
    ("gradients", 4): {
        16: (64, 16, 16, 4, 3),
        32: (32, 32, 32, 4, 3, 255),
        64: (32, 64, 16, 4, 2),
        128: (32, 64, 16, 4, 2, 255),
        256: (32, 64, 16, 8, 2, 255),
    },
    ("gradients", 8): {d: (32, 16, 16, 8, 1) for d in BLOCKS},
    ("channel_mix", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (64, 64, 64, 4, 3, 255),
        128: (64, 64, 64, 4, 3, 255),
        256: (64, 64, 64, 8, 3, 255),
    },
    ("channel_mix", 4): {
        16: (64, 16, 16, 4, 3, 255),
        32: (64, 32, 16, 4, 3, 255),
        64: (64, 64, 16, 8, 3),
        128: (64, 64, 16, 8, 3),
        256: (64, 64, 16, 8, 3),
    },
    ("channel_mix", 8): {d: (32, min(d, 32), 16, 4, 1) for d in BLOCKS},
    ("layer_gram", 2): {
        16: (128, 16, 0, 4, 3),
        32: (64, 32, 0, 4, 3),
        64: (64, 64, 0, 4, 3),
        128: (32, 128, 0, 8, 3),
        (128, "sm_90"): (64, 128, 0, 8, 3),
        256: (32, 64, 0, 4, 3),
        (256, "sm_90"): (32, 128, 0, 8, 3),
    },
    ("layer_gram", 4): {
        16: (64, 16, 0, 4, 3, 255),
        32: (32, 32, 0, 4, 3, 255),
        64: (32, 64, 0, 8, 3),
        (64, "sm_90"): (32, 64, 0, 4, 3, 255),
        128: (32, 128, 0, 8, 3, 255),
        256: (32, 64, 0, 8, 3),
        (256, "sm_90"): (32, 128, 0, 8, 3, 255),
    },
    ("layer_gram", 8): {d: (16, min(d, 32), 0, 4, 3, 255) for d in BLOCKS},
    **{
        ("layer_statistics", size): {d: (min(256, 16384 // (d * size)), 0, 0, 4, 1) for d in BLOCKS}
        for size in (2, 4, 8)
    },
    ("layer_mix", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (64, 64, 64, 4, 3),
        128: (64, 128, 64, 4, 3),
        256: (64, 256, 32, 8, 3, 128),
    },
    ("layer_mix", 4): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 16, 4, 3),
        64: (64, 64, 16, 8, 3),
        128: (64, 128, 16, 8, 3),
        256: (32, 256, 16, 8, 3),
    },
    # a program holds all features of its tokens
    ("layer_mix_backward", 2): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (64, 64, 64, 4, 3),
        128: (64, 128, 64, 4, 3),
        256: (64, 256, 32, 8, 3),
    },
    ("layer_mix_backward", 4): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 16, 4, 3),
        64: (64, 64, 16, 8, 3),
        128: (64, 128, 16, 4, 3),
        256: (32, 256, 16, 8, 3),
    },
    **{
        (name, 8): {d: (16, min(d, 32) if name == "layer_mix" else d, 16, 4 if d < 128 else 8, 1) for d in BLOCKS}
        for name in ("layer_mix", "layer_mix_backward")
    },
    # each program holds a whole map; block_k of linear_queries: columns of S held in registers together with dS
    ("linear_maxima", 2): {d: (4096 // d, d, 0, 4, 3) for d in (16, 32, 64, 128)},
    ("linear_maxima", 4): {d: (2048 // d, d, 0, 4, 3) for d in (16, 32, 64)},
    ("linear_maxima", 8): {d: (1024 // d, d, 0, 4, 2) for d in (16, 32, 64)},
    ("linear_sums", 2): {
        16: (128, 16, 0, 4, 3),
        32: (64, 32, 0, 4, 3),
        64: (64, 64, 0, 4, 3, 255),
        128: (32, 128, 0, 8, 2, 255),
    },
    ("linear_sums", 4): {
        16: (64, 16, 0, 4, 3, 255),
        32: (32, 32, 0, 4, 3, 255),
        64: (32, 64, 0, 8, 3, 255),
    },
    ("linear_sums", 8): {d: (16, d, 0, 4, 2, 255) for d in (16, 32, 64)},
    ("linear_apply", 2): {
        16: (64, 16, 0, 4, 3),
        32: (64, 32, 0, 4, 3),
        64: (64, 64, 0, 4, 3, 255),
        128: (32, 128, 0, 8, 2, 255),
        (128, "gfx942"): (16, 128, 0, 8, 2),
    },
    ("linear_apply", 4): {
        16: (64, 16, 0, 4, 3, 255),
        32: (64, 32, 0, 4, 3),
        64: (32, 64, 0, 8, 3, 255),
    },
    ("linear_apply", 8): {d: (16, d, 0, 4, 1) for d in (16, 32, 64)},
    ("linear_queries", 2): {
        16: (64, 16, 16, 4, 3, 255),
        32: (64, 32, 32, 4, 3, 255),
        64: (32, 64, 32, 4, 3, 255),
        128: (16, 128, 64, 8, 2, 255),
    },
    ("linear_queries", 4): {
        16: (32, 16, 16, 4, 3, 255),
        32: (32, 32, 32, 4, 3, 255),
        64: (16, 64, 64, 8, 3, 255),
    },
    ("linear_queries", 8): {d: (16, d, d, 8, 1, 255) for d in (16, 32, 64)},
    ("linear_keys", 2): {
        16: (64, 16, 0, 4, 3),
        32: (64, 32, 0, 4, 3, 255),
        64: (32, 64, 0, 4, 3, 255),
        128: (16, 128, 0, 8, 2, 255),
    },
    ("linear_keys", 4): {
        16: (32, 16, 0, 4, 3, 255),
        32: (32, 32, 0, 4, 3, 255),
        64: (16, 64, 0, 8, 3, 255),
        (64, "gfx942"): (16, 64, 0, 4, 2),
    },
    ("linear_keys", 8): {d: (16, d, 0, 4 if d == 16 else 8, 1, 255) for d in (16, 32, 64)},
}
_TABLE["map_backward", 4] = _TABLE["map_backward", 2]
# The tensor cores of sm_90 and sm_100 multiply 64 rows at a time (features of a Gram matrix, tokens of other products)
# and read halves of operands from shared memory; elsewhere these take registers. Those of the three maps of gradients
# fit in neither, so that these loads are not pipelined; programs overlap instead.
_TABLE |= {
    ("gram_tf32x3", 4): {
        64: (32, 64, 0, 4, 3),
        128: (32, 64, 0, 4, 3),
        (128, "sm_100"): (32, 128, 0, 8, 3, 255),
        256: (32, 64, 0, 4, 3),
        (256, "sm_100"): (32, 128, 0, 8, 3, 255),
    },
    ("layer_gram_tf32x3", 4): {
        64: (16, 64, 0, 4, 3),
        (64, "sm_90"): (32, 64, 0, 4, 3),
        128: (16, 64, 0, 4, 3),
        (128, "sm_90"): (32, 64, 0, 4, 3),
        256: (16, 64, 0, 4, 3),
        (256, "sm_90"): (32, 64, 0, 4, 3),
    },
    ("apply_tf32x3", 4): {
        16: (64, 16, 16, 4, 3),
        32: (64, 32, 32, 4, 3),
        64: (32, 64, 64, 4, 3),
        (64, "sm_90"): (64, 64, 64, 4, 3),
        (64, "sm_100"): (64, 64, 64, 4, 3),
    },
    ("forward_tf32x3", 4): {
        16: (32, 16, 16, 4, 3),
        32: (32, 32, 32, 4, 3),
        64: (32, 64, 64, 4, 3),
        128: (16, 128, 128, 8, 2, 255),
    },
    ("gradients_tf32x3", 4): {
        16: (64, 16, 16, 4, 1),
        32: (64, 16, 32, 4, 1),
        64: (32, 16, 64, 4, 1),
        (64, "sm_90"): (64, 32, 64, 4, 1),
        (64, "sm_100"): (64, 32, 32, 4, 1),
        128: (32, 32, 32, 4, 1),
        (128, "sm_90"): (64, 32, 32, 4, 1),
        (128, "sm_100"): (64, 32, 32, 4, 1),
        256: (32, 32, 32, 4, 1),
        (256, "sm_90"): (64, 32, 32, 4, 1),
        (256, "sm_100"): (64, 32, 32, 4, 1),
    },
}


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

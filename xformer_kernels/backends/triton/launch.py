"""Launch parameters derived from tensors: alignment of strides and addresses, precisions, devices."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xformer_kernels.backends import tf32_allowed
from xformer_kernels.backends.triton.kernels.tiles import INTERPRETED

INTERPRETING = bool(INTERPRETED)
VECTOR_BYTES = 16
TALLEST = 512
"""Upper bound on the number of tokens per tile."""
WIDEST = 256
"""Maximum number of features per tile."""
WARP_GROUPS = ("sm_90", "sm_100")
"""Architectures whose tensor cores are used by groups of four warps, with operands in shared memory."""
LONGEST_IN_PARTS = 64
"""Maximum number of terms that tensor cores, which truncate, sum for a float32 product by tf32x3
(tests/triton_kernels/test_tf32x3.py)."""
_LDS = 64 << 10
"""Bytes of shared memory (LDS) per compute unit on AMD."""
_RESERVED = 1024
"""Bytes of shared memory that CUDA reserves for each program."""


class Target(NamedTuple):
    """The architecture and resources of a device, as far as launches depend on them."""

    arch: str
    processors: int
    shared: int = 228 << 10
    """Bytes of shared memory per multiprocessor."""
    threads: int = 2048
    """Threads per multiprocessor."""


def architecture(major: int, minor: int) -> str:
    """The architecture of an NVIDIA GPU, in the names of the table of configs: sm_100 includes sm_103 and sm_110, and
    sm_120 includes sm_121."""
    return {10: "sm_100", 11: "sm_100", 12: "sm_120"}.get(major, f"sm_{major}{minor}")


@cache
def target(device: torch.device) -> Target:
    """The target of a device. The interpreter has 4 multiprocessors, although it runs programs serially."""
    if INTERPRETING:
        return Target("interpreter", 4)
    properties = torch.cuda.get_device_properties(device)
    processors, threads = properties.multi_processor_count, properties.max_threads_per_multi_processor
    if torch.version.hip:
        return Target(properties.gcnArchName.partition(":")[0], processors, _LDS, threads)
    arch = architecture(properties.major, properties.minor)
    return Target(arch, processors, properties.shared_memory_per_multiprocessor, threads)


def resident(target: Target, warps: int, registers: int, shared: int) -> int:
    """Programs that a multiprocessor runs at the same time, limited by registers per thread and bytes of shared memory.

    Each of four schedulers allocates registers per warp: from 16384 registers, for warps of 32 threads, on NVIDIA; from
    512 registers per lane, for warps of 64 threads, on AMD.
    """
    if target.arch.startswith("gfx"):
        fit, threads, used = 512 // max(1, registers + -registers % 8), 64, shared
    else:
        per_warp = 32 * registers
        fit, threads, used = 16384 // max(1, per_warp + -per_warp % 256), 32, shared + _RESERVED
    by_memory = target.shared // used if used else fit * 4
    return max(1, min(fit * 4 // warps, by_memory, target.threads // (threads * warps)))


def is_current(device: torch.device) -> bool:
    """Whether this is the current device, to which launches go."""
    return device.type != "cuda" or torch.cuda.current_device() == device.index


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Context that makes `device` current, because launches go to the current device."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)


def _power_of_two(number: int, most: int) -> int:
    """The largest power of two that divides the number, at most `most`."""
    return min(number & -number, most) if number else most


def side_by_side(t: Tensor) -> bool:
    """Whether the features of a token are contiguous, as vectorised loads require."""
    return t.stride(-1) == 1 or t.shape[-1] == 1


def alignment(**tokens: Tensor | None) -> dict[str, int]:
    """ALIGN_<NAME>: every token starts at a multiple of this many elements; 0 if its features are not contiguous."""
    return {f"ALIGN_{name.upper()}": 0 if t is None else _alignment(t) for name, t in tokens.items()}


def _alignment(t: Tensor) -> int:
    if not side_by_side(t):
        return 0
    most = _power_of_two(t.data_ptr() // t.element_size(), VECTOR_BYTES // t.element_size())
    for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True):
        if size > 1:
            most = _power_of_two(stride, most)
    return most


def far(*tokens: Tensor | None, row: int = 0) -> bool:
    """Whether offsets within a tile need 64 bits. `row`: stride between tokens of the results, in elements."""
    steps = [row * TALLEST]
    for t in tokens:
        if t is not None:
            steps.append(t.stride(-2) * TALLEST * (t.shape[-2] > 1) + t.stride(-1) * WIDEST)
    return max(steps) >= 1 << 31


def out_alignment(features: int, itemsize: int) -> int:
    return _power_of_two(features, VECTOR_BYTES // itemsize)


def tokens_precision(dtype: torch.dtype, arch: str) -> str:
    """Precision of products of tokens with tokens, and of float32 tokens with maps: tf32 if allowed for matmuls."""
    has_it = arch.startswith("sm_") or arch == "gfx942"
    return "tf32" if dtype is torch.float32 and has_it and tf32_allowed() else "ieee"


def _in_parts(precision: str, dtype: torch.dtype, arch: str, pays: bool) -> str:
    """tf32x3 in place of ieee float32 if it `pays`: three tensor core products with about the error of float32."""
    has_it = arch.startswith("sm_") or arch == "interpreter"
    return "tf32x3" if pays and has_it and dtype is torch.float32 and precision == "ieee" else precision


def gram_precision(dtype: torch.dtype, normalised: bool, arch: str, features: int, symmetric: bool = False) -> str:
    """Precision of a Gram matrix of tokens. No tf32 if it is symmetric, because its diagonal holds squared norms.

    Normalised 16-bit tokens are in the accumulate dtype; tf32x3 avoids rounding them again. Up to 32 features, it takes
    more instructions than multiply-adds in float32.
    """
    if symmetric and dtype is torch.float32:
        return "ieee"
    if normalised and dtype.itemsize == 2 and arch.startswith("sm_"):
        return "tf32x3"
    return _in_parts(tokens_precision(dtype, arch), dtype, arch, features > 32)


def map_precision(dtype: torch.dtype, arch: str, terms: int = 0) -> str:
    """Precision of products of tokens with maps. tf32 for float16: it represents the tokens exactly, and has the
    exponent range of float32. `terms`: features of a product for which the kernel takes tf32x3, or 0."""
    if dtype.itemsize == 2 and arch.startswith("sm_"):
        return "tf32"
    return _in_parts(tokens_precision(dtype, arch), dtype, arch, 0 < terms <= LONGEST_IN_PARTS)


def least_tokens(map_precision: str, arch: str) -> int:
    """Minimum tokens per tile of a product with a map: tensor cores of sm_90 and sm_100 multiply 64 rows at a time."""
    return 64 if map_precision == "tf32x3" and arch in WARP_GROUPS else 1


def variant(kernel: str, dtype: torch.dtype, *precisions: str) -> str:
    """The kernel in autotuning cache keys: float32 by tf32x3 has its own configs."""
    return f"{kernel}_tf32x3" if dtype is torch.float32 and "tf32x3" in precisions else kernel

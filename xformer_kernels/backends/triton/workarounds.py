"""Kernels that must not use the asynchronous tensor core instructions of sm_90 (wgmma) or sm_100 (tcgen05).

Triton or ptxas would compile them to code that may compute wrong results. They use mma.sync instead, at a small cost:
they are bound by memory.

- Triton before 3.7.1 has no fence between cp.async, which copies tokens to shared memory, and asynchronous products
  that read these copies (triton-lang/triton, pull request 10537). On sm_90, 16-bit tokens are read so; float32 tokens
  are split in registers.
- ptxas before 13.3 overwrites registers that wgmma still reads (triton-lang/triton, issue 9433). With ptxas 12.9, which
  Triton 3.8 uses for sm_90, this happens in our kernels whose products are part of a loop over features;
  ``tests/triton_kernels/test_aot.py`` checks the machine code of all kernels for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton

HAS_FENCES = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)
VARIABLES = {"sm_90": "DISABLE_MMA_V3", "sm_100": "DISABLE_MMA_V5"}
"""Environment variables that Triton reads when it compiles, and that are part of the keys of its cache."""
LOOPS_OVER_FEATURES = ("channel_mix_kernel", "layer_mix_kernel")


def uses_mma_sync(kernel: Any, arch: str, args: Sequence[Any]) -> bool:
    """Whether a kernel with these arguments must not use the asynchronous instructions."""
    if arch not in VARIABLES:
        return False
    if arch == "sm_100":
        return not HAS_FENCES
    halves = any(isinstance(x, torch.Tensor) and x.element_size() == 2 for x in args)
    return kernel.__name__ in LOOPS_OVER_FEATURES or (halves and not HAS_FENCES)


@contextmanager
def compiling(kernel: Any, arch: str, args: Sequence[Any]) -> Iterator[None]:
    """Context in which a kernel is compiled. Triton has no option of a kernel for this, only the variables."""
    if not uses_mma_sync(kernel, arch, args):
        yield
        return
    name = VARIABLES[arch]
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""Kernels that must not use the asynchronous tensor core instructions of sm_90 (wgmma) or sm_100 (tcgen05).

Triton or ptxas would compile them to code that may compute wrong results. They use mma.sync instead, at a small cost:
they are bound by memory.

- Triton before 3.7.1 has no fence between cp.async, which copies tokens to shared memory, and asynchronous products
  that read these copies (triton-lang/triton, pull request 10537). On sm_90, 16-bit tokens are read so; float32 tokens
  are split in registers.
- ptxas before 13.3 overwrites registers that wgmma still reads (triton-lang/triton, issue 9433). With ptxas 12.9, which
  Triton 3.8 uses for sm_90, this happens in kernels whose products are loops over features: the last wgmma of a product
  is still running when the next product begins. ``tests/triton_kernels/test_aot.py`` checks the machine code of all
  kernels for it.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton

HAS_FENCES = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3])) >= (3, 7, 1)
VARIABLES = {"sm_90": "DISABLE_MMA_V3", "sm_100": "DISABLE_MMA_V5"}
"""Environment variables that Triton reads when it compiles, and that are part of the keys of its cache."""
_changing = threading.RLock()
FEATURES = ("D", "DV", "C", "I", "I2")
"""Constexprs that are numbers of features."""


def loops_over_features(constants: dict[str, Any]) -> bool:
    """Whether products of a kernel with these constexprs take more than one step of BLOCK_K features."""
    return "BLOCK_K" in constants and any(constants["BLOCK_K"] < constants.get(name, 0) for name in FEATURES)


def uses_mma_sync(arch: str, args: Sequence[Any], constants: dict[str, Any]) -> bool:
    """Whether a kernel with these arguments and constexprs must not use the asynchronous instructions."""
    if arch not in VARIABLES:
        return False
    if arch == "sm_100":
        return not HAS_FENCES
    halves = any(isinstance(x, torch.Tensor) and x.element_size() == 2 for x in args)
    return loops_over_features(constants) or (halves and not HAS_FENCES)


@contextmanager
def compiling(arch: str, args: Sequence[Any], constants: dict[str, Any]) -> Iterator[None]:
    """Context in which a kernel is compiled: sets the variable, since Triton has no compiler option for this."""
    if not uses_mma_sync(arch, args, constants):
        yield
        return
    name = VARIABLES[arch]
    with _changing:  # otherwise a thread might restore what another one has set
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

"""How kernels are compiled: once for each set of constants, whatever the length, the batch and the number of heads."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs


def kernel(function: Callable[..., Any]) -> Any:
    """triton.jit that specialises only on constexprs and dtypes.

    Sizes and strides are 64-bit integers whatever their value, and nothing is compiled anew where one of them happens
    to be 1 or a multiple of 16, or an address to be aligned: what kernels may assume of strides and addresses are
    their constants ALIGN_*.
    """
    names = [name for name, p in inspect.signature(function).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


def device(function: Callable[..., Any]) -> Any:
    """triton.jit for functions that kernels call.

    In Triton's interpreter, what a kernel calls finds the language patched already; patching it again at every call
    would be most of the time that a test takes.
    """
    jitted = triton.jit(function)
    return jitted.rewrite() if knobs.runtime.interpret else jitted

"""JIT decorators: a kernel is compiled once per set of constexprs, for any number of tokens, batches and heads."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton import knobs


def kernel(function: Callable[..., Any]) -> Any:
    """triton.jit that specialises only on constexprs and dtypes.

    Sizes and strides are always 64-bit integers. Values of 1, multiples of 16 and aligned addresses do not compile a
    new variant: kernels assume about strides and addresses only what their ALIGN_* constexprs state.
    """
    names = [name for name, p in inspect.signature(function).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=names, do_not_specialize_on_alignment=names)(function)


def device(function: Callable[..., Any]) -> Any:
    """triton.jit for functions that kernels call.

    In Triton's interpreter, the calling kernel has already patched triton.language. Patching it again at every call
    would take most of the time of a test, so the rewritten function is called directly.
    """
    jitted = triton.jit(function)
    return jitted.rewrite() if knobs.runtime.interpret else jitted

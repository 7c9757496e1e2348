"""The kernels, one module per backend; none imports another.

A backend offers the ops' functions (``xfa_forward``, ``xfa_backward``, ``gram``, ``channel_mix``) with the schemas of
:mod:`xformer_kernels.ops` less the ``backend`` argument, and ``unsupported(device_type, dtypes, head_dims)``: every
reason why it cannot serve a call. If it has a text ``ONLY_BY_NAME``, ``backend="auto"`` passes over it for that reason.
It may have ``layer_gram`` and ``layer_mix`` (see :mod:`xformer_kernels.layer.passes`), and ``decisions(tokens)``: how
it would compute a call of these tokens, by name, where settings or strides decide that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from types import ModuleType

import torch

from xformer_kernels.validate import DTYPES

ORDER = ("cpp", "triton", "cuda")
"""The order in which ``backend="auto"`` asks. The reference comes after all of them and is not a backend module."""


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(f"{__name__}.{name}"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


def unsupported_numbers(dtypes: Iterable[torch.dtype], head_dims: Iterable[int], widest: int) -> list[str]:
    """What kernels of these dtypes and of 1 to `widest` features have against a call."""
    reasons = []
    bad_dims = [str(dim) for dim in head_dims if not 1 <= dim <= widest]
    if bad_dims:
        reasons.append(f"{', '.join(bad_dims)} features per head, the kernels take 1 to {widest}")
    bad = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    if bad:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"dtype {', '.join(bad)} is not one of {accepted}")
    return reasons


def tf32_allowed() -> bool:
    """Whether the user lets matmuls of float32 on a GPU be cut to tf32; read at every call."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return precision == "tf32" if precision is not None else matmul.allow_tf32


def uncut(x: torch.Tensor) -> torch.Tensor:
    """x, in float64 where torch's products would cut it to tf32: for sums of squares, which square the error too."""
    return x.double() if x.is_cuda and x.dtype is torch.float32 and tf32_allowed() else x


def precision_of_products(dtype: torch.dtype, tf32: bool) -> list[str]:
    """A decision for :func:`xformer_kernels.explain`, of float32 tokens."""
    if dtype is not torch.float32:
        return []
    allowed = "which torch.backends.cuda.matmul allows; norms and x^T x of the Gram form are in float32"
    return [f"products of float32 are cut to tf32, {allowed}" if tf32 else "products of float32 are in float32"]

"""Autocast rules for tokens and weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import reference


def is_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    device_type = x.device.type
    # is_autocast_enabled raises for devices without autocast; torch.compile of torch 2.11 cannot trace
    # is_autocast_available
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def cast_tokens(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts tokens to the autocast dtype of the device of x, as for a matmul; float64 is not cast."""
    if not is_on(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _castable(t) else t for t in (x, *others))


def cast_weights(x: Tensor, *weights: Any) -> tuple[Any, ...]:
    """With autocast on, casts weights to the dtype of x, as F.linear does, unless they have its accumulate dtype."""
    if not is_on(x):
        return weights
    accepted = (x.dtype, reference.accumulate_dtype(x.dtype))
    return tuple(
        w.to(x.dtype) if isinstance(w, Tensor) and w.dtype not in accepted and _castable(w) else w for w in weights
    )


def disabled(x: Tensor) -> AbstractContextManager[Any]:
    """Context manager that disables autocast."""
    return torch.autocast(x.device.type, enabled=False) if is_on(x) else nullcontext()


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64

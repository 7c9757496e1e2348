"""What torch.autocast means for tokens, weights and regions of the package."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import reference


def _is_on(x: Tensor) -> bool:
    device_type = x.device.type
    # is_autocast_enabled refuses devices that have no autocast; torch.compile of torch 2.11 cannot trace the question
    has_autocast = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def cast_tokens(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tokens in the dtype that autocast asks for on the device of x, as it would for a matmul; float64 stays."""
    if not _is_on(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _castable(t) else t for t in (x, *others))


def cast_weights(x: Tensor, *weights: Any) -> tuple[Any, ...]:
    """With autocast on, weights of neither the dtype of x nor its accumulate dtype in that of x, as F.linear does."""
    if not _is_on(x):
        return weights
    accepted = (x.dtype, reference.accumulate_dtype(x.dtype))
    return tuple(
        w.to(x.dtype) if isinstance(w, Tensor) and w.dtype not in accepted and _castable(w) else w for w in weights
    )


def disabled(x: Tensor) -> AbstractContextManager[Any]:
    """A region in which operators compute in the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if _is_on(x) else nullcontext()


def _castable(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype != torch.float64

"""Linear layers and depthwise convolutions fused with adjacent normalization, activation and addition, in one pass.

For inference in float32 on x86 processors with AVX2 (csrc/cpu/linear.h, csrc/cpu/depthwise.h). Batch norm is folded
into the weights while they are packed, in every call; nothing is cached, so nothing can become stale.

:func:`linear` and :func:`depthwise` return None if these kernels do not support the call: if autograd records it, if a
mode, transform or compiler must observe torch's own operators, or for other dtypes, devices, layouts or mismatched
shapes. Callers then compute with torch, which raises the appropriate errors.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xformer_kernels import backends, dispatch, ops

LEVELS = ("x86_64_v3", "x86_64_v4")
"""Instruction levels for which the kernels exist: those with fused multiply-adds."""
FEWEST_TOKENS = 16
"""With fewer tokens, packing the weight would dominate the time."""
WIDEST = 1024
"""Features of x above which a blocked sum, as in torch, is more accurate than the kernels' sequential sum."""


class BatchNorm(NamedTuple):
    """Running statistics and affine parameters of features: ``weight (z - mean) / sqrt(variance + eps) + bias``."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class LayerNorm(NamedTuple):
    """Layer norm of each row over its features, as in ``torch.nn.functional.layer_norm``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _kernels() -> Any:
    cpp = backends.load("cpp")[0]
    module = None if cpp is None else cpp.module
    return module if module is not None and module.LEVEL in LEVELS else None


KERNELS: Any = _kernels()
"""The module with the kernels; None if they are not available."""


def eager_float32(x: Tensor, weight: Tensor) -> bool:
    """Whether both are dense float32 on the CPU, without autograd, autocast or compilation."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and x.layout is weight.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
    )


def asked(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels should compute products of x and weight, provided that no mode or transform is active."""
    return (
        KERNELS is not None
        and eager_float32(x, weight)
        and os.environ.get(dispatch.ENVIRONMENT, "auto") in ("", "auto", "cpp")
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    batch_norm: BatchNorm | None = None,
    layer_norm: LayerNorm | None = None,
    hard_swish: bool = False,
    add: Tensor | None = None,
) -> Tensor | None:
    """``act(batch_norm(layer_norm(x) weight^T + bias)) + add``; operations whose argument is not given are skipped.

    Args:
        x: (..., I), contiguous, of :data:`FEWEST_TOKENS` rows or more; I at most :data:`WIDEST`.
        weight: (O, I). bias: (O,) or None.
        batch_norm: over the O features. layer_norm: of each row of x.
        hard_swish: whether act is ``z relu6(z + 3) / 6``. add: (..., O), contiguous.

    Returns:
        (..., O), contiguous; None if the kernels do not support the call.
    """
    if not _may_serve(x, weight, bias, add, batch_norm, layer_norm) or weight.dim() != 2 or x.dim() == 0:
        return None
    O, I = weight.shape  # noqa: E741
    if (
        x.shape[-1] != I
        or not 0 < I <= WIDEST
        or x.numel() < FEWEST_TOKENS * I
        or not x.is_contiguous()
        or not are((O, I), weight)
        or not are((O,), bias)
        or not _normalises(O, batch_norm)
        or not (layer_norm is None or (are((I,), *layer_norm[:2]) and layer_norm.eps >= 0))
        or not are((*x.shape[:-1], O), add)
    ):
        return None
    result: Tensor = KERNELS.linear(x, weight, bias, batch_norm, layer_norm, hard_swish, add)
    return result


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    *,
    batch_norm: BatchNorm | None = None,
    hard_swish: bool = False,
) -> Tensor | None:
    """``act(batch_norm(conv2d(x, weight, bias, stride, padding=K // 2, groups=C)))``.

    Args:
        x: (B, C, H, W) in channels_last memory. weight: (C, 1, K, K), K 3 or 5. bias: (C,) or None. stride: 1 or 2.
        batch_norm, hard_swish: as in :func:`linear`.

    Returns:
        (B, C, ceil(H / stride), ceil(W / stride)) in channels_last memory; None if the kernels do not support the call.
    """
    if not _may_serve(x, weight, bias, None, batch_norm, None) or weight.dim() != 4 or x.dim() != 4:
        return None
    C = weight.shape[0]
    if (
        x.shape[1] != C
        or x.numel() == 0
        or weight.shape[1:] not in ((1, 3, 3), (1, 5, 5))
        or stride not in (1, 2)
        or not x.is_contiguous(memory_format=torch.channels_last)
        or not are(weight.shape, weight)
        or not are((C,), bias)
        or not _normalises(C, batch_norm)
    ):
        return None
    result: Tensor = KERNELS.depthwise(x.permute(0, 2, 3, 1), weight, bias, stride, batch_norm, hard_swish)
    return result.permute(0, 3, 1, 2)


def _may_serve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    batch_norm: BatchNorm | None,
    layer_norm: LayerNorm | None,
) -> bool:
    """Whether the kernels should compute the call and may read the memory of these tensors directly."""
    norms: list[Tensor | None] = []
    if batch_norm is not None:
        _check_kind("batch_norm", batch_norm, BatchNorm)
        norms += batch_norm[:4]
    if layer_norm is not None:
        _check_kind("layer_norm", layer_norm, LayerNorm)
        norms += layer_norm[:2]
    return asked(x, weight) and ops.plain(x, weight, bias, add, *norms)


def _check_kind(name: str, value: Any, kind: type[BatchNorm | LayerNorm]) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an inference.{kind.__name__} or None, got {type(value).__name__}")


def are(shape: tuple[int, ...], *tensors: Tensor | None) -> bool:
    """Whether each is None, or a contiguous float32 CPU tensor of this shape."""
    for t in tensors:
        if t is not None and not (t.shape == shape and t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()):
            return False
    return True


def _normalises(features: int, norm: BatchNorm | None) -> bool:
    """Whether `norm` is None, or a batch norm over this number of features."""
    return norm is None or (norm.mean is not None and norm.variance is not None and are((features,), *norm[:4]))

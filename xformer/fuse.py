"""Prepare a model for inference: fold batch norms and swap in fused modules."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from xformer.fused import swap
from xformer.layers import Foldable

Model = TypeVar("Model", bound=nn.Module)


@torch.inference_mode(False)
def fuse_for_inference(model: Model, kernels: bool = True) -> Model:
    """Return a copy of the model in eval mode, with batch norms folded and layers swapped for fused ones.

    Each batch norm is folded into the convolution or linear layer before it. Layers are swapped for those of
    :mod:`xformer.fused`: in float32 without gradients on an x86 CPU these compute one or several layers in one call,
    with weights packed once. Every other call (other dtypes and devices, gradients, dispatch modes, transforms,
    ``torch.compile``) runs the original forward.

    The outputs equal those of ``model.eval()`` up to rounding; the state dict has different keys. The copy cannot be
    trained, as it has no batch statistics. Layers with hooks, parametrized weights or replaced parts are not changed.
    Parameters may be changed afterwards, except in place through ``.data``. Hooks registered, and modules replaced,
    inside a fused module afterwards are ignored.

    Args:
        model: a model built from this package's layers.
        kernels: if False, no layers are swapped; the copy then uses public torch operations only, apart from XFA.
    """
    copied = swap.plain(copy.deepcopy(model).eval())
    for module in copied.modules():
        if isinstance(module, Foldable):
            module.fold()
    if kernels:
        copied = swap.fused(copied)
    result: Model = copied  # type: ignore[assignment]
    return result

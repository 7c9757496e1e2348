"""A model as inference wants it: batch norms folded, and modules replaced by fused ones."""

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
    """A copy in eval mode whose batch norms are part of the convolutions and linear layers before them.

    Its layers are replaced by the fused ones of :mod:`xformer.fused`: in float32 without gradients on an x86 CPU they
    compute a layer, or several, in one call, with weights that are packed once. All else they compute as the layers do:
    other dtypes and devices, gradients, what modes, transforms and ``torch.compile`` have to see.

    Outputs are those of ``model.eval()`` to rounding; the state dict has other names. The copy is not for training:
    there are no batch statistics any more. What has hooks, computed weights or other parts than this package gave it
    stays as it is. Parameters may be changed afterwards, though not in place through ``.data``; hooks and modules that
    are put into a fused module are not seen.

    Args:
        model: any that is made of this package's layers.
        kernels: False: no layers are replaced, and operations are torch's public ones alone, beside XFA.
    """
    copied = swap.plain(copy.deepcopy(model).eval())
    for module in copied.modules():
        if isinstance(module, Foldable):
            module.fold()
    if kernels:
        copied = swap.fused(copied)
    result: Model = copied  # type: ignore[assignment]
    return result

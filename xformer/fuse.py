"""A model as inference wants it: batch norms folded once."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from xformer.layers import ConvNorm, Foldable, Linear
from xformer.products import KERNELS
from xformer_kernels import XFA

Model = TypeVar("Model", bound=nn.Module)


def fuse_for_inference(model: Model, kernels: bool = True) -> Model:
    """A copy in eval mode whose batch norms are part of the convolutions and linear layers before them.

    In inference on the CPU the layers do that by themselves, in every call anew (:mod:`xformer.products`): the copy has
    it behind it, everywhere, and has fewer parameters.

    Outputs are those of ``model.eval()`` to rounding; the state dict has other names. The copy is not for training:
    there are no batch statistics any more. What has hooks, computed weights or other parts than this package gave it
    stays as it is.

    Args:
        model: any that is made of this package's layers.
        kernels: False: operations are torch's public ones alone, beside XFA.
    """
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, Foldable):
            module.fold()
    for module in fused.modules():
        if isinstance(module, (ConvNorm, Linear)):
            module.kernels = kernels
        elif isinstance(module, XFA):
            module.projections = KERNELS if kernels else None
    return fused

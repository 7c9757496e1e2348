"""A model as inference wants it."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from xformer.layers import ConvNorm

Model = TypeVar("Model", bound=nn.Module)


def fuse_for_inference(model: Model) -> Model:
    """A copy in eval mode whose batch norms are part of the convolutions before them.

    Outputs are those of ``model.eval()`` to rounding; the state dict has other names (``conv.bias``, no ``bn``). The
    copy is not for training: there are no batch statistics any more.
    """
    fused = copy.deepcopy(model).eval()
    for module in fused.modules():
        if isinstance(module, ConvNorm):
            module.fold()
    return fused

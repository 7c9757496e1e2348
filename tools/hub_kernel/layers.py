"""Layers for ``kernels.kernelize``: each is a forward that runs with the parameters and submodules of another class."""

from __future__ import annotations

from torch import Tensor, nn

from xformer_kernels.integrations.mdta import mdta
from xformer_kernels.layer.call import Call
from xformer_kernels.nn import attend
from xformer_kernels.spec import Spec

__all__ = ["MDTA", "XCA"]

_CALL = Call(Spec(), None, 0.0, "auto", None, "auto")


class XCA(nn.Module):
    """Cross-covariance attention, (B, N, C) to (B, N, C), in place of timm's ``XCA`` and facebookresearch/xcit's.

    The adopting class has ``num_heads``, ``temperature`` (H, 1, 1), ``qkv`` and ``proj`` (linear layers), ``attn_drop``
    and ``proj_drop``. Submodules that were replaced or have hooks are called.
    """

    can_torch_compile: bool = True

    num_heads: int
    temperature: nn.Parameter
    qkv: nn.Linear
    attn_drop: nn.Module
    proj: nn.Linear
    proj_drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_drop(attend(self, x, _CALL))
        return y


class MDTA(nn.Module):
    """Restormer's multi-Dconv head transposed attention, (B, C, h, w) to (B, C, h, w).

    The adopting class has ``num_heads``, ``temperature`` (H, 1, 1), ``qkv``, ``qkv_dwconv`` and ``project_out``
    (convolutions).
    """

    can_torch_compile: bool = True

    num_heads: int
    temperature: nn.Parameter
    qkv: nn.Conv2d
    qkv_dwconv: nn.Conv2d
    project_out: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        return mdta(self, _CALL, x)

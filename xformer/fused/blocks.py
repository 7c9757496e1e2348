"""Fused versions of the attention half block and of the XF block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xformer.attention import XFAHalf
from xformer.fused.kernels import AttentionKernel, LinearKernel, tensor
from xformer.fused.layers import Fused, FusedImages, FusedMlp, of_conv_norm
from xformer.layers import DropPath, XFBlock
from xformer_kernels import XFA, XFABlock, dispatch, inference
from xformer_kernels.modules import runs_forward_of
from xformer_kernels.nn import may_fuse


class FusedXFABlock(Fused, XFABlock):
    """Fuses the direct form; the Gram form runs the half block's own forward."""

    @staticmethod
    def kernels_of(plain: XFABlock) -> tuple[Any, ...] | None:
        attn = plain.attn
        if (
            not runs_forward_of(plain, XFABlock, XFAHalf)
            or not runs_forward_of(attn, XFA)
            or not may_fuse(plain.norm, attn, plain.layer_scale)
            or plain.layer_scale is not None
            or attn.proj.out_features != attn.qkv.in_features
            or attn.form == "gram"
            or attn.backend not in ("auto", "cpp")
            or not _attends(attn)
        ):
            return None
        return LinearKernel(attn.qkv, plain.norm), AttentionKernel(plain), LinearKernel(attn.proj)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, group: Any = None) -> Tensor:
        if token_mask is None and group is None and self.serves(x) and x.dim() == 3 and self.takes(x):
            return self.compute(x)
        return super().forward(x, token_mask, group)

    def run(self, x: Any) -> Any:
        qkv, attend, proj = self.kernels

        def direct(x: Any) -> Any:
            return proj(attend(qkv(x)), x)

        return direct(x) if attend.is_direct(x.shape, direct) else super().forward(tensor(x))


class FusedXFAHalf(FusedXFABlock, XFAHalf):
    @staticmethod
    def kernels_of(plain: XFABlock) -> tuple[Any, ...] | None:
        if not isinstance(plain, XFAHalf) or not runs_forward_of(plain.drop_path, DropPath):
            return None
        return FusedXFABlock.kernels_of(plain)


def _attends(attn: XFA) -> bool:
    """Whether a C++ kernel supports this attention."""
    if inference.KERNELS is None:
        return False
    features = attn.proj.in_features // attn.num_heads
    types = (torch.float32,)
    return dispatch.fuses("cpp", attn.spec) and not inference.KERNELS.unsupported("cpu", types, (features,))


class FusedXFBlock(FusedImages, XFBlock):
    """An XF block whose half blocks are all fused."""

    inside = ("layers",)

    @staticmethod
    def kernels_of(plain: XFBlock) -> tuple[Any, ...] | None:
        if not (
            runs_forward_of(plain, XFBlock)
            and runs_forward_of(plain.reduce, nn.Linear)
            and runs_forward_of(plain.drop_path, DropPath)
            and all(runs_forward_of(layers, nn.Sequential) for layers in (plain.layers, *plain.layers))
            and all(runs_forward_of(half, FusedXFABlock, FusedXFAHalf, FusedMlp) for half in _halves(plain))
        ):
            return None
        return of_conv_norm(plain.local), LinearKernel(plain.reduce), of_conv_norm(plain.expand, plain.norm)

    @staticmethod
    def runs(plain: XFBlock) -> list[Any]:
        return _halves(plain)

    def run(self, x: Any) -> Any:
        local, reduce, expand = self.kernels
        t = reduce(local(x)).flatten(1, 2)
        for half in _halves(self):
            t = half.run(t).contiguous()
        return expand(t, x).view(x.shape)


def _halves(block: XFBlock) -> list[Any]:
    """The half blocks in order: attention and MLP alternate."""
    layers: Any = block.layers
    return [half for layer in layers for half in layer]

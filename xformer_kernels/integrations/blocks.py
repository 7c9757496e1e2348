"""Layers and half blocks of timm's XCiT and EdgeNeXt, computed by the kernels from the submodules of timm's modules.

Each function takes the module, the options of a call and the arguments of the module's forward. It is called only if
:mod:`.families` has verified that it reproduces what torch would run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer_kernels.layer.call import Call
from xformer_kernels.modules import dropped, drops_no_path
from xformer_kernels.nn import attend, fused_half_block, has_plain_projections


def xca(module: Any, call: Call, x: Tensor) -> Tensor:
    """timm's ``XCA`` and ``CrossCovarianceAttn``, (B, N, C) to (B, N, C)."""
    if call.form == "gram" and not has_plain_projections(module):  # replaced projections must be called
        call = call._replace(form="direct")
    y: Tensor = dropped(module.proj_drop, attend(module, x, call))
    return y


def xcit_block(module: Any, call: Call, x: Tensor, H: int, W: int) -> Tensor:
    """timm's ``XCABlock``: attention, local patch interaction and feed-forward, (B, N, C) to (B, N, C)."""
    x = _half_block(module, call, x, "norm1", "attn", "gamma1", "drop_path1")
    x = x + module.drop_path3(module.gamma3 * module.local_mp(module.norm3(x), H, W))
    y: Tensor = x + module.drop_path2(module.gamma2 * module.mlp(module.norm2(x)))
    return y


def edgenext_block(module: Any, call: Call, x: Tensor) -> Tensor:
    """timm's ``SplitTransposeBlock``: split depthwise convolutions, attention and feed-forward, (B, C, h, w)."""
    B, C, h, w = x.shape
    groups = x.chunk(len(module.convs) + 1, dim=1)
    done: list[Tensor] = []
    for conv, group in zip(module.convs, groups, strict=False):
        done.append(conv(done[-1] + group if done else group))
    tokens = torch.cat((*done, groups[-1]), 1).flatten(2).transpose(1, 2)
    if module.pos_embd is not None:
        tokens = tokens + module.pos_embd((B, h, w)).flatten(2).transpose(1, 2)
    tokens = _half_block(module, call, tokens, "norm_xca", "xca", "gamma_xca", "drop_path")
    y = module.mlp(module.norm(tokens.reshape(B, h, w, C)))
    if module.gamma is not None:
        y = module.gamma * y
    result: Tensor = x + module.drop_path(y.permute(0, 3, 1, 2))
    return result


def _half_block(module: Any, call: Call, x: Tensor, norm: str, attn: str, layer_scale: str, drop_path: str) -> Tensor:
    drop = getattr(module, drop_path)
    return fused_half_block(
        x, getattr(module, norm), getattr(module, attn), getattr(module, layer_scale),
        None if drops_no_path(drop) else drop, call,
    )  # fmt: skip

"""Half blocks of timm's models as one: layer norm, attention, layer scale and residual in two passes over the tokens.

Each class below is what a timm block becomes, and is never constructed: parameters and submodules are the original's.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels.nn import half_block


class XCiTBlock(nn.Module):
    """timm's ``XCABlock``: attention, local patch interaction and feed-forward, (B, N, C) to (B, N, C)."""

    gamma1: Tensor
    gamma2: Tensor
    gamma3: Tensor

    def forward(self: Any, x: Tensor, H: int, W: int) -> Tensor:
        x = half_block(x, self.norm1, self.attn, self.gamma1, self.drop_path1)
        x = x + self.drop_path3(self.gamma3 * self.local_mp(self.norm3(x), H, W))
        y: Tensor = x + self.drop_path2(self.gamma2 * self.mlp(self.norm2(x)))
        return y


class EdgeNeXtBlock(nn.Module):
    """timm's ``SplitTransposeBlock``: split depthwise convolutions, attention and feed-forward, (B, C, h, w)."""

    gamma_xca: Tensor
    gamma: Tensor | None

    def forward(self: Any, x: Tensor) -> Tensor:
        B, C, h, w = x.shape
        groups = x.chunk(len(self.convs) + 1, dim=1)
        done: list[Tensor] = []
        for conv, group in zip(self.convs, groups, strict=False):
            done.append(conv(done[-1] + group if done else group))
        tokens = torch.cat((*done, groups[-1]), 1).flatten(2).transpose(1, 2)
        if self.pos_embd is not None:
            tokens = tokens + self.pos_embd((B, h, w)).flatten(2).transpose(1, 2)
        tokens = half_block(tokens, self.norm_xca, self.xca, self.gamma_xca, self.drop_path)
        y = self.mlp(self.norm(tokens.reshape(B, h, w, C)))
        if self.gamma is not None:
            y = self.gamma * y
        result: Tensor = x + self.drop_path(y.permute(0, 3, 1, 2))
        return result


# (where timm has it, its name): what it becomes, what a small one is made with and takes
_BLOCKS: dict[tuple[str, str], tuple[type[nn.Module], dict[str, Any], tuple[Any, ...]]] = {
    ("timm.models.xcit", "XCABlock"): (XCiTBlock, {"dim": 8, "num_heads": 2}, ((2, 6, 8), 2, 3)),
    ("timm.models.edgenext", "SplitTransposeBlock"): (
        EdgeNeXtBlock, {"dim": 8, "num_heads": 2, "num_scales": 3, "ls_init_value": 0.5}, ((2, 8, 2, 3),)
    ),
}  # fmt: skip


def block_class(module: nn.Module) -> type[nn.Module] | None:
    """What a block of timm becomes; None for other modules, and for blocks that compute something else."""
    for key, (ours, _, _) in _BLOCKS.items():
        original = getattr(sys.modules.get(key[0]), key[1], None)
        if original is not None and type(module) is original:
            return ours if _agrees(key) else None
    return None


@cache
def _agrees(key: tuple[str, str]) -> bool:
    """Whether the installed timm's block computes what ours does: tried once, on a small one with random weights."""
    ours, arguments, (shape, *rest) = _BLOCKS[key]
    numbers = torch.Generator().manual_seed(0)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            block = getattr(sys.modules[key[0]], key[1])(**arguments).double().eval()
            x = torch.randn(shape, generator=numbers, dtype=torch.float64)
            expected = block(x, *rest)
            got = ours.forward(block, x, *rest)
    except Exception:  # another signature, other parts: a block we do not know
        return False
    return bool(torch.allclose(got, expected, rtol=1e-9, atol=1e-9))

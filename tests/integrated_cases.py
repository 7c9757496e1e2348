"""Attention layers of other packages that replace_attention supports: a table with a row for each class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import randn
from test_nn import randomize
from torch import Tensor, nn

from xformer_kernels.integrations import is_replaced
from xformer_kernels.integrations.trial import InFloat64

SPANDREL, EXTRA = "spandrel.architectures", "spandrel_extra_arches.architectures"
DIFFUSERS = "diffusers.models.attention_processor"


class FacebookXCA(nn.Module):
    """XCiT's layer, from section 3.2 of its paper (arXiv 2106.09681), with the attributes of facebookresearch/xcit."""

    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(0.0), nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 4, 1)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        attention = self.attn_drop((scores * self.temperature).softmax(-1))
        return self.proj_drop(self.proj((attention @ v).permute(0, 3, 1, 2).reshape(b, n, c)))


@dataclass(frozen=True)
class Case:
    """A layer and its arguments: shapes stand for tensors, other values are passed as they are."""

    family: str
    where: str
    build: Callable[[Any], nn.Module]  # takes the imported module `where`
    inputs: tuple[Any, ...]
    part: str = "qkv"  # a submodule that it calls; none if empty
    images: bool = False  # whether it maps (B, C, h, w) to the same shape
    tolerance: float = 1e-8  # in float64; larger if a part that is called computes in float32

    def made(self) -> nn.Module:
        return self.build(importlib.import_module(self.where))

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = randomize(self.made())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.rpartition(".")[2] in ("temp", "rescale"):
                    parameter.add_(1.0)
        return model.to(dtype)

    def args(self, dtype: torch.dtype = torch.float32) -> list[Any]:
        return [randn(*a, seed=i, dtype=dtype) if isinstance(a, tuple) else a for i, a in enumerate(self.inputs, 1)]


def florence2(m: Any) -> nn.Module:
    config = m.Florence2VisionConfig(embed_dim=(48,), num_groups=(4,))
    config._attn_implementation = "sdpa"
    return m.Florence2VisionChannelAttention(config, 0)


def sana(m: Any, **choices: Any) -> nn.Module:
    return m.Attention(48, heads=4, dim_head=12, processor=m.SanaLinearAttnProcessor2_0(), **choices)


def mask(*shape: int) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape) % 5 != 3


TOKENS, IMAGE = (2, 63, 48), (2, 48, 7, 9)
PIXELS = (2, 7, 9, 48)
CASES = {
    "facebook XCA": Case("XCA copy", "integrated_cases", lambda m: m.FacebookXCA(48, 4), (TOKENS,)),
    "vit-pytorch": Case(
        "XCAttention", "vit_pytorch.xcit", lambda m: m.XCAttention(48, 3, 24), (PIXELS,), "to_qkv"
    ),
    "MONAI 2D": Case(
        "MDTA", "monai.networks.blocks.cablock", lambda m: m.CABlock(2, 48, 4, True), (IMAGE,), images=True
    ),
    "MONAI 3D": Case(
        "MDTA", "monai.networks.blocks.cablock", lambda m: m.CABlock(3, 24, 2, False), ((2, 24, 3, 4, 5),)
    ),
    "Restormer": Case(
        "MDTA", f"{EXTRA}.Restormer.__arch.restormer_arch", lambda m: m.Attention(48, 2, False), (IMAGE,), images=True
    ),
    "M3SNet": Case("MDTA", f"{EXTRA}.M3SNet.__arch.M3SNet", lambda m: m.Attention(48, 2, True), (IMAGE,), images=True),
    "KBNet": Case(
        "MDTA", f"{SPANDREL}.KBNet.__arch.kbnet_l", lambda m: m.TransAttention(48, 2, True), (IMAGE,), images=True
    ),
    "HVI-CIDNet": Case(
        "CAB", f"{SPANDREL}.HVICIDNet.__arch.LCA", lambda m: m.CAB(48, 4, True), (IMAGE, IMAGE), "kv", images=True
    ),
    "Retinexformer": Case(
        "IG_MSA", f"{SPANDREL}.RetinexFormer.__arch.retinexformer_arch", lambda m: m.IG_MSA(48, 24, 2),
        (PIXELS, PIXELS), "to_v",
    ),
    "DAT": Case(
        "Adaptive_Channel_Attention", f"{SPANDREL}.DAT.__arch.DAT",
        lambda m: m.Adaptive_Channel_Attention(48, 4, True), (TOKENS, 7, 9),
    ),
    "FDAT": Case(
        "FastChannelAttention", f"{SPANDREL}.FDAT.__arch.fdat",
        lambda m: m.FastChannelAttention(48, 4, True), (TOKENS, 7, 9),
    ),
    "DITN": Case(
        "ISA", f"{SPANDREL}.DITN.__arch.DITN_Real", lambda m: m.ISA(36, True), ((2, 36, 7, 9),), images=True
    ),
    "DaViT": Case("ChannelAttention", "timm.models.davit", lambda m: m.ChannelAttention(48, 4, True), (TOKENS,)),
    "DaViT fl": Case("ChannelAttentionV2", "timm.models.davit", lambda m: m.ChannelAttentionV2(48, 4), (TOKENS,)),
    "DaViT fl, scale of D": Case(
        "ChannelAttentionV2", "timm.models.davit", lambda m: m.ChannelAttentionV2(48, 4, dynamic_scale=False), (TOKENS,)
    ),
    "Florence-2": Case(
        "ChannelAttentionV2", "transformers.models.florence2.modeling_florence2", florence2, (TOKENS,)
    ),
    "EfficientViT": Case(
        "LiteMLA", "timm.models.efficientvit_mit", lambda m: m.LiteMLA(48, 48, dim=12, scales=(3, 5)), (IMAGE,),
        images=True,
    ),
    "DC-AE": Case(
        "SanaMultiscaleLinearAttention", DIFFUSERS,
        lambda m: m.SanaMultiscaleLinearAttention(48, 48, attention_head_dim=12), (IMAGE,), "to_v",
    ),
    "DC-AE, RMS norm": Case(
        "SanaMultiscaleLinearAttention", DIFFUSERS,
        lambda m: m.SanaMultiscaleLinearAttention(
            48, 48, attention_head_dim=12, norm_type="rms_norm", residual_connection=True
        ),
        (IMAGE,), "to_v", tolerance=1e-5,
    ),
    "Sana": Case("SanaLinearAttnProcessor2_0", DIFFUSERS, sana, (TOKENS,), "to_v"),
    "Sana of two inputs": Case(
        "SanaLinearAttnProcessor2_0", DIFFUSERS,
        lambda m: sana(m, kv_heads=4, qk_norm="rms_norm_across_heads", cross_attention_dim=32, bias=True),
        (TOKENS, (2, 20, 32)), "to_k", tolerance=1e-5,
    ),
    "LoFTR": Case(
        "LinearAttention", "kornia.feature.loftr.loftr_module.linear_attention", lambda m: m.LinearAttention(),
        ((2, 63, 4, 12),) * 3, "",
    ),
    "LoFTR, masks": Case(
        "LinearAttention", "kornia.feature.loftr.loftr_module.linear_attention", lambda m: m.LinearAttention(),
        ((2, 63, 4, 12), (2, 20, 4, 12), (2, 20, 4, 12), mask(2, 63), mask(2, 20)), "",
    ),
}  # fmt: skip


def call(model: nn.Module, args: list[Any]) -> Tensor:
    """Calls the model. In float64, originals that compute a part in float32 compute it in float64."""
    exact = any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args) and not is_replaced(model)
    with InFloat64() if exact else nullcontext():
        return model(*args)


def results(model: nn.Module, args: list[Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    args = [a.to(dtype).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    y = call(model, args)
    leaves = {f"x{i}": a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), randn(*y.shape, seed=9, dtype=torch.float64).to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)}}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")

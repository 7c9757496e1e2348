"""The one table of what is measured."""

from __future__ import annotations

from dataclasses import dataclass

CHECK_BYTES = 256
"""Per number of q: what the check of a provider holds at its peak, the float64 oracle above all. Measured on the CPU,
forward and backward in float32: 211."""


@dataclass(frozen=True)
class OpShape:
    """q, k, v of one call: batch, tokens, heads, features per head."""

    B: int
    N: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"({self.B},{self.N},{self.H},{self.D})"

    @property
    def channels(self) -> int:
        return self.H * self.D

    def flops(self, backward: bool) -> int:
        """Two D x D products per token forward, four more backward; a multiply-add is two."""
        return (12 if backward else 4) * self.B * self.H * self.N * self.D**2

    def least_bytes(self, backward: bool, itemsize: int) -> int:
        """Forward reads q, k, v and writes out; backward reads q, k, v, dout and writes dq, dk, dv."""
        return (11 if backward else 4) * self.B * self.N * self.channels * itemsize

    @property
    def check_bytes(self) -> int:
        """Memory that it takes to prove a result of this shape right."""
        return CHECK_BYTES * self.B * self.N * self.channels


@dataclass(frozen=True)
class LayerShape:
    """x of one layer: batch, tokens, channels, and the number of heads."""

    B: int
    N: int
    C: int
    heads: int

    def __str__(self) -> str:
        return f"({self.B},{self.N},{self.C},{self.heads})"

    def flops(self, backward: bool) -> int:
        """The projections to q, k, v and from out, and the operator between them."""
        op = OpShape(self.B, self.N, self.heads, self.C // self.heads)
        return (3 if backward else 1) * 8 * self.B * self.N * self.C**2 + op.flops(backward)

    def least_bytes(self, backward: bool, itemsize: int) -> int:
        """Forward reads x and writes y; backward reads x and dy and writes dx. Weights are left out."""
        return (5 if backward else 2) * self.B * self.N * self.C * itemsize


@dataclass(frozen=True)
class ModelShape:
    """A timm model and what goes in."""

    name: str
    B: int
    size: int

    def __str__(self) -> str:
        return f"{self.name} ({self.B},3,{self.size},{self.size})"


OP_SHAPES: dict[str, tuple[OpShape, ...]] = {
    "main": (
        OpShape(1, 16384, 4, 32),
        OpShape(8, 3136, 4, 24),
        OpShape(8, 1024, 4, 36),
        OpShape(8, 256, 4, 48),
        OpShape(1, 65536, 2, 48),
        OpShape(16, 64, 4, 60),
        OpShape(1, 196, 8, 48),
    ),
    "tiny": (OpShape(1, 16, 1, 8), OpShape(2, 16, 2, 16), OpShape(1, 49, 4, 32)),
    # nano and small at 224 pixels in patches of 16 and 8, nano at 384 in patches of 8
    "xcit": (OpShape(8, 196, 4, 32), OpShape(8, 784, 4, 32), OpShape(8, 784, 8, 48), OpShape(1, 2304, 4, 32)),
    # the three attention stages of small at 256 pixels
    "edgenext": (OpShape(8, 1024, 8, 12), OpShape(8, 256, 8, 20), OpShape(8, 64, 8, 38)),
    # the four levels, a crop of 128 pixels
    "restormer": (OpShape(1, 16384, 1, 48), OpShape(1, 4096, 2, 48), OpShape(1, 1024, 4, 48), OpShape(1, 256, 8, 48)),
    "square": tuple(OpShape(1, N, 4, D) for D in (32, 64) for N in (64, 256, 1024, 4096, 16384)),
    # a data center GPU: more than its caches hold, and checks that fit its memory
    "gpu": (OpShape(32, 16384, 8, 32), OpShape(64, 3136, 8, 48), OpShape(16, 65536, 4, 48), OpShape(128, 784, 8, 48)),
    # one image at a time: calls that launches and the host may dominate
    "gpu-latency": (
        OpShape(1, 196, 8, 48),
        OpShape(1, 1024, 4, 36),
        OpShape(1, 2304, 4, 32),
        OpShape(1, 16384, 1, 48),
        OpShape(1, 784, 8, 128),
    ),
}
LAYER_SHAPES: dict[str, tuple[LayerShape, ...]] = {
    "main": (
        LayerShape(1, 16384, 128, 4),
        LayerShape(8, 3136, 96, 4),
        LayerShape(8, 1024, 144, 4),
        LayerShape(8, 256, 192, 4),
    ),
    "xcit": (LayerShape(8, 784, 128, 4), LayerShape(8, 784, 384, 8), LayerShape(1, 2304, 128, 4)),
    "edgenext": (LayerShape(8, 1024, 96, 8), LayerShape(8, 256, 160, 8), LayerShape(8, 64, 304, 8)),
    "gpu": (LayerShape(32, 16384, 256, 8), LayerShape(64, 3136, 384, 8), LayerShape(128, 784, 384, 8)),
    "gpu-latency": (LayerShape(1, 196, 384, 8), LayerShape(1, 2304, 128, 4), LayerShape(1, 784, 1024, 8)),
}
DEFAULT = {"cpu": ("main",), "cuda": ("gpu", "gpu-latency")}
"""The sets that are run where none is named."""
MODEL_SHAPES: dict[str, tuple[ModelShape, ...]] = {
    "main": (
        ModelShape("xcit_nano_12_p8_384", 1, 384),
        ModelShape("edgenext_small", 1, 256),
        ModelShape("edgenext_xx_small", 8, 256),
    ),
    "xcit": (ModelShape("xcit_nano_12_p16_224", 8, 224), ModelShape("xcit_nano_12_p8_384", 1, 384)),
    "edgenext": (ModelShape("edgenext_xx_small", 8, 256), ModelShape("edgenext_small", 1, 256)),
    "gpu": (ModelShape("xcit_small_12_p8_224", 32, 224), ModelShape("edgenext_small", 64, 256)),
    "gpu-latency": (ModelShape("xcit_nano_12_p8_384", 1, 384), ModelShape("edgenext_small", 1, 256)),
}

"""The shapes that are benchmarked."""

from __future__ import annotations

from dataclasses import dataclass

CHECK_BYTES = 256
"""Peak memory of the check of a provider per element of q, mostly of the float64 oracle. Measured on the CPU, forward
and backward in float32: 211."""


@dataclass(frozen=True)
class OpShape:
    """Shape of q, k and v of one call: batch, tokens, heads, features per head."""

    B: int
    N: int
    H: int
    D: int

    def __str__(self) -> str:
        return f"({self.B},{self.N},{self.H},{self.D})"

    @property
    def channels(self) -> int:
        return self.H * self.D

    @property
    def many(self) -> bool:
        """Whether it counts among those of MANY tokens."""
        return self.N >= 1024

    def flops(self, backward: bool) -> int:
        """Two D x D products per token in the forward, four more in the backward; a multiply-add counts as two."""
        return (12 if backward else 4) * self.B * self.H * self.N * self.D**2

    def least_bytes(self, backward: bool, itemsize: int) -> int:
        """Forward reads q, k, v and writes out; backward reads q, k, v, dout and writes dq, dk, dv."""
        return (11 if backward else 4) * self.B * self.N * self.channels * itemsize

    @property
    def check_bytes(self) -> int:
        """Memory needed to check a result of this shape."""
        return CHECK_BYTES * self.B * self.N * self.channels


@dataclass(frozen=True)
class LayerShape:
    """Shape of x of one layer, and the number of heads: batch, tokens, channels, heads."""

    B: int
    N: int
    C: int
    heads: int

    def __str__(self) -> str:
        return f"({self.B},{self.N},{self.C},{self.heads})"

    @property
    def many(self) -> bool:
        """Whether it counts among those of MANY tokens."""
        return self.N >= 8 * self.C

    def flops(self, backward: bool) -> int:
        """FLOPs of the form that needs fewer: the limit of a layer, whichever form it uses."""
        return min(self.direct_flops(backward), self.gram_flops(backward))

    def direct_flops(self, backward: bool) -> int:
        """FLOPs of the projections to q, k, v and from out, and of the operator between them."""
        op = OpShape(self.B, self.N, self.heads, self.C // self.heads)
        return (3 if backward else 1) * 8 * self.B * self.N * self.C**2 + op.flops(backward)

    def gram_flops(self, backward: bool) -> int:
        """FLOPs of the Gram form, at least.

        Per token: half of the symmetric x x^T, and M x; in the backward dy x^T, M^T dy and R x. Per image: W_q S,
        W_k S, W_o T and two products of width D; in the backward W_o^T dM, dM T^T, half of the symmetric R and five
        products of width D.
        """
        token, image = (9, 12) if backward else (3, 6)
        wide = (14 if backward else 4) * self.C // self.heads
        return self.B * self.C**2 * (token * self.N + image * self.C + wide)

    def least_bytes(self, backward: bool, itemsize: int) -> int:
        """Forward reads x and writes y; backward reads x and dy and writes dx. Excludes the weights, and the second
        read of x in the Gram form, since x may be cached."""
        return (5 if backward else 2) * self.B * self.N * self.C * itemsize


class BlockShape(LayerShape):
    """The same with layer norm, layer scale and a residual connection around the layer; FLOPs and least bytes are the
    same."""

    def __str__(self) -> str:
        return f"block {super().__str__()}"


@dataclass(frozen=True)
class ModelShape:
    """A model of timm or of :mod:`bench.mdta`, and the batch size and image size of its input."""

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
    # nano and small at 224 pixels with patches of 16 and 8, nano at 384 pixels with patches of 8
    "xcit": (OpShape(8, 196, 4, 32), OpShape(8, 784, 4, 32), OpShape(8, 784, 8, 48), OpShape(1, 2304, 4, 32)),
    # the three attention stages of small at 256 pixels
    "edgenext": (OpShape(8, 1024, 8, 12), OpShape(8, 256, 8, 20), OpShape(8, 64, 8, 38)),
    # the four levels, a crop of 128 pixels
    "restormer": (OpShape(1, 16384, 1, 48), OpShape(1, 4096, 2, 48), OpShape(1, 1024, 4, 48), OpShape(1, 256, 8, 48)),
    "square": tuple(OpShape(1, N, 4, D) for D in (32, 64) for N in (64, 256, 1024, 4096, 16384)),
    # for a data center GPU: larger than its caches, with checks that fit its memory
    "gpu": (OpShape(32, 16384, 8, 32), OpShape(64, 3136, 8, 48), OpShape(16, 65536, 4, 48), OpShape(128, 784, 8, 48)),
    # one image at a time: launches and the host may dominate
    "gpu-latency": (
        OpShape(1, 196, 8, 48),
        OpShape(1, 1024, 4, 36),
        OpShape(1, 2304, 4, 32),
        OpShape(1, 16384, 1, 48),
        OpShape(1, 784, 8, 128),
    ),
}
VARIANTS: dict[str, tuple[OpShape, ...]] = {
    # 4,096 and 1,024 tokens, as in its models at 512 and 256 pixels, and the last stage
    "LiteMLA": (OpShape(1, 4096, 32, 16), OpShape(8, 1024, 16, 32), OpShape(1, 49, 16, 32)),
    "Sana": (OpShape(1, 4096, 70, 32), OpShape(1, 1024, 70, 32)),
    # the first and the last stage at 768 pixels
    "Florence-2": (OpShape(1, 36864, 4, 32), OpShape(1, 576, 32, 32)),
    "DaViT": (OpShape(8, 3136, 3, 32), OpShape(8, 49, 24, 32)),
    "LoFTR": (OpShape(2, 4800, 8, 32), OpShape(1, 300, 8, 32)),
}
"""Shapes by model, for ``bench.variants``."""
MANY = {"op": "N >= 1024", "layer": "N >= 8C"}
GRID = "grid"
"""The set of layers for which both forms are timed and compared with the choice of auto; see :mod:`bench.forms`."""
# cases where the choice of the form is easy, and where it is not; 16 to 96 features per head
_GRID = (
    (1, 49, 384, 8), (1, 196, 192, 4), (1, 784, 64, 4), (1, 784, 192, 6), (1, 784, 384, 8), (1, 784, 768, 8),
    (1, 1024, 96, 4), (1, 1024, 256, 8), (1, 2304, 128, 4), (1, 3136, 48, 2), (1, 4096, 192, 4), (1, 4096, 512, 8),
    (1, 16384, 48, 1), (1, 16384, 128, 8), (1, 16384, 384, 8), (1, 65536, 64, 4),
    (4, 49, 192, 4), (4, 256, 160, 8), (4, 784, 256, 8), (4, 1024, 48, 1), (4, 1024, 384, 8), (4, 3136, 96, 6),
    (4, 4096, 128, 4), (8, 196, 384, 8), (8, 256, 192, 4), (8, 784, 384, 8),
    (16, 64, 240, 4), (16, 196, 128, 4), (16, 784, 192, 6), (16, 1024, 64, 4),
)  # fmt: skip
LAYER_SHAPES: dict[str, tuple[LayerShape, ...]] = {
    "main": (
        LayerShape(1, 65536, 64, 4),
        LayerShape(1, 16384, 128, 4),
        LayerShape(8, 3136, 96, 4),
        LayerShape(8, 1024, 144, 4),
        LayerShape(8, 256, 192, 4),
        LayerShape(16, 64, 240, 4),
        LayerShape(8, 784, 384, 8),
        LayerShape(8, 196, 384, 8),
    ),
    "xcit": (LayerShape(8, 784, 128, 4), LayerShape(8, 784, 384, 8), LayerShape(1, 2304, 128, 4)),
    "edgenext": (LayerShape(8, 1024, 96, 8), LayerShape(8, 256, 160, 8), LayerShape(8, 64, 304, 8)),
    GRID: tuple(LayerShape(*shape) for shape in _GRID),
    "gpu": (LayerShape(32, 16384, 256, 8), LayerShape(64, 3136, 384, 8), LayerShape(128, 784, 384, 8)),
    "gpu-latency": (LayerShape(1, 196, 384, 8), LayerShape(1, 2304, 128, 4), LayerShape(1, 784, 1024, 8)),
}
for _of, _blocks in (("main", "blocks"), ("gpu", "gpu-blocks")):
    LAYER_SHAPES[_blocks] = tuple(BlockShape(s.B, s.N, s.C, s.heads) for s in LAYER_SHAPES[_of])
DEFAULT = {"cpu": ("main", "blocks"), "cuda": ("gpu", "gpu-latency")}
"""The sets that are run by default on each device; those that the kind of benchmark does not have are skipped."""
MODEL_SHAPES: dict[str, tuple[ModelShape, ...]] = {
    "main": (
        ModelShape("xcit_nano_12_p8_384", 1, 384),
        ModelShape("xcit_tiny_12_p16_384", 1, 384),
        ModelShape("edgenext_small", 1, 256),
        ModelShape("edgenext_xx_small", 8, 256),
        ModelShape("mdta_48", 1, 128),
    ),
    "xcit": (ModelShape("xcit_nano_12_p16_224", 8, 224), ModelShape("xcit_nano_12_p8_384", 1, 384)),
    "edgenext": (ModelShape("edgenext_xx_small", 8, 256), ModelShape("edgenext_small", 1, 256)),
    "gpu": (ModelShape("xcit_small_12_p8_224", 32, 224), ModelShape("edgenext_small", 64, 256)),
    "gpu-latency": (ModelShape("xcit_nano_12_p8_384", 1, 384), ModelShape("edgenext_small", 1, 256)),
}

"""The backbone: a lightweight hybrid of convolutions and transformer layers with attention linear in the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xformer.attention import Factory, factory
from xformer.layers import ConvNorm, MBConv, XFBlock, init_weights, to_tokens
from xformer_kernels import validate

HEAD_DIM = 32
STEM = 16


class Stage(NamedTuple):
    """MBConvs, the first with the stage's stride, followed by ``blocks`` XF blocks of ``depth`` layers each."""

    channels: int
    expand: tuple[int, ...]
    kernel: int
    dim: int = 0
    depth: int = 0
    blocks: int = 0


class Variant(NamedTuple):
    stages: tuple[Stage, ...]
    head: int


VARIANTS = {
    "xformer_s": Variant(
        (
            Stage(32, (2, 3), 3),
            Stage(64, (4, 3), 3, 96, 2, 1),
            Stage(128, (4, 3), 5, 192, 2, 2),
            Stage(256, (4, 3), 5, 288, 3, 1),
        ),
        848,
    ),
    "xformer_xs": Variant(
        (
            Stage(24, (2, 3), 3),
            Stage(48, (4, 3), 3, 64, 2, 1),
            Stage(80, (4, 3), 5, 128, 2, 2),
            Stage(128, (4, 3), 5, 192, 3, 1),
        ),
        368,
    ),
    "xformer_xxs": Variant(
        (
            Stage(16, (2, 3), 3),
            Stage(32, (4, 3), 3, 64, 1, 1),
            Stage(64, (4, 3), 5, 96, 2, 2),
            Stage(112, (4,), 5, 160, 2, 1),
        ),
        320,
    ),
}
"""The sizes by name."""


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
    "avgmax": lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))),
    "catavgmax": lambda x: torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1),
}
"""Global pooling of (B, C, H, W), by timm's names; "catavgmax" gives 2 C features, the others C."""


class FeatureInfo(list[dict[str, Any]]):  # not timm's: the backbone imports without timm
    """One dict (num_chs, reduction, module, index) per feature map, with the methods of timm's ``FeatureInfo``."""

    @property
    def out_indices(self) -> tuple[int, ...]:
        return tuple(info["index"] for info in self)

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self.get("module", idx)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None) -> list[dict[str, Any]]:
        return [dict(info) if keys is None else {key: info[key] for key in keys} for info in self]


class Trunk(nn.Module):
    """Stem and stages, shared by the classifier and the feature extractor."""

    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def __init__(
        self,
        variant: Variant,
        in_chans: int = 3,
        *,
        attention: str | Factory = "xfa",
        stem_stride: int = 2,
        stage_strides: Sequence[int] = (2, 2, 2, 2),
        mlp_ratio: float = 2.0,
        se: bool = False,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        img_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        validate.integer("in_chans", in_chans)
        validate.positive("mlp_ratio", mlp_ratio)
        validate.probability("drop_path_rate", drop_path_rate)
        validate.boolean("se", se)
        validate.boolean("zero_init_last", zero_init_last)
        strides = (stem_stride, *stage_strides) if isinstance(stage_strides, Sequence) else ()
        if len(strides) != 1 + len(variant.stages) or any(type(s) is not int or s not in (1, 2) for s in strides):
            raise ValueError(
                f"stem_stride must be 1 or 2 and stage_strides {len(variant.stages)} of them, "
                f"got stem_stride={stem_stride!r}, stage_strides={stage_strides!r}"
            )
        make = factory(attention)

        def half(dim: int, drop_path: float) -> nn.Module:
            return make(dim, dim // HEAD_DIM, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate, drop_path=drop_path)

        self.in_chans = in_chans
        self.stem = ConvNorm(in_chans, STEM, 3, stem_stride)
        self.feature_info = FeatureInfo()
        self.grad_checkpointing = False
        steps = sum(len(stage.expand) + stage.blocks * stage.depth for stage in variant.stages)
        rates = iter([drop_path_rate * i / max(1, steps - 1) for i in range(steps)])
        stages, channels, reduction = [], STEM, stem_stride
        for i, (stage, stride) in enumerate(zip(variant.stages, stage_strides, strict=True)):
            blocks: list[nn.Module] = []
            for expand in stage.expand:
                step = stride if not blocks else 1
                blocks.append(MBConv(channels, stage.channels, expand, stage.kernel, step, se, next(rates)))
                channels = stage.channels
            for _ in range(stage.blocks):
                drops = tuple(next(rates) for _ in range(stage.depth))
                blocks.append(XFBlock(channels, stage.dim, half, mlp_ratio, proj_drop_rate, drops))
            stages.append(nn.Sequential(*blocks))
            reduction *= stride
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{i}", "index": i})
        self.stages = nn.Sequential(*stages)
        init_weights(self, zero_init_last)
        self._check_size(img_size, reduction)

    @staticmethod
    def _check_size(img_size: int | tuple[int, int] | None, reduction: int) -> None:
        if img_size is None:
            return
        size = img_size if isinstance(img_size, Sequence) else (img_size, img_size)
        if len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
            raise ValueError(f"img_size must be an integer above 0 or two of them, got {img_size!r}")
        height, width = size
        tokens = -(-height // reduction) * -(-width // reduction)
        if tokens < 2:
            raise ValueError(
                f"img_size={img_size} leaves one token at stride {reduction}, and norms over one token leave "
                "of q and k their signs alone: take stem_stride=1, or stage_strides with more ones"
            )

    def walk(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the output of every stage."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"x must have shape (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        # with a single channel the memory formats are ambiguous, and the convolution may have returned the other one
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            yield x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable activation checkpointing: stages are recomputed in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False, prefix: str = "^") -> dict[str, Any]:
        """Group parameters by depth, for layer-wise learning rate decay (timm's convention).

        `prefix`: regular expression for the start of parameter names, if this is a submodule of another model.
        """
        depth = prefix + (r"stages\.(\d+)" if coarse else r"stages\.(\d+)\.(\d+)")
        return {"stem": f"{prefix}stem", "blocks": [(depth, None), (f"{prefix}head_conv", (99999,))]}

    def no_weight_decay(self) -> set[str]:
        """Names of the temperatures, which should be excluded from weight decay (timm's convention)."""
        return {name for name, _ in self.named_parameters() if name.endswith("temperature")}


class XFormer(Trunk):
    """Image classifier: images (B, in_chans, H, W) to logits (B, num_classes).

    ::

        stem 3x3 -> 4 stages of MBConvs and XF blocks -> 1x1 convolution -> mean over pixels -> dropout -> classifier

    Args:
        variant: a value of :data:`VARIANTS`, or a custom one.
        num_classes: number of classes; if 0, there is no classifier and ``forward`` returns pooled features.
        in_chans: number of image channels.
        attention: a name in :data:`xformer.attention.ATTENTION`, or a factory of half blocks.
        stem_stride, stage_strides: 1 or 2 each; the default product is 32. For small images, set the first ones to 1.
        mlp_ratio: ratio of hidden to input features of the MLPs.
        se: use squeeze-and-excitation in every MBConv.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after attention and MLPs. attn_drop_rate: dropout of the attention map.
        drop_path_rate: drop path rate of the last block; rates increase linearly from 0 at the first block.
        zero_init_last: initialise the last batch norm of every residual block with weight 0, so that blocks start as
            identities (timm's name).
        global_pool: "avg", "max", "avgmax" (their mean) or "catavgmax" (both), as in timm; "" for no pooling: logits
            (B, num_classes, H', W').
        img_size: only validated: any size is supported, also odd ones, that leaves at least two tokens.

    Raises:
        ValueError: invalid strides, unknown attention or global_pool, or an ``img_size`` that leaves one token.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **trunk: Any,
    ) -> None:
        super().__init__(variant, in_chans, **trunk)
        self.num_features = self.head_hidden_size = variant.head
        self.head_conv: nn.Module = ConvNorm(variant.stages[-1].channels, variant.head)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        init_weights(self.head_conv)

    @property
    def num_pooled_features(self) -> int:
        """Number of input features of the classifier."""
        return self.num_features * (2 if self.global_pool == "catavgmax" else 1)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; none if num_classes is 0. Pooling is kept if global_pool is None."""
        validate.integer("num_classes", num_classes, least=0)
        if global_pool is not None and global_pool != "" and global_pool not in POOLS:
            raise ValueError(f"global_pool must be '' or one of {', '.join(map(repr, POOLS))}, got {global_pool!r}")
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.stem.parameters())
        self.classifier = (
            nn.Linear(self.num_pooled_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )
        init_weights(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (B, num_features, H', W') before pooling."""
        *_, x = self.walk(x)
        y: Tensor = self.head_conv(x)
        return y

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits; if `pre_logits`, to the input of the classifier."""
        if self.global_pool:
            x = self.head_drop(POOLS[self.global_pool](x))
            return x if pre_logits else self.classifier(x)
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of stages, and of ``forward_features`` unless `intermediates_only` (timm's convention).

        Args:
            indices: stage indices, or the number of last stages; all by default.
            norm: accepted for compatibility with timm; has no effect.
            output_fmt: "NCHW", or "NLC" for intermediates of shape (B, H' * W', C).
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = stage_indices(len(self.stages), indices)
        found: dict[int, Tensor] = {}
        for i, y in enumerate(self.walk(x)):
            found[i] = y
            if stop_early and intermediates_only and i == max(wanted):
                break
        intermediates = [found[i] for i in wanted]
        if output_fmt == "NLC":
            intermediates = [to_tokens(x) for x in intermediates]
        return intermediates if intermediates_only else (self.head_conv(y), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last one in `indices` and return the indices (timm's convention).

        ``head_conv`` is removed if any stage is removed or if `prune_norm` is set; the classifier and pooling are
        removed if `prune_head` is set, which it must be then.

        Raises:
            ValueError: an index out of range; `prune_head` is False, and the classifier would lose its input.
        """
        kept = stage_indices(len(self.stages), indices)
        without_conv = prune_norm or kept[-1] + 1 < len(self.stages)
        if without_conv and not prune_head:
            raise ValueError(
                "prune_head must be True if stages or head_conv are removed, since the classifier needs them"
            )
        if prune_head:
            self.reset_classifier(0, "")
        if without_conv:
            self.head_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[kept[-1]]["num_chs"]
        self.stages = self.stages[: kept[-1] + 1]
        return list(kept)


class XFormerFeatures(Trunk):
    """Feature extractor: images to a list of feature maps, one for each of ``out_indices``.

    ``feature_info`` has their channels and reductions. The other arguments are those of :class:`XFormer`. Parameter
    names are the same as in :class:`XFormer`; stages after the last of ``out_indices`` are not created.

    Raises:
        ValueError: as :class:`XFormer`; a stage index out of range.
    """

    def __init__(
        self, variant: Variant, in_chans: int = 3, out_indices: int | Sequence[int] | None = None, **trunk: Any
    ) -> None:
        super().__init__(variant, in_chans, **trunk)
        self.out_indices = stage_indices(len(self.stages), out_indices, "out_indices")
        self.stages = self.stages[: max(self.out_indices) + 1]
        self.feature_info = FeatureInfo(self.feature_info[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        found = list(self.walk(x))
        return [found[i] for i in self.out_indices]


def stage_indices(stages: int, indices: int | Sequence[int] | None, name: str = "indices") -> tuple[int, ...]:
    """Sorted stage indices: all if None, the last n stages if an int n; negative indices count from the end."""
    if indices is None:
        return tuple(range(stages))
    if isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(
                f"{name} must name some of {stages} stages, or be how many of the last ones, got {indices}"
            )
        indices = range(stages - indices, stages)
    result = tuple(sorted({i + stages if i < 0 else i for i in indices}))
    if not result or result[0] < 0 or result[-1] >= stages:
        raise ValueError(f"{name} must name some of {stages} stages, got {list(indices)}")
    return result

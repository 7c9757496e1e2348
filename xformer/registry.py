"""Model registry: ``xformer_s()``, and ``timm.create_model("xformer_s")`` if timm is installed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from xformer.backbone import VARIANTS, XFormer, XFormerFeatures
from xformer.errors import UsageError

try:
    import timm
except ImportError:
    timm = None

__all__ = ["xformer_s", "xformer_xs", "xformer_xxs"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Channel statistics of ImageNet."""

default_cfgs: dict[str, dict[str, Any]] = {
    name: {
        "architecture": name,
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "first_conv": "stem.conv",
        "classifier": "classifier",
    }
    for name in VARIANTS
}
"""Configurations in timm's format; there are no pretrained weights, so ``url`` is empty."""


def build(
    name: str,
    *,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> XFormer | XFormerFeatures:
    """Create a variant by name: :class:`xformer.backbone.XFormer`, or XFormerFeatures if `features_only`.

    `options` are passed to the class; arguments that ``timm.create_model`` adds for pretrained weights are ignored,
    except for ``pretrained_cfg`` and ``pretrained_cfg_overlay``, which update the model's configuration.
    """
    if pretrained:
        raise ValueError(
            f"there are no pretrained weights of {name}: train it with `python -m xformer train`, and pass the weights "
            "as checkpoint_path= to timm.create_model, or to load_state_dict"
        )
    if options.pop("output_stride", None) not in (None, 32):
        raise ValueError("output_stride is not supported: choose stem_stride and stage_strides, whose product it is")
    config = dict(default_cfgs[name])
    for source in ("pretrained_cfg", "pretrained_cfg_overlay"):
        given = options.pop(source, None)
        config.update(given if isinstance(given, dict) else {})
    options.pop("cache_dir", None)
    model: XFormer | XFormerFeatures
    if features_only:
        for of_the_head in ("num_classes", "drop_rate", "global_pool"):
            options.pop(of_the_head, None)
        model = XFormerFeatures(VARIANTS[name], out_indices=out_indices, **options)
    elif out_indices is not None:
        raise ValueError("out_indices needs features_only=True")
    else:
        model = XFormer(VARIANTS[name], **options)
    model.default_cfg = model.pretrained_cfg = config
    return model


def build_features(name: str, strides: Sequence[int], in_chans: int = 3, **options: Any) -> Any:
    """Create a feature extractor with a map of each of these strides: our variant, or ``timm:NAME`` for timm's model.

    `options` are those of :class:`xformer.XFormer`, or of timm's model.

    Raises:
        UsageError: unknown model, or one without maps of these strides and of (B, C, H, W).
    """
    library, _, model = name.rpartition(":")
    if library == "" and name in default_cfgs:
        create: Any = partial(build, name, out_indices=len(strides))
    elif library == "timm" and timm is not None and timm.is_model(model):
        try:
            with torch.device("meta"):
                found = timm.create_model(model, features_only=True).feature_info.reduction()
        except Exception as error:  # models that do not support it raise errors of any kind
            raise UsageError(f"{name} cannot be made as a feature extractor by timm: {error}") from error
        # the last map of each stride
        indices = [i for i, stride in enumerate(found) if stride in strides and stride not in found[i + 1 :]]
        _check_strides(name, [found[i] for i in indices], strides)
        create = partial(timm.create_model, model, out_indices=indices)
    else:
        known = f"one of {', '.join(default_cfgs)}, or timm:MODEL for a model of timm, if it is installed"
        raise UsageError(f"backbone_name must be {known}, got {name!r}")
    features = create(features_only=True, in_chans=in_chans, **options)
    _check_strides(name, features.feature_info.reduction(), strides)
    layout: Any = getattr(features, "output_fmt", "NCHW")
    if layout != "NCHW":
        raise UsageError(
            f"{name} must have maps of the layout NCHW, got {layout.value}: try the option feature_cls='getter' of timm"
        )
    return features


def _check_strides(name: str, found: list[int], strides: Sequence[int]) -> None:
    if found != list(strides):
        raise UsageError(f"{name} must have maps of the strides {tuple(strides)}, got {found}")


def xformer_s(pretrained: bool = False, **options: Any) -> XFormer | XFormerFeatures:
    """5.5M parameters. Options: those of :class:`xformer.XFormer`, ``features_only`` and ``out_indices``."""
    return build("xformer_s", pretrained=pretrained, **options)


def xformer_xs(pretrained: bool = False, **options: Any) -> XFormer | XFormerFeatures:
    """2.3M parameters. Options: as of :func:`xformer_s`."""
    return build("xformer_xs", pretrained=pretrained, **options)


def xformer_xxs(pretrained: bool = False, **options: Any) -> XFormer | XFormerFeatures:
    """1.3M parameters. Options: as of :func:`xformer_s`."""
    return build("xformer_xxs", pretrained=pretrained, **options)


if timm is not None:
    for entry in (xformer_s, xformer_xs, xformer_xxs):
        timm.models.register_model(entry)

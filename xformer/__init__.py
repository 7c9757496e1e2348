"""A lightweight backbone of convolutions and cross feature attention, in three sizes.

    xformer_s, xformer_xs, xformer_xxs    the models, also registered with timm.create_model if timm is installed
    XFormer, XFormerFeatures              the classifier and the feature extractor, for custom variants
    ATTENTION                             accepted values of attention=, by name
    fuse_for_inference                    a copy with batch norms folded and layers fused

This package has the models; :mod:`xformer.detection` and :mod:`xformer.segmentation` are built on the backbones.
:mod:`xformer.recipes` has the commands of ``python -m xformer``: train, eval, predict and export. ``python -m
xformer.counts`` prints parameters and multiply-adds next to those of other models. There are no pretrained weights.
"""

from xformer.attention import ATTENTION
from xformer.backbone import VARIANTS, Stage, Variant, XFormer, XFormerFeatures
from xformer.fuse import fuse_for_inference
from xformer.registry import xformer_s, xformer_xs, xformer_xxs

__all__ = [
    "ATTENTION",
    "VARIANTS",
    "Stage",
    "Variant",
    "XFormer",
    "XFormerFeatures",
    "fuse_for_inference",
    "xformer_s",
    "xformer_xs",
    "xformer_xxs",
]

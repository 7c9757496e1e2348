"""A light backbone of convolutions and cross feature attention, in three sizes.

    xformer_s, xformer_xs, xformer_xxs    the models; timm.create_model knows them too where timm is installed
    XFormer, XFormerFeatures              the classifier and the feature extractor, for variants of your own
    ATTENTION                             what attention= may be, by name
    fuse_for_inference                    a copy with batch norms folded and layers fused

``python -m xformer`` has the commands train, eval, predict, export and make-shapes. ``python -m xformer.counts`` prints
parameters and multiply-adds beside other models'. There are no weights to download.
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

"""Semantic segmentation.

Segmenter    backbone and decoder, with whole-image and sliding-window inference
Decoder      the all-MLP decoder, for features of any backbone
upsample     bilinear upsampling by an integer factor, cropped to a size
"""

from xformer.segmentation.decoder import FORMS, Decoder, upsample
from xformer.segmentation.model import Segmenter

__all__ = ["FORMS", "Decoder", "Segmenter", "upsample"]

"""A class for every pixel.

Segmenter    backbone and decoder, with whole-image and sliding-window inference
Decoder      the all-MLP decoder alone, for features of any backbone
upsample     bilinear, by a whole factor, cut to a size
"""

from xformer.segmentation.decoder import FORMS, Decoder, upsample
from xformer.segmentation.model import Segmenter

__all__ = ["FORMS", "Decoder", "Segmenter", "upsample"]

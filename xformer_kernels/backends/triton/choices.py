"""The options of an xfa call as constexprs of the kernels and in autotuning cache keys."""

from __future__ import annotations

from typing import NamedTuple

import torch

from xformer_kernels.backends.triton import configs, launch
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec


class Choices(NamedTuple):
    """The mathematical options of a call as constexprs of the kernels."""

    KEY_VALUE: bool
    TOKEN_NORM: bool
    FEATURE_NORM: bool
    """If neither TOKEN_NORM nor FEATURE_NORM is set, nothing is divided by norms."""
    SOFTMAX: bool
    EPS: float

    @staticmethod
    def of(spec: Spec) -> Choices:
        return Choices(spec.map == "key_value", spec.norm == "token", spec.norm == "feature", spec.softmax, spec.eps)

    @property
    def name(self) -> str:
        """The name in autotuning cache keys."""
        norm = "token" if self.TOKEN_NORM else "feature" if self.FEATURE_NORM else "none"
        return f"{('query_key', 'key_value')[self.KEY_VALUE]}-{norm}"

    @property
    def squares(self) -> str:
        """Which sums of squares the forward's Gram pass computes besides those of k; see gram.accumulate."""
        return "" if not self.TOKEN_NORM else "ac" if self.KEY_VALUE else "ab"


def gram_key(
    dtype: torch.dtype, D: int, arch: str, map: str, norm: bool = False, symmetric: bool = False
) -> configs.Key:
    """Autotuning cache key of a Gram pass. Normalised tokens are multiplied in the accumulate dtype."""
    if norm:
        return configs.Key("gram_normalised", accumulate_dtype(dtype), D, map)
    kernel = launch.variant("gram", dtype, launch.gram_precision(dtype, False, arch, D, symmetric))
    return configs.Key(kernel, dtype, D, map)

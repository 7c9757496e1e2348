"""What a call of xfa computes beside its tensors, in one record: checked where it is made, one argument of the ops."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from xformer_kernels import validate

MAPS = ("query_key", "key_value")
NORMS = ("token", "feature", "none")
ACTIVATIONS = ("softmax", "identity")


LEAST = torch.finfo(torch.float32).tiny
"""An eps that is normal in every dtype of sums."""


class Spec(NamedTuple):
    """The choices of :func:`xformer_kernels.xfa`, where they are explained. Hashable."""

    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    eps: float = 1e-12

    def check(self) -> Spec:
        """The spec itself.

        Raises:
            TypeError, ValueError: a choice that there is not, by its name.
        """
        validate.choice("map", self.map, MAPS)
        validate.choice("norm", self.norm, NORMS)
        validate.choice("activation", self.activation, ACTIVATIONS)
        validate.positive("eps", self.eps)
        return self

    def with_normal_eps(self, dtype: torch.dtype) -> Spec:
        """With an eps that `dtype`, of sums, does not round to 0."""
        if isinstance(self.eps, float) and self.eps >= LEAST:  # as good as always, and without a copy
            return self
        return self._replace(eps=max(float(self.eps), torch.finfo(dtype).tiny))

    @property
    def softmax(self) -> bool:
        """Whether the map is a softmax: the activation is of ``map="query_key"`` alone."""
        return self.map == "query_key" and self.activation == "softmax"

    @property
    def text(self) -> str:
        """As the schemas of the ops take it."""
        return f"{self.map} {self.norm} {self.activation} {float(self.eps)!r}"

    @staticmethod
    @lru_cache
    def of_text(text: str) -> Spec:
        """The inverse of :attr:`text`."""
        map, norm, activation, eps = text.split()
        return Spec(map, norm, activation, float(eps))

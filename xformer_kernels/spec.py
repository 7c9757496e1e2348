"""The formula of a call in one record, which is passed to the ops as a single argument.

It covers :func:`xformer_kernels.xfa` and :func:`xformer_kernels.linear_attention`: feature maps of q and k, their
norms, a D x D map, and a division of the output.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from xformer_kernels import validate

MAPS = ("query_key", "key_value")
NORMS = ("token", "feature", "none")
ACTIVATIONS = ("softmax", "identity")
FEATURE_MAPS = ("identity", "relu", "elu1", "softmax_features", "softmax_tokens")

LEAST = torch.finfo(torch.float32).tiny
"""An eps that is a normal number in every accumulate dtype."""


class Spec(NamedTuple):
    """The options of both functions; see their docstrings. Hashable.

    It has methods where properties would do: torch.compile of PyTorch 2.10 does not trace properties of a NamedTuple.
    """

    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    eps: float = 1e-12
    feature_maps: tuple[str, str] = ("identity", "identity")
    """The feature maps of q and of k."""
    normalize: bool = False
    scale: float = 1.0
    """Multiplies the output; xfa uses its temperature instead."""

    @staticmethod
    def of_linear_attention(feature_map: str | tuple[str, str], normalize: bool, scale: float, eps: float) -> Spec:
        """The spec of :func:`xformer_kernels.linear_attention`, checked."""
        if not isinstance(feature_map, (str, tuple)):
            raise TypeError(f"feature_map must be a name or a tuple of two names, got {type(feature_map).__name__}")
        names = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
        if len(names) != 2:
            raise ValueError(f"feature_map must be a name or a pair of names, of q and of k, got {feature_map!r}")
        if feature_map == "softmax_tokens":
            names = ("softmax_features", "softmax_tokens")
        return Spec("key_value", "none", "identity", eps, names, normalize, scale).check()

    def check(self) -> Spec:
        """Checks the options and returns the spec itself.

        Raises:
            TypeError, ValueError: an option is invalid; two options cannot be combined.
        """
        validate.choice("map", self.map, MAPS)
        validate.choice("norm", self.norm, NORMS)
        validate.choice("activation", self.activation, ACTIVATIONS)
        validate.positive("eps", self.eps)
        if self[4:] != _XFA_ALONE:
            self._check_linear()
        return self

    def _check_linear(self) -> None:
        of_q, of_k = self.feature_maps
        validate.choice("feature_map of k", of_k, FEATURE_MAPS)
        validate.choice("feature_map of q", of_q, tuple(name for name in FEATURE_MAPS if name != "softmax_tokens"))
        validate.boolean("normalize", self.normalize)
        validate.finite("scale", self.scale)
        if self.map != "key_value" or self.norm != "none":
            raise ValueError(
                f"feature_map={self.feature_maps!r}, normalize={self.normalize} and scale={self.scale} need "
                f"map='key_value' and norm='none', got map={self.map!r} and norm={self.norm!r}"
            )

    def of_xfa(self) -> dict[str, Any]:
        """The keyword arguments of :func:`xformer_kernels.xfa`."""
        return {"map": self.map, "norm": self.norm, "activation": self.activation, "eps": self.eps}

    def with_normal_eps(self, dtype: torch.dtype) -> Spec:
        """The spec with eps raised to at least the smallest normal number of `dtype`, the accumulate dtype."""
        if isinstance(self.eps, float) and self.eps >= LEAST:  # the common case, without a copy
            return self
        return self._replace(eps=max(float(self.eps), torch.finfo(dtype).tiny))

    def statistics(self, D: int, Dv: int) -> int:
        """How many values linear attention saves per head: S, z, and for a softmax over tokens the maxima of k."""
        return D * Dv + D + (D if self.feature_maps[1] == "softmax_tokens" else 0)

    @property
    def softmax(self) -> bool:
        """Whether the map is a softmax; the activation applies to ``map="query_key"`` only."""
        return self.map == "query_key" and self.activation == "softmax"

    def of_linear(self) -> dict[str, Any]:
        """The keyword arguments of :func:`xformer_kernels.linear_attention`."""
        return {
            "feature_map": self.feature_maps, "normalize": self.normalize, "scale": float(self.scale), "eps": self.eps,
        }  # fmt: skip

    def text(self) -> str:
        """The spec as a string, for the schemas of the ops."""
        of_q, of_k = self.feature_maps
        # torch.compile of PyTorch 2.15 does not trace the repr of a float; within a string it is the same digits
        return (
            f"{self.map} {self.norm} {self.activation} {float(self.eps)} "
            f"{of_q} {of_k} {int(self.normalize)} {float(self.scale)}"
        )

    @staticmethod
    @lru_cache
    def of_text(text: str) -> Spec:
        """The inverse of :meth:`text`."""
        map, norm, activation, eps, of_q, of_k, normalize, scale = text.split()
        return Spec(map, norm, activation, float(eps), (of_q, of_k), normalize == "1", float(scale))


_XFA_ALONE = Spec()[4:]

"""The kernels, one module per backend; none imports another.

A backend module defines the ops' functions (``xfa_forward``, ``xfa_backward``, and usually ``gram`` and
``channel_mix``) with the schemas of :mod:`xformer_kernels.ops` without the ``backend`` argument, and
``unsupported(device_type, dtypes, head_dims)``, which returns every reason why it cannot serve a call. Without ``gram``
and ``channel_mix`` it serves only the calls that its other functions compute. If it defines the string
``ONLY_BY_NAME``, ``backend="auto"`` skips it for that reason. Optional are ``layer_sample``, ``layer_gram``,
``layer_mix``, ``layer_maps`` and ``layer_maps_backward`` with ``takes_layer_maps(dtype, head_dim)`` (see
:mod:`xformer_kernels.layer.passes`); ``NORMS``, the norms that its ``xfa_forward`` supports;
``linear_attention_forward``, ``linear_attention_backward`` and ``FEATURE_MAPS``, the feature maps that these support,
with ``takes_linear_attention(dtype, head_dims)``;
``KEEPS_LAYOUT``; ``comes_first(q, spec)`` and ``decisions(tokens)`` (see :class:`Backend`). To add a backend, add a
module and a line in :data:`PATHS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from xformer_kernels.spec import Spec
from xformer_kernels.validate import DTYPES

PATHS: dict[str, Any] = {
    "cpp": f"{__name__}.cpp",
    "triton": f"{__name__}.triton",
    "cuda": f"{__name__}.cuda",
}
"""The backends, in the order in which ``backend="auto"`` tries them: the path of a module, or a module-like object.

The reference is tried last and is not listed here.
"""


class Backend:
    """The dispatcher's view of a backend: the attributes of its module, or defaults."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module

    def reasons(
        self, device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int], norm: str | None = None
    ) -> list[str]:
        """Every reason why the backend cannot serve a call; empty if it can. `norm`: see dispatch.reasons_against."""
        reasons: list[str] = self.module.unsupported(device_type, dtypes, head_dims)
        if self.has_primitives or norm in self._norms:
            return reasons
        what = "this call" if norm is None else f'norm="{norm}"'
        return [*reasons, f"it has no gram and channel_mix, which {what} needs"]

    @property
    def has_primitives(self) -> bool:
        """Whether it has ``gram`` and ``channel_mix``, of which calls are composed that it does not fuse."""
        return self.function("gram") is not None

    @property
    def only_by_name(self) -> str:
        """Why auto skips the backend; empty if it does not."""
        return getattr(self.module, "ONLY_BY_NAME", "")

    def fuses(self, spec: Spec) -> bool:
        """Whether ``xfa_forward`` supports `spec`; otherwise the call is composed of ``gram`` and ``channel_mix``."""
        return spec.norm in self._norms

    @property
    def _norms(self) -> tuple[str, ...]:
        norms: tuple[str, ...] = getattr(self.module, "NORMS", ("token", "feature"))
        return norms

    def fuses_linear_attention(
        self, feature_maps: tuple[str, str], dtype: torch.dtype, head_dims: tuple[int, int]
    ) -> bool:
        """Whether ``linear_attention_forward`` supports these feature maps of q and k and `head_dims` of k and v;
        otherwise the call is composed."""
        if not {*feature_maps} <= {*getattr(self.module, "FEATURE_MAPS", ())}:
            return False
        takes = getattr(self.module, "takes_linear_attention", None)
        return takes is None or bool(takes(dtype, head_dims))

    def takes_layer_maps(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether ``layer_maps`` and ``layer_maps_backward`` support weights of this dtype; otherwise eager PyTorch
        computes both."""
        if self.function("layer_maps") is None:
            return False
        takes = getattr(self.module, "takes_layer_maps", None)
        return takes is None or bool(takes(dtype, head_dim))

    @property
    def keeps_layout(self) -> bool:
        """Whether results keep the layout of the tokens, see :class:`layouts.Results`."""
        return getattr(self.module, "KEEPS_LAYOUT", False)

    def comes_first(self, q: torch.Tensor, spec: Spec) -> bool:
        """Whether auto tries the backend before all others for a call of xfa."""
        first = getattr(self.module, "comes_first", None)
        return first is not None and bool(first(q, spec))

    def decisions(self, tokens: dict[str, torch.Tensor]) -> tuple[str, ...]:
        """How the backend would compute a call, where that depends on settings or strides; `tokens`: by name."""
        decide = getattr(self.module, "decisions", None)
        return () if decide is None else tuple(decide(tokens))

    def function(self, name: str) -> Callable[..., Any] | None:
        """The function of an op or of a layer pass; None if the backend does not define it."""
        return getattr(self.module, name, None)


_loaded: dict[str, tuple[Backend | None, str]] = {}


def load(name: str) -> tuple[Backend | None, str]:
    """The backend, or None and why its module cannot be imported."""
    found = _loaded.get(name)
    if found is None:
        where = PATHS[name]
        try:
            found = Backend(name, importlib.import_module(where) if isinstance(where, str) else where), ""
        except ImportError as error:
            found = None, f"{type(error).__name__}: {error}"
        _loaded[name] = found
    return found


def unsupported_numbers(dtypes: Iterable[torch.dtype], head_dims: Iterable[int], widest: int) -> list[str]:
    """Why kernels that support the usual dtypes and 1 to `widest` features cannot serve a call; empty if they can."""
    reasons = []
    bad_dims = [str(dim) for dim in head_dims if not 1 <= dim <= widest]
    if bad_dims:
        reasons.append(f"{', '.join(bad_dims)} features per head, the kernels take 1 to {widest}")
    bad = [str(dtype) for dtype in dtypes if dtype not in DTYPES]
    if bad:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"dtype {', '.join(bad)} is not one of {accepted}")
    return reasons


def tf32_allowed() -> bool:
    """Whether the user allows tf32 for float32 matmuls on a GPU; read at every call."""
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return precision == "tf32" if precision is not None else matmul.allow_tf32


def uncut(x: torch.Tensor) -> torch.Tensor:
    """x, in float64 if torch would use tf32 for its products: for sums of squares, which square the error as well."""
    return x.double() if x.is_cuda and x.dtype is torch.float32 and tf32_allowed() else x


def precision_of_products(dtype: torch.dtype, tf32: bool) -> list[str]:
    """A line for :func:`xformer_kernels.explain` about the precision of products of float32 tokens."""
    if dtype is not torch.float32:
        return []
    allowed = "which torch.backends.cuda.matmul allows; norms and x^T x of the Gram form are in float32"
    return [f"products of float32 are cut to tf32, {allowed}" if tf32 else "products of float32 are in float32"]

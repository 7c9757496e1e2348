"""The kernels, one module per backend; none imports another.

A backend offers the ops' functions (``xfa_forward``, ``xfa_backward``, ``gram``, ``channel_mix``) with the schemas of
:mod:`xformer_kernels.ops` less the ``backend`` argument, and ``unsupported(device_type, dtypes, head_dims)``: every
reason why it cannot serve a call. If it has a text ``ONLY_BY_NAME``, ``backend="auto"`` passes over it for that reason.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

ORDER = ("cpp", "triton")
"""The order in which ``backend="auto"`` asks. The reference comes after all of them and is not a backend module."""


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The backend's module, or None and why it cannot be imported."""
    try:
        return importlib.import_module(f"{__name__}.{name}"), ""
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"

"""Selects the backend that serves a call, with every reason why others cannot."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xformer_kernels import backends
from xformer_kernels.spec import Spec

ENVIRONMENT = "XFORMER_KERNELS_BACKEND"
"""Environment variable that overrides ``backend="auto"``; read at every call."""


def names() -> tuple[str, ...]:
    """The backends in the order in which auto tries them, then the reference."""
    return (*backends.PATHS, "reference")


_chosen: dict[tuple[Any, ...], str] = {}
_records: list[list[tuple[str, str]]] = []


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call and why the others do not. Print it.

    ``reasons`` maps every backend to the reasons why it cannot serve the call; an empty list means that it can.
    ``decisions`` describes how the backend computes the call where that depends on settings or strides.
    """

    backend: str
    reasons: dict[str, list[str]]
    asked: str
    decisions: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.backend} serves this call (asked for: {self.asked})"]
        lines += [f"  - {decision}" for decision in self.decisions]
        for name, reasons in self.reasons.items():
            if reasons:
                lines += [f"  {name}: no"] + [f"    - {reason}" for reason in reasons]
            else:
                lines.append(f"  {name}: {'yes' if name == self.backend else 'available, not chosen'}")
        return "\n".join(lines)


def reasons_against(
    name: str,
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...],
    norm: str | None = None,
) -> list[str]:
    """Every reason why backend `name` cannot serve a call; empty when it can.

    `norm`: that of a call of xfa which a single op may compute; None for other calls, which are gram, channel_mix or
    composed of them, unless the backend fuses them.
    """
    if name == "reference":
        return []
    backend, cause = backends.load(name)
    if backend is None:
        return [f"xformer_kernels.backends.{name} cannot be imported ({cause}); see python -m xformer_kernels.info"]
    return backend.reasons(device_type, dtypes, head_dims, norm)


def _against_auto(name: str, *call: Any) -> list[str]:
    """Every reason why ``backend="auto"`` passes over backend `name`; the arguments of :func:`reasons_against`."""
    reasons = reasons_against(name, *call)
    backend = None if name == "reference" else backends.load(name)[0]
    return [*reasons, backend.only_by_name] if backend is not None and backend.only_by_name else reasons


def _asked(backend: str) -> tuple[str, str]:
    """The requested backend, and its description for messages."""
    if backend == "auto":
        value = os.environ.get(ENVIRONMENT) or "auto"
        if value != "auto" and value not in names():
            raise ValueError(f"{ENVIRONMENT} is {value!r}; it must be one of {_names()}")
        return value, f"{ENVIRONMENT}={value}" if value != "auto" else "auto"
    return backend, backend


def asked(backend: str) -> str:
    """The name of the backend requested by the argument or the environment variable, or "auto"."""
    return _asked(backend)[0]


def _names() -> str:
    return ", ".join(repr(name) for name in ("auto", *names()))


def check_name(backend: str) -> None:
    """Raises ValueError unless `backend` is "auto" or the name of a backend."""
    if backend != "auto" and backend not in names():
        raise ValueError(f"backend must be one of {_names()}, got {backend!r}")


def _walk(first: str | None) -> tuple[str, ...]:
    """The backends in the order in which auto tries them, `first` before all others."""
    return names() if first is None else (first, *(name for name in names() if name != first))


def first_asked(q: torch.Tensor, spec: Spec) -> str | None:
    """The backend that auto tries before all others, for (B, H, N, D) tokens; None for the usual order.

    While compiling, sizes may be symbolic, so the usual order applies.
    """
    if not q.is_cuda or torch.compiler.is_compiling():
        return None
    for name in backends.PATHS:
        backend, _ = backends.load(name)
        if backend is not None and backend.comes_first(q, spec):
            return name
    return None


def explain(
    backend: str,
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...],
    norm: str | None = None,
    first: str | None = None,
    tokens: dict[str, torch.Tensor] | None = None,
) -> Explanation:
    """The choice of :func:`choose` with every reason; `tokens`: the tensors that the backend reads, by name."""
    check_name(backend)
    wanted, how = _asked(backend)
    against = _against_auto if wanted == "auto" else reasons_against
    reasons = {name: against(name, device_type, dtypes, head_dims, norm) for name in _walk(first)}
    if wanted == "auto":
        wanted = next(name for name in reasons if not reasons[name])
    elif reasons[wanted]:
        raise RuntimeError(f"backend {how} cannot serve this call:\n" + "\n".join(f"- {r}" for r in reasons[wanted]))
    serving = None if wanted == "reference" else backends.load(wanted)[0]
    return Explanation(wanted, reasons, how, serving.decisions(tokens) if serving is not None and tokens else ())


def explain_reference(backend: str, reason: str) -> Explanation:
    """The explanation where the reference serves, because all kernels are ruled out for the same reason."""
    check_name(backend)
    return Explanation("reference", {name: [reason] * (name != "reference") for name in names()}, _asked(backend)[1])


def _loaded(name: str) -> backends.Backend | None:
    """The backend; None for the reference and for a backend that cannot be imported."""
    return None if name == "reference" else backends.load(name)[0]


def fuses(backend: str, spec: Spec) -> bool:
    """Whether a backend's ``xfa_forward`` supports `spec`; otherwise the call is composed of gram and channel_mix."""
    found = _loaded(backend)
    return found is not None and found.fuses(spec)


@torch.compiler.assume_constant_result
def fuses_linear_attention(
    backend: str, feature_maps: tuple[str, str], dtype: torch.dtype, head_dims: tuple[int, int]
) -> bool:
    """Whether a backend has a fused kernel for the call; otherwise it is composed of gram and channel_mix."""
    found = _loaded(backend)
    return found is not None and found.fuses_linear_attention(feature_maps, dtype, head_dims)


@torch.compiler.assume_constant_result
def keeps_layout(backend: str) -> bool:
    """Whether a backend's results keep the layout of their tokens; otherwise outputs are contiguous (B, N, H, D)."""
    found = _loaded(backend)
    return found is not None and found.keeps_layout


@torch.compiler.assume_constant_result
def has(backend: str, op: str) -> bool:
    """Whether a backend has a function that computes `op`."""
    found = _loaded(backend)
    return found is not None and found.function(op) is not None


@torch.compiler.assume_constant_result
def may_serve(
    backend: str,
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...],
    norm: str | None = None,
) -> bool:
    """Whether the backend requested by name or environment can serve a call; for auto, whether any kernel can."""
    name = asked(backend)
    if name == "auto":
        return choose(backend, device_type, dtypes, head_dims, norm, warn=False) != "reference"
    return not reasons_against(name, device_type, dtypes, head_dims, norm)


@torch.compiler.assume_constant_result
def choose(
    backend: str,
    device_type: str,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...],
    norm: str | None = None,
    first: str | None = None,
    warn: bool = True,
) -> str:
    """The name of the backend that serves the call; auto tries `first` before the others.

    `norm`: as for :func:`reasons_against`.

    If auto finds only the reference on the CPU, it warns once, unless `warn` is False.

    Raises ValueError for an unknown name, and RuntimeError, with every reason, if the backend requested by name (or by
    the environment variable) cannot serve the call.
    """
    check_name(backend)
    asked_by_environment = os.environ.get(ENVIRONMENT) if backend == "auto" else None
    key = (backend, asked_by_environment, device_type, dtypes, head_dims, norm, first, warn)
    name = _chosen.get(key)
    if name is None:
        if _asked(backend)[0] == "auto":
            # the first that can serve the call; later backends are not imported
            name = next(x for x in _walk(first) if not _against_auto(x, device_type, dtypes, head_dims, norm))
            if name == "reference" and device_type == "cpu" and warn:
                _warn_of_slow_path(explain(backend, device_type, dtypes, head_dims, norm))
        else:
            name = explain(backend, device_type, dtypes, head_dims, norm).backend
        _chosen[key] = name
    return name


def _warn_of_slow_path(explanation: Explanation) -> None:
    """Warns once per kind of call, since on the CPU the kernels are expected to be available."""
    warnings.warn(
        f"no kernel of xformer_kernels serves this call, it runs on the slower reference:\n{explanation}\n"
        f"({ENVIRONMENT}=reference chooses the reference without this warning)",
        RuntimeWarning,
        stacklevel=4,
    )


def kernel(backend: str, op: str) -> Callable[..., Any]:
    """The function of a backend that computes `op`."""
    found, cause = backends.load(backend)
    if found is None:
        raise RuntimeError(f"backend {backend} cannot be imported: {cause}")
    if _records:
        note(backend, op)
    function = found.function(op)
    assert function is not None, f"backend {backend} has no {op}"
    return function


@torch.compiler.assume_constant_result
def note(backend: str, op: str) -> None:
    """Appends (`backend`, `op`) to the list of every active :func:`record`."""
    for record in _records:
        record.append((backend, op))


@contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Context manager that returns a list to which every (backend, op) that runs is appended; for tests."""
    ran: list[tuple[str, str]] = []
    _records.append(ran)
    try:
        yield ran
    finally:
        _records.remove(ran)

"""Sets a forward on one module instance, or in diffusers its processor: the module keeps its identity and class.

State dicts, hooks, parametrizations, FSDP, deepcopy and pickle do not depend on ``module.forward``, and the class's own
forward remains available for calls that the new one does not reproduce.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

_REPLACED = "_xformer_kernels_replaced"


class Replaced(NamedTuple):
    """How a module was replaced: its family (see :mod:`.families`), and the caller's options."""

    family: str
    form: str
    backend: str
    names: tuple[str, ...] = ()  # parameter names of the module's own forward or processor
    required: int = 0  # how many of these are required; the others are None if omitted


class Processor:
    """Replaces ``module.processor``, the object that computes the attention of a diffusers module."""

    def __init__(self, compute: Callable[..., Any], replaced: Replaced, original: Any) -> None:
        self.compute, self.replaced, self.original = compute, replaced, original

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.compute(attn, self.replaced, self.original, args, kwargs)


def how_replaced(module: nn.Module) -> Replaced | None:
    """How a module was replaced; None if it is not, or is no longer, replaced."""
    processor = module.__dict__.get("processor")
    if isinstance(processor, Processor):
        return processor.replaced
    replaced: Replaced | None = module.__dict__.get(_REPLACED)
    return replaced


def bind(module: nn.Module, forward: Any, replaced: Replaced) -> None:
    """Makes ``module(...)`` call ``forward(module, ...)``."""
    module.__dict__[_REPLACED] = replaced
    module.__dict__["forward"] = partial(forward, module)
    # nn.DataParallel copies the module's attributes, including the forward that is bound to the original module
    module.__dict__["_replicate_for_data_parallel"] = partial(_replicate, module)


def bound_forward(module: nn.Module) -> Any:
    """The forward that :func:`bind` set; None if there is none, or another has been set since."""
    forward = module.__dict__.get("forward")
    ours = how_replaced(module) is not None and isinstance(forward, partial) and forward.args == (module,)
    return forward if ours else None


def release(module: nn.Module) -> Replaced | None:
    """Undoes the replacement of a module; a forward that has since wrapped ours then calls that of the class."""
    processor = module.__dict__.get("processor")
    if isinstance(processor, Processor):
        module.__dict__["processor"] = processor.original
        return processor.replaced
    forward = bound_forward(module)
    replaced: Replaced | None = module.__dict__.pop(_REPLACED, None)
    if forward is not None:
        del module.__dict__["forward"]
    if replaced is not None:
        module.__dict__.pop("_replicate_for_data_parallel", None)
    return replaced


def _replicate(module: nn.Module) -> nn.Module:
    replica = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    forward, replaced = bound_forward(module), how_replaced(module)
    if forward is not None and replaced is not None:
        bind(replica, forward.func, replaced)
    return replica  # type: ignore[no-any-return]

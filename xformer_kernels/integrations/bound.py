"""A forward bound to one module, or in diffusers its processor: what is replaced stays the same object and class.

State dicts, hooks, parametrizations, FSDP, deepcopy and pickle do not depend on ``module.forward``, and the class's own
forward is still there for what the bound one does not reproduce.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

_REPLACED = "_xformer_kernels_replaced"


class Replaced(NamedTuple):
    """How a module was replaced: its family (see :mod:`.families`), and the choices of the caller."""

    family: str
    form: str
    backend: str
    names: tuple[str, ...] = ()  # of the inputs, as the module's own forward or processor has them
    required: int = 0  # how many of these there must be; the others are None if left out


class Processor:
    """Stands where diffusers keeps what an attention module computes, ``module.processor``, in the place of another."""

    def __init__(self, compute: Callable[..., Any], replaced: Replaced, original: Any) -> None:
        self.compute, self.replaced, self.original = compute, replaced, original

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.compute(attn, self.replaced, self.original, args, kwargs)


def how_replaced(module: nn.Module) -> Replaced | None:
    """None for modules that are not replaced (any more)."""
    processor = module.__dict__.get("processor")
    if isinstance(processor, Processor):
        return processor.replaced
    replaced: Replaced | None = module.__dict__.get(_REPLACED)
    return replaced


def bind(module: nn.Module, forward: Any, replaced: Replaced) -> None:
    """Makes ``module(...)`` call ``forward(module, ...)``."""
    module.__dict__[_REPLACED] = replaced
    module.__dict__["forward"] = partial(forward, module)
    # nn.DataParallel copies the module's attributes, and with them a forward that is bound to the original
    module.__dict__["_replicate_for_data_parallel"] = partial(_replicate, module)


def bound_forward(module: nn.Module) -> Any:
    """The forward that :func:`bind` set; None if there is none, or another was set since."""
    forward = module.__dict__.get("forward")
    ours = how_replaced(module) is not None and isinstance(forward, partial) and forward.args == (module,)
    return forward if ours else None


def release(module: nn.Module) -> Replaced | None:
    """Undoes what replaced a module; a forward that was set since, around ours, then calls that of the class."""
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

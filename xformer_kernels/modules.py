"""Checks of what calling a module runs, and thus whether a fused computation may replace it.

A module is fused only if everything that torch would run inside it has exactly the class and state that the fused
computation reproduces; otherwise it is called.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.utils.module_tracker import ModuleTracker

from xformer_kernels.torch_internals import GLOBAL_HOOKS, calls_more_than_forward


def has_global_hooks() -> bool:
    """Whether global module hooks are registered.

    Hooks of :class:`torch.utils.module_tracker.ModuleTracker` are ignored: they only record names, and
    ``FlopCounterMode`` should count the same operations that run without it.
    """
    forward, forward_pre, backward, backward_pre = GLOBAL_HOOKS
    if not (forward or forward_pre or backward or backward_pre):
        return False
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in GLOBAL_HOOKS
        for hook in hooks.values()
    )


def runs_forward_of(module: Any, *kinds: type[nn.Module], forward: Any = None) -> bool:
    """Whether calling `module` runs the forward of one of `kinds` on its attributes, and nothing else.

    False for derived classes (parametrized modules, FSDP), hooks, ``module.compile()`` and a ``forward`` set on the
    instance (accelerate's offload), unless that is `forward`.
    """
    return (
        type(module) in kinds
        and module.__dict__.get("forward") is forward
        and not calls_more_than_forward(module)
        and not has_global_hooks()
    )


def dropout_p(module: Any) -> float | None:
    """The probability with which a module drops elements, as in ``F.dropout``; None: the module must be called."""
    if runs_forward_of(module, nn.Identity):
        return 0.0
    if not runs_forward_of(module, nn.Dropout):
        return None
    p: float = module.p if module.training else 0.0
    return p if p < 1 else None


def dropped(module: Any, x: Any) -> Any:
    """``module(x)`` of a dropout; it is not called if that would only return x."""
    return x if dropout_p(module) == 0 else module(x)


def drops_no_path(module: Any) -> bool:
    """Whether calling a drop path module only returns its input; True for None."""
    if module is None or runs_forward_of(module, nn.Identity):
        return True
    # the module can only be timm's if timm is loaded
    timms = getattr(sys.modules.get("timm.layers.drop"), "DropPath", None)
    return timms is not None and runs_forward_of(module, timms) and not (module.training and module.drop_prob > 0)

"""Replacing the attention of a model in place, and taking it back."""

from __future__ import annotations

from typing import Any

from torch import nn

from xformer_kernels import dispatch, validate
from xformer_kernels.integrations.bound import how_replaced, release
from xformer_kernels.integrations.families import FAMILIES, Found, look, replace
from xformer_kernels.integrations.trial import Trial
from xformer_kernels.layer.call import FORMS


def replace_attention(model: nn.Module, *, form: str = "auto", backend: str = "auto", verbose: bool = False) -> int:
    """Makes the feature attention and linear attention layers of a model use our kernels; returns how many there were.

    Which layers are served is in docs/integrations.md. A layer is known by its class or by its parts, and replaced if
    its forward is found to compute the family's formula: outputs and gradients are compared for small random input.
    All others are left as they are, and so are modules whose instance has a ``forward`` of its own (accelerate's
    offload: call this function first). The model itself may be a layer.

    Blocks of timm's XCiT and EdgeNeXt around such a layer compute layer norm, attention, layer scale and residual as
    one, see :func:`xformer_kernels.xfa_block`.

    Each layer or block stays the same object of the same class, with its parameters, buffers, hooks, parametrizations
    and mode; ``module.forward``, or ``module.processor`` in diffusers, is set to one that uses the kernels. State
    dicts, FSDP, deepcopy and pickle keep working. What is set computes what the module's class computes: wherever
    torch would run anything else inside (hooks, other submodules, parameters of other shapes, global module hooks),
    these parts, or the whole forward of the class, are called. ``torch.jit.script`` cannot compile it: call
    :func:`restore_attention` first. Undo with :func:`restore_attention`; :func:`is_replaced` tells.

    Args:
        model: any module.
        form: as in :func:`xformer_kernels.xfa_layer`; where q, k and v are convolved, multiplied or used again, it is
            always the direct one.
        backend: as in :func:`xformer_kernels.xfa`.
        verbose: prints a line for every module that is replaced, and for every module that is like these and left, with
            the reason.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: an unknown form or backend.
    """
    _check(model)
    validate.choice("form", form, FORMS)
    dispatch.check_name(backend)
    layers = 0
    tried: dict[Any, Trial] = {}
    for path, module in model.named_modules():
        found = Found(None, "is replaced already") if is_replaced(module) else look(module, tried)
        if found.family is not None:
            replace(module, found.family, form, backend)
            layers += not FAMILIES[found.family].whole_block
        if verbose and (found.family or found.why):
            outcome = f"replaced ({found.family})" if found.family else f"left: {found.why}"
            print(f"{path or '(the model)'}: {type(module).__name__}, {outcome}")
    return layers


def restore_attention(model: nn.Module) -> int:
    """Takes back :func:`replace_attention`, keeping the weights as they are now; returns how many layers there were.

    Raises TypeError if model is not a torch.nn.Module.
    """
    _check(model)
    released = [release(module) for module in model.modules()]
    return sum(replaced is not None and not FAMILIES[replaced.family].whole_block for replaced in released)


def is_replaced(module: nn.Module) -> bool:
    """Whether a layer or block computes with our kernels by :func:`replace_attention`.

    Raises TypeError if module is not a torch.nn.Module.
    """
    _check(module)
    return how_replaced(module) is not None


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

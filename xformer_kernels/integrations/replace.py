"""Replaces the attention layers of a model in place, and restores them."""

from __future__ import annotations

from typing import Any

from torch import nn

from xformer_kernels import dispatch, validate
from xformer_kernels.integrations.bound import how_replaced, release
from xformer_kernels.integrations.families import FAMILIES, Found, look, replace
from xformer_kernels.integrations.trial import Trial
from xformer_kernels.layer.call import FORMS


def replace_attention(model: nn.Module, *, form: str = "auto", backend: str = "auto", verbose: bool = False) -> int:
    """Makes the feature attention and linear attention layers of a model use our kernels; returns their number.

    docs/integrations.md lists the supported layers. A layer is recognised by its class or its submodules, and replaced
    if its forward computes the family's formula: outputs and gradients are compared for small random inputs. All other
    modules are left unchanged, including those with a ``forward`` set on the instance (accelerate's offload: call this
    function first). The model itself may be such a layer.

    In blocks of timm's XCiT and EdgeNeXt around such a layer, layer norm, attention, layer scale and residual are
    fused, see :func:`xformer_kernels.xfa_block`.

    Each layer or block remains the same object of the same class, with its parameters, buffers, hooks, parametrizations
    and mode; only ``module.forward``, or ``module.processor`` in diffusers, is replaced. State dicts, FSDP, deepcopy
    and pickle keep working. The result is that of the module's class: if torch would run anything else inside (hooks,
    other submodules, parameters of other shapes, global module hooks), these submodules, or the whole forward of the
    class, are called. ``torch.jit.script`` cannot compile replaced layers: call :func:`restore_attention` first, which
    undoes the replacement. :func:`is_replaced` tells whether a module is replaced.

    Args:
        model: any module.
        form: as in :func:`xformer_kernels.xfa_layer`; always direct if q, k and v are convolved, multiplied or reused.
        backend: as in :func:`xformer_kernels.xfa`.
        verbose: prints a line for every replaced module, and for every similar module that is left unchanged, with the
            reason.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: unknown form or backend.
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
    """Undoes :func:`replace_attention`, keeping the current weights; returns the number of restored layers.

    Raises TypeError if model is not a torch.nn.Module.
    """
    _check(model)
    released = [release(module) for module in model.modules()]
    return sum(replaced is not None and not FAMILIES[replaced.family].whole_block for replaced in released)


def is_replaced(module: nn.Module) -> bool:
    """Whether :func:`replace_attention` has replaced the forward of a layer or block.

    Raises TypeError if module is not a torch.nn.Module.
    """
    _check(module)
    return how_replaced(module) is not None


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

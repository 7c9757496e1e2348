"""Replacing the attention of a model in place, and taking it back."""

from __future__ import annotations

from typing import Any

from torch import nn

from xformer_kernels import dispatch, validate
from xformer_kernels.integrations.bound import Replaced, bind, how_replaced, release
from xformer_kernels.integrations.families import FAMILIES, family_of, forward
from xformer_kernels.layer.call import FORMS


def replace_attention(model: nn.Module, *, form: str = "auto", backend: str = "auto") -> int:
    """Makes the cross feature attention layers of a model compute with our kernels; returns how many there were.

    Served are timm's XCiT (``XCA``), timm's EdgeNeXt (``CrossCovarianceAttn``), and every module of the shape of
    Restormer's MDTA whose forward is that formula (it is tried with random weights). The model itself may be such a
    layer. Classes derived from these with a forward of their own are left alone, and so are modules whose instance has
    a ``forward`` of its own (accelerate's offload: call this function first).

    Blocks of timm's XCiT and EdgeNeXt around such a layer compute layer norm, attention, layer scale and residual as
    one, see :func:`xformer_kernels.xfa_block`.

    Each layer or block stays the same object of the same class, with its parameters, buffers, hooks, parametrizations
    and mode; ``module.forward`` is set to one that uses the kernels. State dicts, FSDP, deepcopy and pickle are not
    concerned. That forward computes what the module's class computes: wherever torch would run anything else inside
    (hooks, other submodules, parameters of other shapes, global module hooks), these parts, or the whole forward of the
    class, are called. ``torch.jit.script`` cannot compile it: call :func:`restore_attention` first. Undo with
    :func:`restore_attention`; :func:`is_replaced` tells.

    Args:
        model: any module.
        form: as in :func:`xformer_kernels.xfa_layer`; MDTA, which convolves q, k and v, has no other than its own.
        backend: as in :func:`xformer_kernels.xfa`.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: an unknown form or backend.
    """
    _check(model)
    validate.choice("form", form, FORMS)
    dispatch.check_name(backend)
    layers = 0
    for module in model.modules():
        family = None if is_replaced(module) else family_of(module)
        if family is not None:
            bind(module, forward, Replaced(family, form, backend))
            layers += not FAMILIES[family].whole_block
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

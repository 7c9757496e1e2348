"""Replacing the attention of a model in place, and taking it back."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from xformer_kernels import dispatch, validate
from xformer_kernels.integrations.blocks import block_class
from xformer_kernels.integrations.mdta import MDTA, agrees, is_mdta_shaped
from xformer_kernels.layer.functional import FORMS
from xformer_kernels.nn import XFA

_XCA = (("timm.models.xcit", "XCA"), ("timm.models.edgenext", "CrossCovarianceAttn"))
_ORIGINAL = "_xformer_kernels_original_class"


def replace_attention(model: nn.Module, *, form: str = "auto", backend: str = "auto") -> int:
    """Makes the cross feature attention layers of a model compute with our kernels; returns how many there were.

    Served are timm's XCiT (``XCA``), timm's EdgeNeXt (``CrossCovarianceAttn``), and every module of the shape of
    Restormer's MDTA whose forward is that formula (it is tried on a small random image). The model itself may be such a
    layer. Classes derived from these with a forward of their own are left alone.

    Blocks of timm's XCiT and EdgeNeXt around such a layer compute layer norm, attention, layer scale and residual as
    one, see :func:`xformer_kernels.xfa_block`, as long as these parts are the usual ones and have no hooks.

    Each layer or block stays the same module object, with its parameters, buffers, hooks, dtype, device and training
    mode: only its class changes, to :class:`xformer_kernels.XFA`, to :class:`xformer_kernels.integrations.mdta.MDTA`
    or to one of :mod:`xformer_kernels.integrations.blocks`.
    State dicts are those of the original. Undo with :func:`restore_attention`.

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
    count = 0
    for module in model.modules():
        replacement = _replacement(module)
        if replacement is not None:
            module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = replacement
            module.__dict__.update(form=form, backend=backend)
            count += 1
    for module in model.modules():
        around = block_class(module)
        if around is not None:
            module.__dict__[_ORIGINAL] = type(module)
            module.__class__ = around
    return count


def restore_attention(model: nn.Module) -> int:
    """Takes back :func:`replace_attention`, keeping the weights as they are now; returns how many layers there were.

    Raises TypeError if model is not a torch.nn.Module.
    """
    _check(model)
    count = 0
    for module in model.modules():
        if _ORIGINAL in module.__dict__:
            module.__class__ = module.__dict__.pop(_ORIGINAL)
            module.__dict__.pop("form", None)
            # blocks around the layers have none
            count += module.__dict__.pop("backend", None) is not None
    return count


def _check(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _replacement(module: nn.Module) -> type[nn.Module] | None:
    if isinstance(module, (XFA, MDTA)):
        return None
    for path, name in _XCA:
        # only a model that comes from timm can hold timm's classes, and then its module is loaded
        original = getattr(sys.modules.get(path), name, None)
        if original is not None and isinstance(module, original) and type(module).forward is original.forward:
            return XFA
    return MDTA if is_mdta_shaped(module) and agrees(module) else None

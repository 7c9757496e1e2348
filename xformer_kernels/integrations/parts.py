"""Checks of a module's submodules and attributes, for the families that are recognised by them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels import ops, validate
from xformer_kernels.packed import split_qkv

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
# attributes that every module has, or that module.compile() sets
OF_TORCH = {*nn.Module().__dict__, "_compiled_call_impl"}
STATE = (bool, int, float, str, torch.dtype, torch.device, type(None))
_FILLED = (list, dict, set, Tensor)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_parts(module: nn.Module, *others: str, **kinds: Kinds) -> bool:
    """Whether the children have exactly these names, and are instances of these classes or derived ones.

    The module must have no buffers, and apart from parameters only numbers, strings and its own methods: window shapes
    and functions set on the instance suggest a different formula for other inputs. Attributes named in `others`, and a
    ``forward`` set on the instance, are not checked here.
    """
    children = dict(module.named_children())
    return (
        children.keys() == kinds.keys()
        and all(isinstance(children[name], kind) for name, kind in kinds.items())
        and not list(module.named_buffers(recurse=False))
        and all(name in others or _is_plain(module, name, value) for name, value in module.__dict__.items())
    )


def _is_plain(module: nn.Module, name: str, value: Any) -> bool:
    if name in OF_TORCH or name == "forward" or isinstance(value, STATE):
        return True
    if inspect.ismethod(value):
        return value.__self__ is module
    # bookkeeping of wrappers (torch's and others), but nothing that the module's forward would fill or call
    return name.startswith("_") and not callable(value) and (name[:2] == "__" or not isinstance(value, _FILLED))


def has_heads(module: nn.Module, heads: str, temperature: str, dim: Any) -> bool:
    """Whether these attributes are a number of heads that divides `dim`, and one temperature per head."""
    H, t = getattr(module, heads, None), getattr(module, temperature, None)
    return divides(H, dim) and isinstance(t, Tensor) and t.shape == (H, 1, 1)


def divides(heads: Any, dim: Any) -> bool:
    return isinstance(heads, int) and heads > 0 and dim % heads == 0


def serves_tensor(x: Any, dims: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and x.dtype in validate.DTYPES and not ops.torch_only(x)


def serves_temperature(t: Any, heads: Any) -> bool:
    return isinstance(t, Tensor) and t.shape == (heads, 1, 1) and t.dtype in validate.DTYPES and not ops.torch_only(t)


def convolution(module: Any) -> Any:
    """The module if it is a convolution, or the only one in a sequence (as MONAI's ``Convolution``); otherwise None."""
    while isinstance(module, nn.Sequential) and len(module) == 1:
        module = module[0]
    return module if isinstance(module, (nn.Conv2d, nn.Conv3d)) else None


def as_image(out: Tensor, sizes: Any, like: Tensor) -> Tensor:
    """(B, H, N, D), in (B, N, H, D) memory, to (B, C, *sizes): a view if `like` is channels_last, else one copy."""
    pixels = out.transpose(-2, -1).flatten(1, 2).unflatten(-1, sizes)
    return pixels.contiguous(
        memory_format=_CHANNELS_LAST[like.dim()] if is_channels_last(like) else torch.contiguous_format
    )


def heads_of_image(image: Tensor, sizes: tuple[int, int, int], three: int) -> Iterator[Tensor]:
    """q, k and v (B, H, N, D) as views of a (B, 3 H D, ...) image. `sizes` are 3, H and D in the order of the channels,
    and `three` is the index of 3 among them.
    """
    if is_channels_last(image):
        tokens = image.flatten(2).transpose(1, 2).unflatten(-1, sizes)
        return (t.transpose(1, 2) for t in split_qkv(tokens, 2 + three))
    channels = image.flatten(2).unflatten(1, sizes)
    return (t.transpose(-2, -1) for t in split_qkv(channels, 1 + three))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]) and not x.is_contiguous()

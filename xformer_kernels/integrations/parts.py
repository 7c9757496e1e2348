"""What the parts of a module are, for the families that are recognised by them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xformer_kernels import ops, validate
from xformer_kernels.packed import split_qkv

Kinds = type[nn.Module] | tuple[type[nn.Module], ...]
# attributes of every module, and of module.compile()
OF_TORCH = {*nn.Module().__dict__, "_compiled_call_impl"}
STATE = (bool, int, float, str, torch.dtype, torch.device, type(None))
_FILLED = (list, dict, set, Tensor)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def has_parts(module: nn.Module, *others: str, **kinds: Kinds) -> bool:
    """Whether the children have exactly these names, and are of these classes or derived ones.

    The module may hold no buffers and, beside its parameters, nothing but numbers, names and its own methods: shapes of
    windows and functions that were set on it are signs of another formula for other inputs. `others`: names of
    attributes that may be anything, and a ``forward`` that was set, are for the caller to see.
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
    # what wrappers of torch and others note about the module, and nothing that its forward would fill or call
    return name.startswith("_") and not callable(value) and (name[:2] == "__" or not isinstance(value, _FILLED))


def has_heads(module: nn.Module, heads: str, temperature: str, dim: Any) -> bool:
    """Whether the attributes of these names are a number of heads that divides `dim`, and one temperature of each."""
    H, t = getattr(module, heads, None), getattr(module, temperature, None)
    return divides(H, dim) and isinstance(t, Tensor) and t.shape == (H, 1, 1)


def divides(heads: Any, dim: Any) -> bool:
    return isinstance(heads, int) and heads > 0 and dim % heads == 0


def serves_tensor(x: Any, dims: int) -> bool:
    return isinstance(x, Tensor) and x.dim() == dims and x.dtype in validate.DTYPES and not ops.torch_only(x)


def serves_temperature(t: Any, heads: Any) -> bool:
    return isinstance(t, Tensor) and t.shape == (heads, 1, 1) and t.dtype in validate.DTYPES and not ops.torch_only(t)


def convolution(module: Any) -> Any:
    """The convolution that a module is, or is a sequence of (as MONAI's ``Convolution``); None if it is no such."""
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
    """q, k and v as (B, H, N, D), of (B, 3 H D, ...): views. `sizes` are 3, H and D in the order of the channels, and
    `three` is the place of 3 among them.
    """
    if is_channels_last(image):
        tokens = image.flatten(2).transpose(1, 2).unflatten(-1, sizes)
        return (t.transpose(1, 2) for t in split_qkv(tokens, 2 + three))
    channels = image.flatten(2).unflatten(1, sizes)
    return (t.transpose(-2, -1) for t in split_qkv(channels, 1 + three))


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]) and not x.is_contiguous()

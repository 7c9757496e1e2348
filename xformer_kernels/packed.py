"""Packed projections: q, k and v as views of one tensor, and their gradients as views of one buffer like it.

autograd joins the gradients of views by a copy of all of them, which takes as long as the kernel that computed them.
:func:`split_qkv` gives the same views as ``unbind``; where its parts' gradients already lie in one buffer, as the CPU
kernels write them, that buffer is the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import ops, validate
from xformer_kernels.backends import layouts


def split_qkv(packed: Tensor, dim: int) -> tuple[Tensor, ...]:
    """``packed.unbind(dim)``, for the q, k and v of a packed projection.

    In training, use it in the place of ``unbind`` or ``chunk``: the gradient of `packed` is then written once by the
    CPU kernels, and not copied together from those of q, k and v.

    Args:
        packed: of any shape with 3 at `dim`, such as (B, N, 3, H, D), or (B, 3, H, D, N) of an image of channels.
        dim: the dimension of q, k and v.

    Returns:
        Views of `packed` without that dimension. They may not be modified in place, as those of ``unbind``.

    Raises:
        TypeError: packed is no tensor, or dim no integer.
        ValueError: packed has not 3 at `dim`.
    """
    validate.tensor("packed", packed)
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}: {dim!r}")
    if not -packed.dim() <= dim < packed.dim() or packed.shape[dim] != 3:
        raise ValueError(f"packed must have 3 at dim {dim}, that of q, k and v, got {tuple(packed.shape)}")
    # sizes last: traced ones are not to be compared
    if ops.wants_grad(packed) and ops.plain(packed) and packed.is_cpu and packed.nbytes >= layouts.WORTH_PACKING:
        parts: tuple[Tensor, ...] = _Split.apply(packed, dim % packed.dim())
        return parts
    return packed.unbind(dim)


def heads_of(qkv: Tensor, heads: int) -> Iterator[Tensor]:
    """q, k and v as (B, H, N, D), of (B, N, 3 H D): views."""
    return (t.transpose(1, 2) for t in split_qkv(qkv.unflatten(-1, (3, heads, -1)), 2))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, dim: int) -> tuple[Tensor, ...]:
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        return packed.unbind(dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        some = next((g for g in grads if g is not None), None)
        if some is None:
            return None, None
        parts = [torch.zeros_like(some) if g is None else g for g in grads]
        if torch.is_grad_enabled() or not ops.plain(*parts) or not _one_buffer(parts):
            return torch.stack(parts, ctx.dim), None
        first, second = parts[:2]
        sizes: list[int] = [*first.shape]
        strides: list[int] = [*first.stride()]
        sizes.insert(ctx.dim, len(parts))
        strides.insert(ctx.dim, int(second.storage_offset() - first.storage_offset()))
        return first.as_strided(sizes, strides), None


def _one_buffer(parts: list[Tensor]) -> bool:
    return len({t.untyped_storage().data_ptr() for t in parts}) == 1 and layouts.evenly_spaced(parts)

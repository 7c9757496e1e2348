"""Packed projections: q, k and v as views of one tensor, and their gradients as views of one buffer of that layout.

autograd combines the gradients of views by copying all of them, which takes as long as the kernel that computed them.
:func:`split_qkv` returns the same views as ``unbind``; if their gradients already share one buffer, as the CPU kernels
write them, that buffer becomes the gradient.
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

    In training, use it instead of ``unbind`` or ``chunk``: the CPU kernels then write the gradient of `packed` once,
    and it is not copied from the gradients of q, k and v.

    Args:
        packed: any shape with size 3 at `dim`, such as (B, N, 3, H, D), or (B, 3, H, D, N) for channels-first images.
        dim: the dimension that separates q, k and v.

    Returns:
        Views of `packed` without that dimension. As with ``unbind``, they must not be modified in place.

    Raises:
        TypeError: packed is not a tensor, or dim is not an integer.
        ValueError: the size of packed at `dim` is not 3.
    """
    validate.tensor("packed", packed)
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an integer, got {type(dim).__name__}: {dim!r}")
    if not -packed.dim() <= dim < packed.dim() or packed.shape[dim] != 3:
        raise ValueError(f"packed must have 3 at dim {dim}, that of q, k and v, got {tuple(packed.shape)}")
    # sizes are compared last, since comparing traced sizes must be avoided
    if ops.wants_grad(packed) and ops.plain(packed) and packed.is_cpu and packed.nbytes >= layouts.WORTH_PACKING:
        parts: tuple[Tensor, ...] = _Split.apply(packed, dim % packed.dim())
        return parts
    return packed.unbind(dim)


def heads_of(qkv: Tensor, heads: int) -> Iterator[Tensor]:
    """q, k and v (B, H, N, D) as views of a (B, N, 3 H D) projection."""
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

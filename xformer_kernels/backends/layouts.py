"""Memory layouts of results: outputs follow the layout of the tokens, gradients that of the tensor they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Empty = Callable[..., Tensor]
"""Allocates a tensor of a size and dtype on the device of the call; `order` as in :func:`torch.empty_permuted`."""


WORTH_PACKING = 1 << 20
"""Bytes of q, k and v from which copying them takes longer than the Python code that avoids the copy."""


@dataclass(frozen=True)
class Results:
    """Allocates the results of a backend, in the layout of the tokens if it keeps layouts (``KEEPS_LAYOUT``)."""

    empty: Empty
    keeps_layout: bool

    def output(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, H, Dv): contiguous, or in (B, H, Dv, N) memory if q, k and v are channel-major."""
        B, H, N, _ = q.shape
        return self._token_major((B, N, H, v.shape[-1]), q, k, v)

    def gradients(self, q: Tensor, k: Tensor, v: Tensor, packed: bool) -> Tensor:
        """(3, B, N, H, D) for the gradients of q, k and v: laid out likewise, or if `packed` like the packed tensor."""
        if packed:
            return empty_packed(self.empty, q, k).transpose(2, 3)
        B, H, N, D = q.shape
        return self._token_major((3, B, N, H, D), q, k, v)

    def _token_major(self, size: tuple[Any, ...], *tokens: Tensor) -> Tensor:
        if self.keeps_layout and all(map(channel_major, tokens)):
            first = range(len(size) - 3)
            return self.empty(size, tokens[0].dtype, order=(*first, *(len(first) + i for i in (1, 2, 0))))
        return self.empty(size, tokens[0].dtype)


def channel_major(x: Tensor) -> bool:
    """Whether the stride of (B, H, N, D) is 1 along tokens and not along features, as in channels-first images."""
    return x.stride(2) == 1 and x.stride(3) != 1


def empty_gradient(empty: Empty, x: Tensor) -> Tensor:
    """Allocates the gradient of (B, H, N, D) tokens in (B, N, H, D) memory, or (B, H, D, N) if x is channel-major."""
    B, H, N, D = x.shape
    if channel_major(x):
        return empty((B, H, D, N), x.dtype).transpose(2, 3)
    return empty((B, N, H, D), x.dtype).transpose(1, 2)


def evenly_spaced(parts: Sequence[Tensor]) -> bool:
    """Whether three tensors have the same shape and strides, and equally spaced, increasing addresses."""
    first, second, third = parts
    step = second.data_ptr() - first.data_ptr()
    return (
        step > 0
        and third.data_ptr() - second.data_ptr() == step
        and first.shape == second.shape == third.shape
        and first.stride() == second.stride() == third.stride()
    )


def are_packed(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether q, k and v, in this order, form a packed tensor without gaps or overlaps."""
    if not evenly_spaced((q, k, v)):
        return False
    expected = 1
    for stride, size in sorted(_packed_dimensions(q, k)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def empty_packed(empty: Empty, q: Tensor, k: Tensor) -> Tensor:
    """Allocates the gradients (3, B, H, N, D) of packed q, k and v, in the memory order of the packed tensor."""
    dimensions = _packed_dimensions(q, k)
    order = sorted(range(5), key=lambda i: dimensions[i], reverse=True)
    buffer = empty(tuple(dimensions[i][1] for i in order), q.dtype)
    return buffer.permute(*(order.index(i) for i in range(5)))


def _packed_dimensions(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of each dimension of the packed tensor, as (3, B, H, N, D)."""
    step = (k.data_ptr() - q.data_ptr()) // q.element_size()
    return [(step, 3), *zip(q.stride(), q.shape, strict=True)]

"""Tokens split over the ranks of a process group: sums of C x C numbers go over the network, never tokens.

Each rank calls :func:`xformer_kernels.xfa_layer` with its own tokens of the same images, (B, N of this rank, C), and
gets their outputs; N may differ from rank to rank and be 0. Weights are the same on all ranks.

Gram form, per layer and image, in the accumulate dtype: forward C numbers (a vector near the tokens' mean), then
``C C + C + 1``; backward ``O C + O``. Direct form: ``H D D + 2 H D`` forward and the same backward. Both add a few
integers forward, by which ranks find out that they disagree before they wait for each other.

A rank's gradients of weights are such that their *sum* over the ranks is the gradient of the sum of the ranks' losses:
add them up, as DDP does (DDP then divides by the number of ranks, for all parameters alike). A rank's gradient of its
own tokens is whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_NAMES = ("the number of images B", "C", "the number of heads", "I", "O", "dtype", "map, norm, activation, form or eps")
_FAILED = -1


def name(group: Any) -> str:
    """The name by which ops find a group again; empty for none."""
    return "" if group is None else str(group.group_name)


def total(group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks, in one all-reduce; the tensors themselves where there is no group."""
    if not group:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=_group(group))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def differentiable_total(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`total` for autograd: what the ranks do with a sum adds up in its gradient."""
    if group is None:
        return tensors
    result: tuple[Tensor, ...] = _Total.apply(name(group), *tensors)
    return result


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return total(group, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        result: tuple[Tensor, ...] = _Total.apply(ctx.group, *grads)
        return None, *result


def same(group: Any, t: Tensor) -> Tensor:
    """The first rank's numbers, on all ranks."""
    if group is not None:
        dist.broadcast(t, dist.get_global_rank(group, 0), group=group)
    return t


def size(group: str) -> int:
    return dist.get_world_size(_group(group)) if group else 1


def _group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


@contextmanager
def together(group: Any, x: Any) -> Iterator[list[int]]:
    """Within it a rank checks its arguments and appends to the list what all ranks must have alike.

    Raises on every rank, and none waits, if one of them has raised or they differ.
    """
    if group is None or torch.compiler.is_compiling():
        yield []
        return
    _check(group, x)
    mine: list[int] = []
    try:
        yield mine
    except Exception:
        _gather(group, x.device, [_FAILED] * len(_NAMES))
        raise
    ranks = _gather(group, x.device, mine)
    failed = [rank for rank, values in enumerate(ranks) if values[0] == _FAILED]
    if failed:
        raise ValueError(f"group: the arguments of rank {', '.join(map(str, failed))} were refused there")
    for what, *values in zip(_NAMES, *ranks, strict=True):
        if len(set(values)) > 1:
            shown = f": {values}" if what in _NAMES[:5] else ""
            raise ValueError(f"group: ranks must agree on {what}, and rank by rank they have not{shown}")


def describe(x: Tensor, heads: int, inner: int, out: int, choices: tuple[Any, ...]) -> list[int]:
    """What all ranks must have alike, as integers in the order of the names in messages."""
    codes = [zlib.crc32(repr(value).encode()) for value in (x.dtype, choices)]
    return [x.shape[0], x.shape[-1], heads, inner, out, *codes]


def _check(group: Any, x: Any) -> None:
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks")
    try:
        group._get_backend(x.device)
    except RuntimeError:
        accepted = dist.get_backend(group)
        raise ValueError(f"group has the backend {accepted!r}, which has none for tensors on {x.device.type}") from None


def _gather(group: Any, device: torch.device, mine: list[int]) -> list[list[int]]:
    values = torch.tensor(mine, dtype=torch.int64, device=device)
    ranks = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, values, group=group)
    return [rank.tolist() for rank in ranks]

"""Tokens split over the ranks of a process group: ranks exchange C x C sums, never tokens.

Each rank calls :func:`xformer_kernels.xfa_layer` with its own tokens of the same images, (B, N of this rank, C), and
gets their outputs; N may differ between ranks and be 0. Weights are the same on all ranks. All ranks must call the
layer, and if gradients are needed all must run backward through the result, including ranks without tokens.

Communication per layer and image, in the accumulate dtype. Gram form: C + 1 numbers in forward (a vector near the mean
of the tokens), then ``C C + C + 1``; ``O C + O`` in backward. Direct form: ``H D D + 2 H D`` in forward and the same in
backward. Dropout on the map broadcasts another ``H D D`` in forward, from the first rank. Every call also exchanges a
few integers, by which ranks detect mismatched arguments instead of deadlocking, and learn the largest number of tokens
of any rank, for which ``form="auto"`` chooses.

The *sum* over the ranks of the gradients of the weights is the gradient of the sum of the ranks' losses: add them up,
as DDP does (DDP then divides by the number of ranks, for all parameters alike). The gradient of a rank's own tokens is
complete.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xformer_kernels import torch_internals

# What must be equal on all ranks: numbers, which messages show, then hash codes of other values.
_SHOWN = ("the number of images B", "C", "the number of heads", "I", "O")
_CODED = (
    "dtype and kind of device",
    "map, norm, activation, eps, dropout_p, form, ln_eps, residual and which weights are None",
    "which gradients are wanted (requires_grad, torch.no_grad)",
    "whether a backend serves the call",
)
_FAILED = -1


def name(group: Any) -> str:
    """The name by which ops look up a group; empty for None."""
    return "" if group is None else str(group.group_name)


def total(group: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over the ranks, in one all-reduce; the tensors themselves if there is no group."""
    if not group:
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=_group(group))
    parts = flat.split([t.numel() for t in tensors])
    return tuple(part.view(t.shape) for part, t in zip(parts, tensors, strict=True))


def differentiable_total(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """:func:`total` with autograd support: its backward sums the gradients over the ranks."""
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
    """Broadcasts the first rank's tensor to all ranks."""
    if group is not None:
        dist.broadcast(t, dist.get_global_rank(group, 0), group=group)
    return t


def size(group: str) -> int:
    return dist.get_world_size(_group(group)) if group else 1


def _group(name: str) -> Any:
    return torch_internals.process_group(name)


outside_graphs = torch.compiler.disable(
    reason="group=: ranks compare their arguments at run time, which no graph holds"
)
"""Decorator for functions that torch.compile leaves out of its graphs."""


class Exchange:
    """What this rank sends to the others: ``alike``, the result of :func:`describe`, and its number of ``tokens``.

    After the exchange, ``most_tokens`` is the largest number of tokens of any rank.
    """

    def __init__(self) -> None:
        self.alike: list[int] = []
        self.tokens = self.most_tokens = 0


@contextmanager
def together(group: Any, x: Any) -> Iterator[Exchange]:
    """Context in which a rank checks its arguments and fills in the :class:`Exchange`; on exit the ranks compare.

    If a rank raises, or the ranks differ, every rank raises and none waits. Without a group nothing is compared.
    """
    mine = Exchange()
    if group is None:
        yield mine
        return
    if torch.compiler.is_exporting():
        raise NotImplementedError("group: an exported program has no process groups; export without group=")
    device = _meeting_place(group, x)
    try:
        _check(group, x)
        yield mine
        values = [*mine.alike, mine.tokens]
    except Exception:
        _gather(group, device, [_FAILED] * (len(_SHOWN) + len(_CODED) + 1))
        raise
    ranks = _gather(group, device, values)
    failed = [rank for rank, row in enumerate(ranks) if row[0] == _FAILED]
    if failed:
        raise ValueError(f"group: the arguments of rank {', '.join(map(str, failed))} of it were refused there")
    *columns, tokens = zip(*ranks, strict=True)
    for what, column in zip(_SHOWN + _CODED, columns, strict=True):
        if len(set(column)) > 1:
            shown = f": {list(column)} rank by rank" if what in _SHOWN else ""
            raise ValueError(f"group: ranks must agree on {what}, and they do not{shown}")
    mine.most_tokens = max(tokens)


def describe(x: Tensor, heads: int, inner: int, out: int, *codes: Any) -> list[int]:
    """What must be equal on all ranks, as integers, in the order of the names in messages."""
    coded = [zlib.crc32(repr(value).encode()) for value in ((x.dtype, x.device.type), *codes)]
    return [x.shape[0], x.shape[-1], heads, inner, out, *coded]


def _meeting_place(group: Any, x: Any) -> torch.device:
    """The device on which the ranks compare: determined by the group, so that it is the same on all, whatever x is.

    Errors raised here are not sent to other ranks, since there is no group to send them through.
    """
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        outside = "; this process is not one of its ranks" if _is_nobody(group) else ""
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}{outside}")
    kinds = torch_internals.device_types(group)
    if "cpu" in kinds:
        return torch.device("cpu")
    if isinstance(x, Tensor) and x.device.type in kinds[:1]:
        return x.device
    if not kinds or not torch.get_device_module(kinds[0]).is_available():
        raise ValueError(_wrong_backend(group, x))
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())


def _wrong_backend(group: Any, x: Any) -> str:
    where = f"x is on {x.device.type}" if isinstance(x, Tensor) else f"x is of type {type(x).__name__}"
    kinds = " and ".join(torch_internals.device_types(group)) or "no device"
    return f"group has the backend {dist.get_backend(group)!r}, for tensors on {kinds}, and {where}"


def _is_nobody(group: Any) -> bool:
    return dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER


def _check(group: Any, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.device.type not in torch_internals.device_types(group):
        raise ValueError(_wrong_backend(group, x))


def _gather(group: Any, device: torch.device, mine: list[int]) -> list[list[int]]:
    values = torch.tensor(mine, dtype=torch.int64, device=device)
    ranks = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, values, group=group)
    return [rank.tolist() for rank in ranks]

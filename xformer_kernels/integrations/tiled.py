"""Restormer's attention over tiles of rows, for images whose q, k and v do not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xformer_kernels import validate
from xformer_kernels.functional import channel_mix, gram
from xformer_kernels.integrations import trial
from xformer_kernels.integrations.bound import how_replaced
from xformer_kernels.integrations.mdta import is_mdta_shaped, mdta_by_reference, mdta_inputs
from xformer_kernels.integrations.parts import convolution, is_channels_last, serves_temperature
from xformer_kernels.modules import runs_forward_of


def tiled_mdta(module: nn.Module, x: Tensor, *, tile: int = 64, backend: str = "auto") -> Tensor:
    """Restormer's MDTA, computed exactly with extra memory for `tile` rows instead of the whole image; no gradients.

    ::

        G, norms = sum over tiles of gram(q, k);    A = softmax(temperature * G / norms)    (float32)
        y = project_out(A v), tile by tile

    q, k and v are computed for one tile at a time, including the adjacent rows that the depthwise convolution reads,
    and then discarded. Except for those rows, the number of operations is the same as without tiles. The result equals
    the result without tiles up to rounding; splitting an image into independent tiles would give each tile its own map.

    Args:
        module: Restormer's attention, or a module with the same parts: ``temperature``, ``num_heads``, ``qkv`` (1x1),
            ``qkv_dwconv`` (depthwise, zero padding that keeps the size) and ``project_out`` (1x1). Its forward must
            compute MDTA, which is tested on small random inputs. Hooks on the module itself are not run.
        x: (B, C, h, w).
        tile: rows that are computed at a time.
        backend: as in :func:`xformer_kernels.xfa`.

    Returns:
        (B, C, h, w), in the memory format of x.

    Raises:
        TypeError, ValueError: an argument has an invalid type, shape or value; the module has other parts, or parts
            that run anything other than torch's convolutions (hooks, adapters).
        RuntimeError: gradients are required: call this under ``torch.no_grad()``.
    """
    parts = _parts(module)
    validate.tensor("x", x)
    if x.dim() != 4 or x.shape[1] != parts.qkv.in_channels or not x.numel():
        raise ValueError(f"x must have shape (B, C, h, w) with C = {parts.qkv.in_channels}, got {tuple(x.shape)}")
    validate.integer("tile", tile)
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        raise RuntimeError("tiled_mdta computes no gradients: call it under torch.no_grad()")
    with torch.no_grad():
        A = _map(parts, x, tile, backend)
        y: Tensor | None = None
        for rows, (v,) in _projected(parts, x, tile, 2, 3):
            mixed = channel_mix(v, A, backend=backend).transpose(-2, -1).flatten(1, 2)
            done = parts.out(mixed.unflatten(-1, (-1, x.shape[-1])))
            if y is None:
                y = _empty(x, done)
            y[:, :, rows] = done
    assert y is not None
    return y


class _Parts(NamedTuple):
    qkv: Any
    depthwise: Any
    out: Any
    temperature: Tensor


def _parts(module: Any) -> _Parts:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    replaced = how_replaced(module)
    if not (replaced.family == "MDTA" if replaced else is_mdta_shaped(module)):
        raise ValueError(f"module must have the parts of Restormer's MDTA, got {type(module).__name__}")
    found, temperature = {}, cast(Tensor, module.temperature)
    for name in ("qkv", "qkv_dwconv", "project_out"):
        part = getattr(module, name)
        found[name] = conv = convolution(part)
        if not (runs_forward_of(conv, nn.Conv2d) and (part is conv or _only_calls(part))):
            raise ValueError(f"module.{name} must run torch.nn.Conv2d and nothing else (hooks, adapters, 3 dimensions)")
        same = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        odd = all(d * (k - 1) % 2 == 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        padding = same if conv.padding == "same" else conv.padding
        if conv.stride != (1, 1) or padding != same or not odd or conv.padding_mode != "zeros":
            raise ValueError(f"module.{name} must keep the size of images, by zero padding, got {conv}")
    if not replaced:
        tried = trial.run(lambda: module, mdta_by_reference, lambda: mdta_inputs(module), thorough=True)
        if tried.agrees is False:
            raise ValueError(f"module must compute Restormer's MDTA; of {type(module).__name__}, {tried.why}")
    elif not serves_temperature(module.temperature, module.num_heads):
        raise ValueError(f"module.temperature must have shape ({module.num_heads}, 1, 1), one value for each head")
    return _Parts(found["qkv"], found["qkv_dwconv"], found["project_out"], temperature)


def _only_calls(sequence: nn.Module) -> bool:
    return runs_forward_of(sequence, type(sequence)) and type(sequence).forward is nn.Sequential.forward


def _map(parts: _Parts, x: Tensor, tile: int, backend: str) -> Tensor:
    """softmax(t G / norms), (B, H, D, D), in the accumulate dtype."""
    total: list[Tensor] = []
    for _, (q, k) in _projected(parts, x, tile, 0, 2):
        sums = gram(q, k, backend=backend)
        total = [a.add_(b) for a, b in zip(total, sums, strict=True)] if total else [a.clone() for a in sums]
    G, ssq_q, ssq_k = total
    norm_q, norm_k = (ssq.sqrt().clamp_min(1e-12) for ssq in (ssq_q, ssq_k))
    S = G / norm_q.unsqueeze(-1) / norm_k.unsqueeze(-2)
    return (S * parts.temperature.to(S.dtype)).softmax(-1)


def _projected(
    parts: _Parts, x: Tensor, tile: int, first: int, last: int
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The rows of every tile, and the parts from `first` to `last` of (q, k, v) there as (B, H, N, D)."""
    C, h, H = parts.qkv.in_channels, x.shape[2], parts.temperature.shape[0]
    channels = slice(first * C, last * C)
    conv = parts.depthwise
    halo = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2
    for start in range(0, h, tile):
        stop = min(start + tile, h)
        above, below = max(start - halo, 0), min(stop + halo, h)
        t = F.conv2d(x[:, :, above:below], parts.qkv.weight[channels], _of(parts.qkv.bias, channels))
        t = F.conv2d(
            t, conv.weight[channels], _of(conv.bias, channels), padding="same", dilation=conv.dilation,
            groups=(last - first) * C,
        )  # fmt: skip
        t = t[:, :, start - above : stop - above].flatten(2).unflatten(1, (last - first, H, -1))
        yield slice(start, stop), t.transpose(-2, -1).unbind(1)


def _of(bias: Tensor | None, channels: slice) -> Tensor | None:
    return None if bias is None else bias[channels]


def _empty(x: Tensor, done: Tensor) -> Tensor:
    return torch.empty(
        (x.shape[0], done.shape[1], *x.shape[2:]), dtype=done.dtype, device=done.device,
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
    )  # fmt: skip

"""The maps of a layer in Gram form, in one launch, and their derivatives, in two: see
:mod:`xformer_kernels.layer.maps`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends.triton import configs, launch, ops, plan, replay
from xformer_kernels.backends.triton.kernels.maps import (
    layer_maps_backward_kernel,
    layer_maps_kernel,
    layer_rows_kernel,
)
from xformer_kernels.layer.maps import MapGradients, Maps, Rule

WIDEST_MAP = {4: 64, 8: 32}
"""Maximum features per head, by element size: a program holds several D x D matrices in float64. Wider maps are eager
PyTorch."""
ANY_WIDTH = 32
"""Wider maps must have rows of a multiple of 16 bytes, or registers would spill."""


def takes_layer_maps(dtype: torch.dtype, head_dim: int) -> bool:
    size = dtype.itemsize
    return head_dim <= WIDEST_MAP[size] and (head_dim <= ANY_WIDTH or head_dim * size % launch.VECTOR_BYTES == 0)


def layer_maps(P: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, *others: Any) -> Maps:
    *sums, keep, rule = others
    tensors = _contiguous(P.to(qkv.dtype), qkv, qkv_bias, temperature)
    return Maps(*_forward(*tensors, *_by_images(*sums), *_contiguous(keep), rule))


def layer_maps_backward(
    dT: Tensor, de: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, cos: Tensor, *others: Any
) -> MapGradients:
    *norms_and_sums, keep, rule = others
    tensors = _contiguous(dT, de, qkv, qkv_bias, temperature, cos)
    return MapGradients(*_backward(*tensors, *_by_images(*norms_and_sums), *_contiguous(keep), rule))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _by_images(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose images are contiguous, and may be any stride apart: in backward they are parts of another one."""

    def dense(t: Tensor) -> bool:
        step = 1
        for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
            if size != 1 and stride != step:
                return False
            step *= size
        return True

    return [t if t.is_contiguous() or dense(t) else t.contiguous() for t in tensors]


def _constants(qkv: Tensor, other: Tensor, rule: Rule, *of_maps: Tensor | None) -> dict[str, Any]:
    """Constexprs of all kernels. `other`: the other tensor of D x C matrices that they read. `of_maps`: D x D."""
    D, C = qkv.shape[2:]
    aligned = launch.alignment(**{f"of_{i}": t for i, t in enumerate(of_maps) if t is not None}).values()
    return {
        "ACC": ops._ACC[qkv.dtype], "D": D, "C": C, "BLOCK_D": configs.block(D),
        "ALIGN": min(launch.alignment(qkv=qkv, other=other).values()),
        "MAP_ALIGN": min([launch.out_alignment(D, qkv.element_size()), *aligned]), "KEY_VALUE": rule.map == "key_value",
    }  # fmt: skip


def _of_map(rule: Rule, keep: Tensor | None) -> dict[str, Any]:
    """Constexprs of the kernels that compute maps."""
    softmax = rule.activation == "softmax" and rule.map == "query_key"
    return {"EPS": rule.eps, "NORMALISED": rule.normalised, "SOFTMAX": softmax, "HAS_KEEP": keep is not None}


def _precision(qkv: Tensor) -> str:
    return launch.map_precision(qkv.dtype, launch.target(qkv.device).arch, qkv.shape[2])


def _launch(name: str, kernel: Any, qkv: Tensor, rule: Rule, per_head: bool, *args: Any, **constants: Any) -> None:
    """Launches one program per image and head, or one for each block of its C features."""
    (B, *_), (_, H, D, C), device = args[0].shape, qkv.shape, qkv.device

    def run(config: configs.Config) -> None:
        programs = B * H * (1 if per_head else plan.cdiv(C, config.block_k))
        ops._run(kernel, programs, config, *args, H, BLOCK_K=config.block_k, **constants)

    if B > 0:
        with launch.on_device(device):
            configs.launch(configs.Key(name, qkv.dtype, D, rule.map), launch.target(device).arch, run)


def _buffers(like: Tensor, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(ops._empty(size, like.dtype, like) for size in sizes)


@replay.planned
def _forward(
    P: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, s: Tensor, n: Tensor, c: Tensor,
    keep: Tensor | None, rule: Rule,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, (_, H, D, C) = P.shape[0], qkv.shape
    found = _buffers(qkv, (B, H, D, C), (B, H, D), (B, H, D, D), (B, 2, H, D))
    _launch(
        "layer_maps", layer_maps_kernel, qkv, rule, True,
        P, qkv, qkv_bias, temperature, s, n, c, P if keep is None else keep, *found,
        s.stride(0), n.stride(0), c.stride(0),
        **_constants(qkv, P, rule, keep), **_of_map(rule, keep), PRECISION=_precision(qkv),
    )  # fmt: skip
    return found


@replay.planned
def _backward(
    dT: Tensor, de: Tensor, qkv: Tensor, qkv_bias: Tensor, temperature: Tensor, cos: Tensor, norms: Tensor,
    s: Tensor, n: Tensor, c: Tensor, keep: Tensor | None, rule: Rule,
) -> tuple[Tensor, ...]:  # fmt: skip
    B, (_, H, D, C), rows = dT.shape[0], qkv.shape, rule.rows
    dG, E, scale = _buffers(qkv, (B, H, D, D), (B, H, D, D), (B, 2, H, D))
    x, e, dshifted = _buffers(qkv, (B, rows, H, D), (B, H, D), (B, 3, H, D))
    dtemperature = ops._empty((B, H), torch.float64, qkv)
    X, T, dz = _buffers(qkv, (B, rows, H, D, C), (B, H, D, C), (B, H, D, C))
    constants = _constants(qkv, dT, rule, cos, keep)
    _launch(
        "layer_maps_backward", layer_maps_backward_kernel, qkv, rule, True,
        dT, de, qkv, qkv_bias, temperature, cos, norms, s, n, c, dT if keep is None else keep,
        dG, E, scale, x, e, dshifted, dtemperature, norms.stride(0), s.stride(0), n.stride(0), c.stride(0),
        **constants, **_of_map(rule, keep),
    )  # fmt: skip
    _launch(
        "layer_rows", layer_rows_kernel, qkv, rule, False,
        dT, qkv, dG, E, scale, X, T, dz, **constants, PRECISION=_precision(qkv),
    )  # fmt: skip
    return X, x, T, e, dz, dshifted, dtemperature

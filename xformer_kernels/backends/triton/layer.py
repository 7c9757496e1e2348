"""The two passes over tokens of a layer in Gram form, one launch each, and a sum of the parts of the first.

Before them, one launch sums a few tokens. If a tile does not hold all features, one more launch before the first pass
writes layer norm's statistics (8 bytes per token); it reads x once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends.triton import configs, launch, ops, plan, replay
from xformer_kernels.backends.triton.kernels.layer import (
    layer_gram_kernel,
    layer_mix_kernel,
    layer_sample_kernel,
    layer_statistics_kernel,
)
from xformer_kernels.layer.passes import FEW
from xformer_kernels.reference import accumulate_dtype


def _key(kernel: str, dtype: torch.dtype, features: int, map: str) -> configs.Key:
    """More output features than a tile may hold take several tiles."""
    return configs.Key(kernel, dtype, min(features, plan.WIDEST), map)


def _statistics(x: Tensor, eps: float) -> Tensor:
    """(2, B, H, N): mean and 1 / sqrt(variance + eps) of each token."""
    B, H, N, C = x.shape
    acc = accumulate_dtype(x.dtype)
    statistics = ops._empty((2, B, H, N), acc, x)

    def run(config: configs.Config) -> None:
        blocks = plan.cdiv(N, config.block_n)
        ops._run(
            layer_statistics_kernel, B * H * blocks, config,
            x, statistics, *x.stride(), N, B, H, blocks,
            ACC=ops._ACC[acc], EPS=eps, C=C, BLOCK_C=configs.block(C), BLOCK_N=config.block_n, **launch.alignment(x=x),
            FAR=launch.far(x),
        )  # fmt: skip

    configs.launch(configs.Key("layer_statistics", x.dtype, C, "layer"), launch.target(x.device).arch, run)
    return statistics


@replay.planned
def layer_sample(x: Tensor, token_mask: Tensor | None, layer_norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """The sum of sampled tokens and their number, see :mod:`xformer_kernels.layer.passes`."""
    B, N, C = x.shape
    acc = accumulate_dtype(x.dtype)
    total, count = ops._empty((B, C), acc, x), ops._empty((B, 1), acc, x)
    mask, mask_strides = ops._mask(token_mask, x)

    def run(config: configs.Config) -> None:
        ops._run(
            layer_sample_kernel, B, config,
            x, mask, total, count, *x.stride(), *mask_strides, N,
            ACC=ops._ACC[acc], EPS=layer_norm_eps, C=C, FEW=FEW, BLOCK_C=min(config.block_o, configs.block(C)),
            HAS_MASK=token_mask is not None, **launch.alignment(x=x), FAR=True,
        )  # fmt: skip

    if B > 0:
        with launch.on_device(x.device):
            configs.launch(configs.Key("layer_sample", x.dtype, C, "layer"), launch.target(x.device).arch, run)
    return total, count


@replay.planned
def layer_gram(
    a: Tensor,
    x: Tensor,
    symmetric: bool,
    token_mask: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_n a u^T, sum_n a and sum_n u, see :mod:`xformer_kernels.layer.passes`."""
    B, H, N, CA = a.shape
    C = x.shape[-1]
    acc = accumulate_dtype(x.dtype)
    sizes = ((CA, C), (CA,), (C,))

    def records(parts: int) -> tuple[Tensor, Tensor, Tensor]:
        leading = (B, H) if parts == 1 else (parts, B, H)
        G, sum_a, sum_u = (ops._empty((*leading, *size), acc, x) for size in sizes)
        return G, sum_a, sum_u

    if B * H == 0:
        return records(1)
    target = launch.target(x.device)
    mask, mask_strides = ops._mask(token_mask, x)
    precision = launch.gram_precision(x.dtype, False, target.arch, max(CA, C), symmetric)
    constants = {
        **launch.alignment(a=a, x=x), "FAR": launch.far(a, x), "ACC": ops._ACC[acc], "EPS": layer_norm_eps,
        "CA": CA, "C": C, "SYMMETRIC": symmetric,
        "CENTERED": center is not None, "HAS_MASK": token_mask is not None, "PRECISION": precision,
    }  # fmt: skip
    strides = (*a.stride(), *x.stride(), *mask_strides)

    def run(config: configs.Config) -> tuple[plan.Split, tuple[Tensor, Tensor, Tensor]]:
        if precision == "tf32" and ops.transposes(target.arch):
            config = config._replace(stages=1)
        block_a, block_c = (min(config.block_o, configs.block(D)) for D in (CA, C))
        statistics = None
        if layer_norm_eps is not None and block_c < C:
            statistics = _statistics(x, layer_norm_eps)
        rows, columns = plan.cdiv(CA, block_a), plan.cdiv(C, block_c)
        # programs below the diagonal return at once
        computing = rows * (rows + 1) // 2 if symmetric else rows * columns
        constants.update(BLOCK_A=block_a, BLOCK_C=block_c, BLOCK_N=config.block_n)
        constants["HAS_STATISTICS"] = statistics is not None
        args = (a, x, mask, x if center is None else center, x if statistics is None else statistics)
        of_results = (x.new_empty(0, dtype=acc),) * 3
        slots = ops._slots(
            x.device, layer_gram_kernel, config, *args, *of_results, *strides, N, B, H, 1, N, **constants
        )
        record, row = CA * C * acc.itemsize, C * x.element_size()
        split = plan.split_sums(N, B * H * computing, record, row, slots, config.block_n)
        results = records(split.parts)
        ops._run(
            layer_gram_kernel, B * H * split.parts * rows * columns, config,
            *args, *results, *strides, N, B, H, split.parts, split.chunk, **constants,
        )  # fmt: skip
        return split, results

    name = launch.variant("layer_gram", x.dtype, precision)
    key = _key(name, x.dtype, max(CA, C), "symmetric" if symmetric else "gram")
    with launch.on_device(x.device):
        split, results = configs.launch(key, target.arch, run)
        if split.parts == 1:
            return results
        G, sum_a, sum_u = (
            ops._reduce(torch.sum, partial, total) for partial, total in zip(results, records(1), strict=True)
        )
    return G, sum_a, sum_u


def layer_mix(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, x2: Tensor | None, weight2: Tensor | None,
    *choices: Any,
) -> Tensor:  # fmt: skip
    """weight x + weight2 u + bias + add, or a gradient, see :mod:`xformer_kernels.layer.passes`.

    Weights are rounded to bfloat16 for bfloat16 tokens, as all maps are. They are made contiguous for vector loads.
    """

    def ready(weight: Tensor) -> Tensor:
        dtype = x.dtype if x.dtype is torch.bfloat16 else weight.dtype
        return weight.to(dtype, memory_format=torch.contiguous_format).contiguous()  # one copy at most

    bias = None if bias is None else bias.contiguous()
    if x2 is None or weight2 is None:
        return _mix(x, ready(weight), bias, add, None, None, *choices)
    return _mix(x2, ready(weight2), bias, add, x, ready(weight), *choices)


@replay.planned
def _mix(
    u: Tensor,
    weight_u: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    center: Tensor | None,
    layer_norm_eps: float | None,
    differentiate: bool,
) -> Tensor:
    """weight x + weight_u u + bias + add, with u computed from the tokens `u`."""
    B, _, N, C = u.shape
    O = weight_u.shape[-2]  # noqa: E741
    I = 0 if x is None else x.shape[-1]  # noqa: E741
    y = ops._empty((B, N, 1, O), u.dtype, u)
    if y.numel() == 0:
        return y
    arch = launch.target(u.device).arch
    own = weight_u.dtype == u.dtype
    differentiate = differentiate and layer_norm_eps is not None
    constants = {
        **launch.alignment(x=x, u=u, add=add, weight=weight, weight_u=weight_u), "FAR": launch.far(x, u, add, row=O),
        "ACC": ops._ACC[accumulate_dtype(u.dtype)], "EPS": layer_norm_eps, "I": I, "C": C, "O": O,
        "HAS_BIAS": bias is not None, "HAS_ADD": add is not None,
        "CENTERED": center is not None, "DIFFERENTIATE": differentiate,
        "WIDE_MAP": not own, "OUT_ALIGN": launch.out_alignment(O, u.element_size()),
        "PRECISION": (launch.tokens_precision if own else launch.map_precision)(u.dtype, arch),
    }  # fmt: skip

    def strides(t: Tensor | None) -> tuple[int, ...]:
        return (0, 0, 0) if t is None else (t.stride(0), *t.stride()[2:])

    def run(config: configs.Config) -> None:
        blocks = plan.cdiv(N, config.block_n)
        block_o = configs.block(C) if differentiate else min(config.block_o, configs.block(O))
        ops._run(
            layer_mix_kernel, B * blocks * plan.cdiv(O, block_o), config,
            u if x is None else x, weight_u if weight is None else weight, u, weight_u,
            weight_u if bias is None else bias, u if add is None else add, weight_u if center is None else center, y,
            *strides(x), *strides(u), *strides(add), N, blocks,
            BLOCK_K=min(config.block_k, configs.block(max(I, C))), BLOCK_O=block_o, BLOCK_N=config.block_n,
            **constants,
        )  # fmt: skip

    key = _key("layer_mix_backward" if differentiate else "layer_mix", u.dtype, max(I, C, O), "layer")
    with launch.on_device(u.device):
        configs.launch(key, arch, run)
    return y

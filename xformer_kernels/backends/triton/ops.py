"""The ops: buffers, token splits and launches (at most two in forward, three in backward), and sums of many parts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from xformer_kernels.backends.triton import configs, launch, plan, replay
from xformer_kernels.backends.triton.choices import Choices, gram_key
from xformer_kernels.backends.triton.kernels.backward import gradients_kernel, map_backward_kernel
from xformer_kernels.backends.triton.kernels.forward import apply_kernel, forward_kernel
from xformer_kernels.backends.triton.kernels.gram import gram_kernel
from xformer_kernels.backends.triton.kernels.mix import channel_mix_kernel
from xformer_kernels.backends.triton.workarounds import compiling
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# Triton's interpreter keeps the program id in a global variable.
_one_at_a_time: AbstractContextManager[Any] = threading.Lock() if launch.INTERPRETING else nullcontext()
# Strides of absent tensors.
_NONE3, _NONE4 = (0, 0, 0), (0, 0, 0, 0)


def _empty(size: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    buffer = torch.empty(size, dtype=dtype, device=like.device)
    if recorder := replay.recorder():
        recorder.buffers.append(buffer)
    return buffer


def _mask(token_mask: Tensor | None, other: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Pointer and strides of the mask; without a mask, a pointer that is not read."""
    if token_mask is None:
        return other, (0, 0)
    if other.dtype is torch.float64:
        # Triton chooses the layout of a product's operands by the narrowest dtype loaded for them, and does not
        # support float64 products in the layout for bytes.
        token_mask = token_mask.long()
    return token_mask, token_mask.stride()


def transposes(arch: str) -> bool:
    """Whether tiles for tf32 sums over tokens must not be loaded asynchronously.

    The tensor cores take them with the tokens innermost, and such loads would transpose them 32 bits at a time.
    """
    return arch in launch.WARP_GROUPS


def _slots(device: torch.device, kernel: Any, config: configs.Config, *args: Any, **constants: Any) -> int:
    """Number of programs that the device runs at the same time. It does not depend on sizes among the arguments."""
    target = launch.target(device)
    if launch.INTERPRETING:
        return 2 * target.processors
    with compiling(target.arch, args, constants):
        compiled = kernel.run(*args, grid=(1,), warmup=True, **constants, **config.options())
    compiled._init_handles()
    return target.processors * launch.resident(target, config.warps, compiled.n_regs, compiled.metadata.shared)


def _run(kernel: Any, grid: int, config: configs.Config, *args: Any, **constants: Any) -> None:
    with _one_at_a_time, compiling(launch.target(args[0].device).arch, args, constants):
        compiled = kernel[(grid,)](*args, **constants, **config.options())
    if recorder := replay.recorder():
        recorder.launched(kernel, compiled, grid, args, constants)


def _reduce(function: Any, partial: Tensor, out: Tensor) -> Tensor:
    """Reduces the first dimension, the parts, by `function` (sum or maximum)."""
    function(partial, 0, out=out)
    if recorder := replay.recorder():
        recorder.reduced(function, partial, out)
    return out


def _gram(
    key: configs.Key,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    token_mask: Tensor | None,
    records: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    steps: tuple[int, int, int],
    eps: float = 0.0,
    *,
    symmetric: bool = False,
    squares: str = "ab",
    norm_a: bool = False,
    norm_b: bool = False,
) -> tuple[plan.Split, tuple[Tensor, Tensor, Tensor]]:
    """Launches a^T b. Returns how the tokens were split, and the results: G and two sums of squares.

    `records(parts)` allocates the results: (parts, B, H) records, `steps` elements apart.
    """
    B, H, N, DA = a.shape
    DB = b.shape[-1]
    mask, mask_strides = _mask(token_mask, a)
    target = launch.target(a.device)
    precision = launch.gram_precision(a.dtype, norm_a or norm_b, target.arch, max(DA, DB), symmetric)
    facts = {**launch.alignment(a=a, b=b, c=c), "FAR": launch.far(a, b, c)}
    acc = accumulate_dtype(a.dtype)
    strides = (*a.stride(), *b.stride(), *c.stride(), *mask_strides, *steps)

    def run(config: configs.Config) -> tuple[plan.Split, tuple[Tensor, Tensor, Tensor]]:
        if precision == "tf32" and transposes(target.arch):
            config = config._replace(stages=1)
        block_a, block_b = (min(config.block_o, configs.block(D)) for D in (DA, DB))
        tiles = plan.cdiv(DA, block_a) * plan.cdiv(DB, block_b)
        constants = {
            **facts, "ACC": _ACC[acc], "EPS": eps, "DA": DA, "DB": DB, "BLOCK_A": block_a, "BLOCK_B": block_b,
            "BLOCK_N": config.block_n, "SYMMETRIC": symmetric, "SQUARES": squares, "NORM_A": norm_a, "NORM_B": norm_b,
            "HAS_MASK": token_mask is not None, "PRECISION": precision,
        }  # fmt: skip
        of_results = (a.new_empty(0, dtype=acc),) * 3
        slots = _slots(a.device, gram_kernel, config, a, b, c, mask, *of_results, *strides, N, B, H, 1, N, **constants)
        record, row = DA * DB * acc.itemsize, DA * a.element_size()
        split = plan.split_sums(N, B * H * tiles, record, row, slots, config.block_n)
        results = records(split.parts)
        _run(
            gram_kernel, B * H * split.parts * tiles, config,
            a, b, c, mask, *results, *strides, N, B, H, split.parts, split.chunk, **constants,
        )  # fmt: skip
        return split, results

    return configs.launch(key, target.arch, run)


@replay.planned
def gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, _, DA = a.shape
    DB = b.shape[-1]
    dtype = accumulate_dtype(a.dtype)
    sizes = ((DA, DB), (DA,), (DB,))

    def records(parts: int) -> tuple[Tensor, Tensor, Tensor]:
        leading = (B, H) if parts == 1 else (parts, B, H)
        G, ssq_a, ssq_b = (_empty((*leading, *size), dtype, a) for size in sizes)
        return G, ssq_a, ssq_b

    if B * H == 0:
        return records(1)
    name = "symmetric" if symmetric else "gram"
    key = gram_key(a.dtype, max(DA, DB), launch.target(a.device).arch, name, symmetric=symmetric)
    with launch.on_device(a.device):
        split, results = _gram(key, a, b, a, token_mask, records, (DA * DB, DA, DB), symmetric=symmetric)
        if split.parts == 1:
            return results
        G, ssq_a, ssq_b = (
            _reduce(torch.sum, partial, _empty((B, H, *size), dtype, a))
            for partial, size in zip(results, sizes, strict=True)
        )
    return G, ssq_a, ssq_b


@replay.planned
def channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    add_scale: Tensor | None,
    x2: Tensor | None,
    weight2: Tensor | None,
) -> Tensor:
    B, H, N, I = x.shape  # noqa: E741
    O = weight.shape[-2]  # noqa: E741
    I2 = 0 if x2 is None else x2.shape[-1]
    y = _empty((B, N, H, O), x.dtype, x)
    if y.numel() == 0:
        return y
    key = configs.Key("channel_mix", x.dtype, max(I, I2, O), "channel_mix")
    own = all(w is None or w.dtype == x.dtype for w in (weight, weight2))
    arch = launch.target(x.device).arch
    precision = (launch.tokens_precision if own else launch.map_precision)(x.dtype, arch)
    facts = {**launch.alignment(x=x, x2=x2, add=add), "FAR": launch.far(x, x2, add, row=H * O)}

    def strides(t: Tensor | None, none: tuple[int, ...]) -> tuple[int, ...]:
        return none if t is None else t.stride()

    def run(config: configs.Config) -> None:
        blocks = plan.cdiv(N, config.block_n)
        block_o = min(config.block_o, configs.block(O))
        _run(
            channel_mix_kernel, B * H * blocks * plan.cdiv(O, block_o), config,
            x, weight, x if x2 is None else x2, weight if weight2 is None else weight2,
            weight if bias is None else bias, x if add is None else add, weight if add_scale is None else add_scale, y,
            *x.stride(), *weight.stride(), *strides(x2, _NONE4), *strides(weight2, _NONE4), *strides(bias, _NONE3),
            *strides(add, _NONE4), *strides(add_scale, _NONE3), N, H, blocks,
            ACC=_ACC[accumulate_dtype(x.dtype)], I=I, I2=I2, O=O,
            BLOCK_K=min(config.block_k, configs.block(max(I, I2))), BLOCK_O=block_o, BLOCK_N=config.block_n,
            HAS_BIAS=bias is not None, HAS_ADD=add is not None, HAS_SCALE=add_scale is not None, WIDE_MAP=not own,
            OUT_ALIGN=launch.out_alignment(O, x.element_size()), PRECISION=precision, **facts,
        )  # fmt: skip

    with launch.on_device(x.device):
        configs.launch(key, arch, run)
    return y


@replay.planned
def xfa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    token_mask: Tensor | None,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """Returns out and stats: per (b, h), the sums k^T q (k^T v for key_value), |k|^2 and |q|^2 over the tokens."""
    B, H, N, D = q.shape
    out = _empty((B, N, H, D), q.dtype, q)
    stats = _empty((B, H, D * D + 2 * D), accumulate_dtype(q.dtype), q)
    if B * H == 0:
        return out, stats
    with launch.on_device(q.device):
        if not _forward_at_once(q, k, v, temperature, token_mask, Choices.of(spec), out, stats):
            _forward_in_two(q, k, v, temperature, token_mask, Choices.of(spec), out, stats)
    return out, stats


def _of_map(q: Tensor, choices: Choices) -> dict[str, Any]:
    """Constexprs of the kernels that use a map."""
    D, wide = q.shape[-1], accumulate_dtype(q.dtype)
    return {
        "ACC": _ACC[wide], "EPS": choices.EPS, "D": D, "BLOCK_D": configs.block(D), "KEY_VALUE": choices.KEY_VALUE,
        "TOKEN_NORM": choices.TOKEN_NORM, "RECORD_ALIGN": launch.out_alignment(D, wide.itemsize),
    }  # fmt: skip


def _forward_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    token_mask: Tensor | None,
    choices: Choices,
    out: Tensor,
    stats: Tensor,
) -> bool:
    """Launches the forward with one program per head, unless two launches use more of the device.

    Returns whether it was launched.
    """
    B, H, N, D = q.shape
    target = launch.target(q.device)
    few = N <= plan.CHUNK
    enough = few or (target.processors <= B * H and N <= plan.LONGEST)
    if not (enough and plan.fits_one_launch(D, stats.element_size())):
        return False
    mask, mask_strides = _mask(token_mask, q)
    precision = launch.gram_precision(q.dtype, choices.FEATURE_NORM, target.arch, D)
    map_precision = launch.map_precision(q.dtype, target.arch, D)
    constants = {
        **_of_map(q, choices), **launch.alignment(q=q, k=k, v=v), "FAR": launch.far(q, k, v, row=H * D),
        "WIDE_MAP": q.dtype is not torch.bfloat16, "SOFTMAX": choices.SOFTMAX, "FEATURE_NORM": choices.FEATURE_NORM,
        "HAS_MASK": token_mask is not None, "OUT_ALIGN": launch.out_alignment(D, q.element_size()),
        "PRECISION": precision, "MAP_PRECISION": map_precision,
        "LEAST_TOKENS": launch.least_tokens(map_precision, target.arch),
    }  # fmt: skip
    args = (
        q, k, v, temperature, mask, stats, out, *q.stride(), *k.stride(), *v.stride(), temperature.stride(0),
        *mask_strides, N, H,
    )  # fmt: skip

    dtype = stats.dtype if choices.FEATURE_NORM else q.dtype
    key = configs.Key(launch.variant("forward", q.dtype, precision, map_precision), dtype, D, choices.name)
    if not few:
        config = configs.get(key, target.arch)
        slots = _slots(q.device, forward_kernel, config, *args, **constants, BLOCK_N=config.block_n)
        if plan.busy(B * H, slots) < plan.BUSY:
            return False

    def run(config: configs.Config) -> None:
        _run(forward_kernel, B * H, config, *args, **constants, BLOCK_N=config.block_n)

    configs.launch(key, target.arch, run)
    return True


def _forward_in_two(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    token_mask: Tensor | None,
    choices: Choices,
    out: Tensor,
    stats: Tensor,
) -> None:
    B, H, N, D = q.shape
    record, target = stats.shape[-1], launch.target(q.device)
    x, b = (q, v) if choices.KEY_VALUE else (v, q)

    def records(parts: int) -> tuple[Tensor, Tensor, Tensor]:
        partial = stats if parts == 1 else _empty((parts, B, H, record), stats.dtype, q)
        return partial, partial[..., D * D :], partial[..., D * D + D :]

    split, (partial, *_) = _gram(
        gram_key(q.dtype, D, target.arch, choices.name, choices.FEATURE_NORM), k, b, q, token_mask, records,
        (record,) * 3, choices.EPS, squares=choices.squares, norm_a=choices.FEATURE_NORM,
        norm_b=choices.FEATURE_NORM and not choices.KEY_VALUE,
    )  # fmt: skip
    parts = split.parts
    if split.many:
        parts, partial = 1, _reduce(torch.sum, partial, stats)
    mask, mask_strides = _mask(token_mask, q)
    precision = launch.map_precision(q.dtype, target.arch, D)
    constants = {
        **_of_map(q, choices), **launch.alignment(x=x), "FAR": launch.far(x, row=H * D),
        "WIDE_MAP": q.dtype is not torch.bfloat16, "FEATURE_NORM": choices.FEATURE_NORM, "SOFTMAX": choices.SOFTMAX,
        "HAS_MASK": token_mask is not None, "OUT_ALIGN": launch.out_alignment(D, q.element_size()),
        "PRECISION": precision,
    }  # fmt: skip
    args = (
        x, partial, stats, temperature, mask, out, *x.stride(), temperature.stride(0), *mask_strides, N, B, H, parts,
    )  # fmt: skip

    def run(config: configs.Config) -> None:
        tiles = plan.cdiv(D, config.block_o)
        constants.update(BLOCK_O=config.block_o, BLOCK_N=config.block_n)
        slots = _slots(q.device, apply_kernel, config, *args, 1, N, **constants)
        over = plan.split_tokens(
            N, B * H * tiles, record * stats.element_size(), D * q.element_size(), slots, config.block_n
        )  # fmt: skip
        _run(apply_kernel, B * H * over.parts * tiles, config, *args, over.parts, over.chunk, **constants)

    key = configs.Key(launch.variant("apply", q.dtype, precision), q.dtype, D, choices.name)
    configs.launch(key, target.arch, run)


@replay.planned
def xfa_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    stats: Tensor,
    token_mask: Tensor | None,
    spec: Spec,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    dqkv = _empty((3, B, N, H, D), q.dtype, q)
    dtemperature = _empty((H,), temperature.dtype, q)
    if B * H == 0:
        return dqkv, dtemperature.zero_()
    choices = Choices.of(spec)
    x = q if choices.KEY_VALUE else v
    norm_x = choices.KEY_VALUE and choices.FEATURE_NORM
    weights = _empty((B, H, 3, D * D), q.dtype if q.dtype is torch.bfloat16 else stats.dtype, q)
    vectors = _empty((B, H, 2 * D + 1), stats.dtype, q)
    target = launch.target(q.device)

    def records(parts: int) -> tuple[Tensor, Tensor, Tensor]:
        return (_empty((parts, B, H, D * D), stats.dtype, q),) * 3

    with launch.on_device(q.device):
        split, (partial, *_) = _gram(
            gram_key(q.dtype, D, target.arch, f"{choices.name}-backward", norm_x), x, dout, x, token_mask, records,
            (D * D,) * 3, choices.EPS, squares="", norm_a=norm_x,
        )  # fmt: skip
        parts = split.parts
        if split.many:
            parts, partial = 1, _reduce(torch.sum, partial, _empty((B, H, D * D), stats.dtype, q))
        of_map = {**_of_map(q, choices), "WEIGHT_ALIGN": launch.out_alignment(D, weights.element_size())}

        def run_map_backward(config: configs.Config) -> None:
            _run(
                map_backward_kernel, B * H, config,
                partial, stats, temperature, weights, vectors, temperature.stride(0), B, H, parts,
                BLOCK_O=config.block_o, SOFTMAX=choices.SOFTMAX, **of_map,
            )  # fmt: skip

        configs.launch(configs.Key("map_backward", q.dtype, D, choices.name), target.arch, run_map_backward)
        del of_map["RECORD_ALIGN"]
        _gradients(dout, q, k, v, token_mask, choices, weights, vectors, dqkv, dtemperature, of_map)
    return dqkv, dtemperature


def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    choices: Choices,
    weights: Tensor,
    vectors: Tensor,
    dqkv: Tensor,
    dtemperature: Tensor,
    of_map: dict[str, Any],
) -> None:
    B, H, N, D = q.shape
    mask, mask_strides = _mask(token_mask, q)
    arch = launch.target(q.device).arch
    precision = launch.map_precision(q.dtype, arch, min(D, launch.LONGEST_IN_PARTS))
    constants = {
        **of_map, **launch.alignment(q=q, k=k, v=v, g=dout), "FAR": launch.far(q, k, v, dout, row=H * D),
        "FEATURE_NORM": choices.FEATURE_NORM, "HAS_MASK": token_mask is not None,
        "OUT_ALIGN": launch.out_alignment(D, q.element_size()),
        "PRECISION": precision,
    }  # fmt: skip
    args = (
        q, k, v, dout, mask, weights, vectors, dqkv[0], dqkv[1], dqkv[2], dtemperature,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *mask_strides, N, B, H,
    )  # fmt: skip

    def run(config: configs.Config) -> None:
        block_k = min(config.block_k, configs.block(D))
        constants.update(BLOCK_O=config.block_o, BLOCK_K=block_k, BLOCK_N=config.block_n)
        slots = _slots(q.device, gradients_kernel, config, *args, 1, N, **constants)
        # a program reads three maps, and three or four rows per token
        over = plan.split_tokens(
            N, B * H, 3 * D * D * weights.element_size(), 3 * D * q.element_size(), slots, config.block_n
        )  # fmt: skip
        _run(gradients_kernel, B * H * over.parts, config, *args, over.parts, over.chunk, **constants)

    key = configs.Key(launch.variant("gradients", q.dtype, precision), q.dtype, D, choices.name)
    configs.launch(key, arch, run)

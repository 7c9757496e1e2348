"""The ops: workspaces, splits, at most two launches in forward and three in backward, and sums of many parts."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from xformer_kernels.backends.triton import configs, launch, plan, replay
from xformer_kernels.backends.triton.kernels.backward import gradients_kernel, map_backward_kernel
from xformer_kernels.backends.triton.kernels.forward import apply_kernel, forward_kernel
from xformer_kernels.backends.triton.kernels.gram import gram_kernel
from xformer_kernels.backends.triton.kernels.mix import channel_mix_kernel
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

_ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# Triton's interpreter keeps the program's index in a global.
_one_at_a_time: AbstractContextManager[Any] = threading.Lock() if launch.INTERPRETING else nullcontext()
# Their tensor cores take tf32 with the tokens innermost: asynchronous loads would transpose 32 bits at a time.
_TRANSPOSING = ("sm_90", "sm_100")
# Strides of absent tensors.
_NONE3, _NONE4 = (0, 0, 0), (0, 0, 0, 0)


class Choices(NamedTuple):
    """The mathematical options of a call as compile-time constants of the kernels."""

    KEY_VALUE: bool
    TOKEN_NORM: bool
    FEATURE_NORM: bool
    """If neither TOKEN_NORM nor FEATURE_NORM is set, nothing is divided by norms."""
    SOFTMAX: bool
    EPS: float

    @property
    def name(self) -> str:
        """The name in the tuner's keys."""
        norm = "token" if self.TOKEN_NORM else "feature" if self.FEATURE_NORM else "none"
        return f"{('query_key', 'key_value')[self.KEY_VALUE]}-{norm}"

    @property
    def squares(self) -> str:
        """Which sums of squares the forward's Gram pass computes besides those of k; see gram.accumulate."""
        return "" if not self.TOKEN_NORM else "ac" if self.KEY_VALUE else "ab"


def _gram_key(dtype: torch.dtype, D: int, choices: Choices, norm: bool, suffix: str = "") -> configs.Key:
    """The tuner's key of a Gram pass; normalised tokens are multiplied in the accumulate dtype."""
    if norm:
        return configs.Key("gram_normalised", accumulate_dtype(dtype), D, choices.name + suffix)
    return configs.Key("gram", dtype, D, choices.name + suffix)


def _choices(spec: Spec) -> Choices:
    return Choices(spec.map == "key_value", spec.norm == "token", spec.norm == "feature", spec.softmax, spec.eps)


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
        # Triton chooses the layout of a product's operands by the narrowest dtype that was loaded for them, and does
        # not support float64 products in the layout of bytes.
        token_mask = token_mask.long()
    return token_mask, token_mask.stride()


def transposes(arch: str) -> bool:
    """Whether the tiles of sums over tokens in tf32 must not be loaded asynchronously."""
    return arch in _TRANSPOSING


def _run(kernel: Any, grid: int, config: configs.Config, *args: Any, **constants: Any) -> None:
    with _one_at_a_time:
        compiled = kernel[(grid,)](*args, **constants, **config.options())
    if recorder := replay.recorder():
        recorder.launched(kernel, compiled, grid, args, constants)


def _reduce(function: Any, partial: Tensor, out: Tensor) -> Tensor:
    """Sums or maxima over the parts, the first dimension."""
    function(partial, 0, out=out)
    if recorder := replay.recorder():
        recorder.reduced(function, partial, out)
    return out


def _split(x: Tensor, features: int, key: configs.Key) -> plan.Split:
    """How the tokens are split for a Gram pass, and for the pass that reads its partial results."""
    B, H, N, D = x.shape
    side = min(configs.get(key, launch.target(x.device).arch).block_o, configs.block(D))
    tiles = plan.cdiv(D, side) * plan.cdiv(features, side)
    record = D * features * accumulate_dtype(x.dtype).itemsize
    return plan.split_sums(N, B * H * tiles, record, D * x.element_size(), launch.target(x.device).processors)


def _gram(
    key: configs.Key,
    split: plan.Split,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    token_mask: Tensor | None,
    results: tuple[Tensor, Tensor, Tensor],
    steps: tuple[int, int, int],
    eps: float = 0.0,
    *,
    symmetric: bool = False,
    squares: str = "ab",
    norm_a: bool = False,
    norm_b: bool = False,
) -> None:
    """Launches a^T b into `results`, G and two sums of squares: (parts, B, H) records, `steps` apart."""
    B, H, N, DA = a.shape
    DB = b.shape[-1]
    mask, mask_strides = _mask(token_mask, a)
    arch = launch.target(a.device).arch
    precision = launch.gram_precision(a.dtype, norm_a or norm_b, arch, symmetric)
    facts = launch.alignment(a=a, b=b, c=c)
    acc = _ACC[accumulate_dtype(a.dtype)]

    def run(config: configs.Config) -> None:
        if precision == "tf32" and transposes(arch):
            config = config._replace(stages=1)
        block_a, block_b = (min(config.block_o, configs.block(D)) for D in (DA, DB))
        tiles = plan.cdiv(DA, block_a) * plan.cdiv(DB, block_b)
        _run(
            gram_kernel, B * H * split.parts * tiles, config,
            a, b, c, mask, *results, *a.stride(), *b.stride(), *c.stride(), *mask_strides, *steps,
            N, B, H, split.parts, split.chunk,
            ACC=acc, EPS=eps, DA=DA, DB=DB, BLOCK_A=block_a, BLOCK_B=block_b, BLOCK_N=config.block_n,
            SYMMETRIC=symmetric, SQUARES=squares, NORM_A=norm_a, NORM_B=norm_b, HAS_MASK=token_mask is not None,
            PRECISION=precision, **facts,
        )  # fmt: skip

    configs.launch(key, arch, run)


@replay.planned
def gram(a: Tensor, b: Tensor, symmetric: bool, token_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    B, H, _, DA = a.shape
    DB = b.shape[-1]
    dtype = accumulate_dtype(a.dtype)
    key = configs.Key("gram", a.dtype, max(DA, DB), "symmetric" if symmetric else "gram")
    split = _split(a, DB, key)
    sizes = ((DA, DB), (DA,), (DB,))
    parts = () if split.parts == 1 else (split.parts,)
    parts_G, parts_a, parts_b = (_empty((*parts, B, H, *size), dtype, a) for size in sizes)
    results = (parts_G, parts_a, parts_b)
    if B * H:
        with launch.on_device(a.device):
            _gram(key, split, a, b, a, token_mask, results, (DA * DB, DA, DB), symmetric=symmetric)
    if parts:
        G, ssq_a, ssq_b = (_empty((B, H, *size), dtype, a) for size in sizes)
        for partial, out in zip(results, (G, ssq_a, ssq_b), strict=True):
            _reduce(torch.sum, partial, out)
        return G, ssq_a, ssq_b
    return results


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
    facts = launch.alignment(x=x, x2=x2, add=add)

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
    """out, and stats: per (b, h) the sums k^T q (for key_value k^T v), |k|^2 and |q|^2 over the tokens."""
    B, H, N, D = q.shape
    out = _empty((B, N, H, D), q.dtype, q)
    stats = _empty((B, H, D * D + 2 * D), accumulate_dtype(q.dtype), q)
    if B * H == 0:
        return out, stats
    choices = _choices(spec)
    split = _split(q, D, _gram_key(q.dtype, D, choices, choices.FEATURE_NORM))
    with launch.on_device(q.device):
        if split.parts == 1 and plan.fits_one_launch(D, stats.element_size()):
            _forward_at_once(q, k, v, temperature, token_mask, choices, out, stats)
        else:
            _forward_in_two(q, k, v, temperature, token_mask, choices, out, stats, split)
    return out, stats


def _of_map(q: Tensor, choices: Choices) -> dict[str, Any]:
    """Constants of the kernels that use a map."""
    return {
        "ACC": _ACC[accumulate_dtype(q.dtype)],
        "EPS": choices.EPS,
        "D": q.shape[-1],
        "BLOCK_D": configs.block(q.shape[-1]),
        "KEY_VALUE": choices.KEY_VALUE,
        "TOKEN_NORM": choices.TOKEN_NORM,
        "RECORD_ALIGN": launch.out_alignment(q.shape[-1], accumulate_dtype(q.dtype).itemsize),
    }


def _forward_at_once(
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
    mask, mask_strides = _mask(token_mask, q)
    target = launch.target(q.device)
    constants = {**_of_map(q, choices), **launch.alignment(q=q, k=k, v=v)}
    key = configs.Key("forward", stats.dtype if choices.FEATURE_NORM else q.dtype, D, choices.name)

    def run(config: configs.Config) -> None:
        _run(
            forward_kernel, B * H, config,
            q, k, v, temperature, mask, stats, out, *q.stride(), *k.stride(), *v.stride(), temperature.stride(0),
            *mask_strides, N, H,
            BLOCK_N=config.block_n, WIDE_MAP=q.dtype is not torch.bfloat16, SOFTMAX=choices.SOFTMAX,
            FEATURE_NORM=choices.FEATURE_NORM, HAS_MASK=token_mask is not None,
            OUT_ALIGN=launch.out_alignment(D, q.element_size()),
            PRECISION=launch.gram_precision(q.dtype, choices.FEATURE_NORM, target.arch),
            MAP_PRECISION=launch.map_precision(q.dtype, target.arch), **constants,
        )  # fmt: skip

    configs.launch(key, target.arch, run)


def _forward_in_two(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    token_mask: Tensor | None,
    choices: Choices,
    out: Tensor,
    stats: Tensor,
    split: plan.Split,
) -> None:
    B, H, N, D = q.shape
    record = stats.shape[-1]
    partial = stats if split.parts == 1 else _empty((split.parts, B, H, record), stats.dtype, q)
    x, b = (q, v) if choices.KEY_VALUE else (v, q)
    _gram(
        _gram_key(q.dtype, D, choices, choices.FEATURE_NORM), split, k, b, q, token_mask,
        (partial, partial[..., D * D :], partial[..., D * D + D :]), (record,) * 3, choices.EPS,
        squares=choices.squares, norm_a=choices.FEATURE_NORM,
        norm_b=choices.FEATURE_NORM and not choices.KEY_VALUE,
    )  # fmt: skip
    parts = split.parts
    if split.many:
        parts, partial = 1, _reduce(torch.sum, partial, stats)
    mask, mask_strides = _mask(token_mask, q)
    target = launch.target(q.device)
    constants = {**_of_map(q, choices), **launch.alignment(x=x)}
    key = configs.Key("apply", q.dtype, D, choices.name)

    def run(config: configs.Config) -> None:
        tiles = plan.cdiv(D, config.block_o)
        over = plan.split_tokens(
            N, B * H * tiles, record * stats.element_size(), D * q.element_size(), target.processors
        )
        _run(
            apply_kernel, B * H * over.parts * tiles, config,
            x, partial, stats, temperature, mask, out, *x.stride(), temperature.stride(0), *mask_strides,
            N, B, H, parts, over.parts, over.chunk,
            BLOCK_O=config.block_o, BLOCK_N=config.block_n, WIDE_MAP=q.dtype is not torch.bfloat16,
            FEATURE_NORM=choices.FEATURE_NORM, SOFTMAX=choices.SOFTMAX, HAS_MASK=token_mask is not None,
            OUT_ALIGN=launch.out_alignment(D, q.element_size()), PRECISION=launch.map_precision(q.dtype, target.arch),
            **constants,
        )  # fmt: skip

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
    choices = _choices(spec)
    x = q if choices.KEY_VALUE else v
    norm_x = choices.KEY_VALUE and choices.FEATURE_NORM
    key = _gram_key(q.dtype, D, choices, norm_x, "-backward")
    split = _split(q, D, key)
    parts, partial = split.parts, _empty((split.parts, B, H, D * D), stats.dtype, q)
    weights = _empty((B, H, 3, D * D), q.dtype if q.dtype is torch.bfloat16 else stats.dtype, q)
    vectors = _empty((B, H, 2 * D + 1), stats.dtype, q)
    mask, mask_strides = _mask(token_mask, q)
    target = launch.target(q.device)
    of_map = _of_map(q, choices)
    weight_align = launch.out_alignment(D, weights.element_size())
    facts = launch.alignment(q=q, k=k, v=v, g=dout)

    def run_map_backward(config: configs.Config) -> None:
        _run(
            map_backward_kernel, B * H, config,
            partial, stats, temperature, weights, vectors, temperature.stride(0), B, H, parts,
            BLOCK_O=config.block_o, SOFTMAX=choices.SOFTMAX, WEIGHT_ALIGN=weight_align, **of_map,
        )  # fmt: skip

    def run_gradients(config: configs.Config) -> None:
        blocks = max(1, plan.cdiv(N, config.block_n))
        _run(
            gradients_kernel, B * H * blocks, config,
            q, k, v, dout, mask, weights, vectors, dqkv[0], dqkv[1], dqkv[2], dtemperature,
            *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *mask_strides, N, B, H, blocks,
            BLOCK_O=config.block_o, BLOCK_K=min(config.block_k, configs.block(D)), BLOCK_N=config.block_n,
            FEATURE_NORM=choices.FEATURE_NORM, HAS_MASK=token_mask is not None,
            OUT_ALIGN=launch.out_alignment(D, q.element_size()), PRECISION=launch.map_precision(q.dtype, target.arch),
            WEIGHT_ALIGN=weight_align, **{name: x for name, x in of_map.items() if name != "RECORD_ALIGN"}, **facts,
        )  # fmt: skip

    with launch.on_device(q.device):
        _gram(
            key, split, x, dout, x, token_mask, (partial,) * 3, (D * D,) * 3, choices.EPS, squares="",
            norm_a=norm_x,
        )  # fmt: skip
        if split.many:
            parts, partial = 1, _reduce(torch.sum, partial, _empty((B, H, D * D), stats.dtype, q))
        configs.launch(configs.Key("map_backward", q.dtype, D, choices.name), target.arch, run_map_backward)
        configs.launch(configs.Key("gradients", q.dtype, D, choices.name), target.arch, run_gradients)
    return dqkv, dtemperature

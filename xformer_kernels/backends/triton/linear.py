"""The ops of linear attention: two launches in forward (three for a softmax over tokens) and two in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends.layouts import channel_major, empty_gradient
from xformer_kernels.backends.triton import configs, launch, ops, plan, replay
from xformer_kernels.backends.triton.kernels.linear import apply_sums_kernel, key_sums_kernel, maxima_kernel
from xformer_kernels.backends.triton.kernels.linear_backward import key_gradients_kernel, query_gradients_kernel
from xformer_kernels.reference import accumulate_dtype
from xformer_kernels.spec import Spec

FEATURE_MAPS = ("identity", "relu", "elu1", "softmax_features", "softmax_tokens")


def takes_linear_attention(dtype: torch.dtype, head_dims: tuple[int, int]) -> bool:
    """True up to 128 features in 16-bit dtypes, 64 in others. Wider calls are composed of gram and channel_mix."""
    return plan.fits_linear_attention(max(head_dims), dtype.itemsize)


class _Call:
    """State shared by the launches of a call."""

    def __init__(self, q: Tensor, v: Tensor, spec: Spec) -> None:
        self.B, self.H, self.N, self.D = q.shape
        self.M, self.Dv = v.shape[2:]
        self.spec, self.like = spec, q
        self.dtype, self.wide = q.dtype, accumulate_dtype(q.dtype)
        self.record = spec.statistics(self.D, self.Dv)
        self.target = launch.target(q.device)
        of_q, of_k = spec.feature_maps
        self.shared: dict[str, Any] = {
            "ACC": ops._ACC[self.wide],
            "D": self.D,
            "DV": self.Dv,
            "BLOCK_D": configs.block(self.D),
            "BLOCK_V": configs.block(self.Dv),
            "OF_K": of_k,
            "RECORD_ALIGN": launch.out_alignment(self.D, self.wide.itemsize),
        }
        self.of_queries: dict[str, Any] = {
            "EPS": spec.eps, "SCALE": float(spec.scale), "OF_Q": of_q, "NORMALIZE": spec.normalize,
        }  # fmt: skip
        self.map: dict[str, Any] = {
            "WIDE_MAP": self.dtype is not torch.bfloat16,
            "PRECISION": launch.map_precision(self.dtype, self.target.arch),
        }

    def records(self, *parts: int) -> Tensor:
        return self.empty((*parts, self.B, self.H, self.record), self.wide)

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return ops._empty(size, dtype, self.like)

    def run(
        self,
        kernel: Any,
        name: str,
        tokens: int,
        args: Callable[[Tensor], tuple[Any, ...]],
        results: Callable[[int], Tensor] | None,
        **constants: Any,
    ) -> tuple[plan.Split, Tensor]:
        """Launches a kernel for queries or keys, split so that the device is busy until the end.

        Returns the split and `results(parts)`, the results of the parts, if the kernel has some. `args` are those
        before the number of parts, with these results.
        """
        of_q, of_k = self.spec.feature_maps
        key = configs.Key(name, self.dtype, max(self.D, self.Dv), f"{of_q}-{of_k}-{int(self.spec.normalize)}")
        of_no_part = self.like.new_empty((0, 1), dtype=self.wide)
        record, row = self.record * self.wide.itemsize, max(1, (self.D + self.Dv) // 2) * self.dtype.itemsize

        def run(config: configs.Config) -> tuple[plan.Split, Tensor]:
            if constants.get("PRECISION") == "tf32" and self.dtype.itemsize == 4 and ops.transposes(self.target.arch):
                config = config._replace(stages=1)
            if name == "linear_queries":
                constants["BLOCK_K"] = min(config.block_k, self.shared["BLOCK_V"])
            constants["BLOCK_N"] = config.block_n
            heads = self.B * self.H
            slots = ops._slots(self.like.device, kernel, config, *args(of_no_part), 1, tokens, **constants)
            split_tokens = plan.split_sums if results else plan.split_tokens
            split = split_tokens(tokens, heads, record, row, slots, config.block_n)
            partial = results(split.parts) if results else of_no_part
            ops._run(kernel, heads * split.parts, config, *args(partial), split.parts, split.chunk, **constants)
            return split, partial

        return configs.launch(key, self.target.arch, run)

    def sum_first(self, partial: Tensor, parts: int, out: Tensor) -> tuple[Tensor, int]:
        """Sums S and z of many parts into `out`. Returns it and the new number of parts, 1."""
        sums = self.D * self.Dv + self.D
        ops._reduce(torch.sum, partial[..., :sums], out[..., :sums])
        return out, 1


@replay.planned
def linear_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, token_mask: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Returns out and stats: S and z per (b, h); for a softmax over tokens, S before division by z, and maxima of k."""
    call = _Call(q, v, spec)
    B, H, N, M, D, Dv = call.B, call.H, call.N, call.M, call.D, call.Dv
    out, stats = ops._empty((B, N, H, Dv), q.dtype, q), call.records()
    if B * H == 0:
        return out, stats
    mask, mask_strides = ops._mask(token_mask, k)
    q_mask, q_mask_strides = ops._mask(query_mask, q)
    masked = {"HAS_MASK": token_mask is not None}
    with launch.on_device(q.device):
        if spec.feature_maps[1] == "softmax_tokens":
            _maxima(call, k, mask, mask_strides, masked, stats[..., -D:])
        keys, partial = call.run(
            key_sums_kernel, "linear_sums", M,
            lambda sums: (k, v, mask, stats, sums, *k.stride(), *v.stride(), *mask_strides, M, B, H),
            lambda parts: stats if parts == 1 else call.records(parts),
            **call.shared, **masked, **launch.alignment(k=k, v=v), FAR=launch.far(k, v),
            PRECISION=launch.tokens_precision(q.dtype, call.target.arch),
        )  # fmt: skip
        parts = keys.parts
        if keys.many:
            partial, parts = call.sum_first(partial, parts, stats)
        call.run(
            apply_sums_kernel, "linear_apply", N,
            lambda _: (q, q_mask, partial, stats, out, *q.stride(), *q_mask_strides, N, B, H, parts), None,
            **call.shared, **call.of_queries, **call.map, HAS_MASK=query_mask is not None, **launch.alignment(q=q),
            FAR=launch.far(q, row=H * Dv),
            OUT_ALIGN=launch.out_alignment(Dv, q.element_size()),
        )  # fmt: skip
    return out, stats


def _maxima(
    call: _Call,
    k: Tensor,
    mask: Tensor,
    mask_strides: tuple[int, ...],
    masked: dict[str, bool],
    highest: Tensor,
) -> None:
    """Writes the maxima of k to `highest`, a (B, H, D) view of stats: first of each part, then of all parts."""
    B, H, D = highest.shape
    split, found = call.run(
        maxima_kernel, "linear_maxima", call.M,
        lambda found: (k, mask, found, *k.stride(), *mask_strides, found.stride(-2), call.M, B, H),
        lambda parts: highest if parts == 1 else call.empty((parts, B, H, D), call.wide),
        **{name: call.shared[name] for name in ("ACC", "D", "BLOCK_D")}, **masked, **launch.alignment(k=k),
        FAR=launch.far(k),
    )  # fmt: skip
    if split.parts > 1:
        ops._reduce(torch.amax, found, highest)


@replay.planned
def linear_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stats: Tensor,
    query_mask: Tensor | None,
    token_mask: Tensor | None,
    spec: Spec,
    packed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(q, v, spec)
    B, H, N, M, D, Dv = call.B, call.H, call.N, call.M, call.D, call.Dv
    dq, dk, dv = (empty_gradient(call.empty, x) for x in (q, k, v))
    if B * H == 0:
        return dq, dk, dv
    mask, mask_strides = ops._mask(token_mask, k)
    q_mask, q_mask_strides = ops._mask(query_mask, q)
    with launch.on_device(q.device):
        queries, partial = call.run(
            query_gradients_kernel, "linear_queries", N,
            lambda sums: (q, dout, q_mask, stats, sums, dq, *q.stride(), *dout.stride(), *q_mask_strides, N, B, H),
            call.records,
            **call.shared, **call.of_queries, **call.map, HAS_MASK=query_mask is not None,
            **launch.alignment(q=q, g=dout), FAR=launch.far(q, dout, row=H * D),
            OUT_ALIGN=launch.out_alignment(D, q.element_size()), CHANNEL_MAJOR=channel_major(q),
        )  # fmt: skip
        parts = queries.parts
        if queries.many:
            partial, parts = call.sum_first(partial, parts, call.records())
        call.run(
            key_gradients_kernel, "linear_keys", M,
            lambda _: (k, v, mask, stats, partial, dk, dv, *k.stride(), *v.stride(), *mask_strides, M, B, H, parts),
            None,
            **call.shared, **call.map, HAS_MASK=token_mask is not None, **launch.alignment(k=k, v=v),
            FAR=launch.far(k, v, row=H * max(D, Dv)), OUT_ALIGN=launch.out_alignment(D, q.element_size()),
            OUT_ALIGN_V=launch.out_alignment(Dv, q.element_size()), CHANNEL_MAJOR=channel_major(k),
            CHANNEL_MAJOR_V=channel_major(v),
        )  # fmt: skip
    return dq, dk, dv

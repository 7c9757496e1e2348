"""Compares our channel attention and linear attention with the code of five models: ``python -m bench.variants``.

The providers are the original code (``eager``), the same with torch.compile, and our kernels. Inputs are views of the
packed projection in the layout of the model, the output is in the layout that its next projection expects, and
gradients are those of the packed projection. The limit is that of ``bench op``: the larger of the time of the FLOPs at
the rate of a large matrix product, and of reading the inputs and writing the results once at the rate of a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import xformer_kernels as xk
from bench import machine, measure, report
from bench.providers import compiled
from bench.workloads import VARIANTS, OpShape
from xformer_kernels import dispatch
from xformer_kernels.testing import assert_close

Function = Callable[[Tensor, OpShape], Tensor]


@dataclass(frozen=True)
class Variant:
    """Two functions of a packed projection with the same result up to rounding."""

    channel_major: bool  # (B, H * 3 * D, N) to (B, H * D, N); otherwise (B, N, 3 * H * D) to (B, N, H * D)
    eager: Function
    ours: Function

    def packed(self, shape: OpShape) -> Tensor:
        channels = 3 * shape.channels
        return torch.randn(shape.B, *((channels, shape.N) if self.channel_major else (shape.N, channels)))


def of_token_major(x: Tensor, s: OpShape) -> tuple[Tensor, ...]:
    """q, k, v as (B, N, H, D)."""
    return x.view(s.B, s.N, 3, s.H, s.D).unbind(2)


def of_channel_major(x: Tensor, s: OpShape) -> tuple[Tensor, ...]:
    """q, k, v as (B, H, N, D), adjacent in memory within each head."""
    return x.view(s.B, s.H, 3 * s.D, s.N).transpose(-1, -2).chunk(3, dim=-1)


def lite_mla(x: Tensor, s: OpShape) -> Tensor:
    """Linear attention of EfficientViT, as in timm."""
    q, k, v = of_channel_major(x, s)
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
    out = q @ (k.transpose(-1, -2) @ v)
    return (out[..., :-1] / (out[..., -1:] + 1e-5)).transpose(-1, -2).reshape(s.B, -1, s.N)


def sana(x: Tensor, s: OpShape) -> Tensor:
    """Linear attention of Sana, as in diffusers, on (B, H, D, N)."""
    q, k, v = (t.permute(0, 2, 3, 1) for t in of_token_major(x, s))
    q, k, v = q.relu(), k.relu(), F.pad(v, (0, 0, 0, 1), value=1.0)
    out = (v @ k.transpose(2, 3)) @ q
    return (out[:, :, :-1] / (out[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2)


def florence(x: Tensor, s: OpShape) -> Tensor:
    """Channel attention of Florence-2, as in timm (``davit_base_fl``)."""
    q, k, v = (t.transpose(1, 2) for t in of_token_major(x, s))
    attention = ((q * s.N**-0.5).transpose(-1, -2) @ k).softmax(dim=-1)
    return (attention @ v.transpose(-1, -2)).permute(0, 3, 1, 2).reshape(s.B, s.N, -1)


def davit(x: Tensor, s: OpShape) -> Tensor:
    """Channel attention of DaViT, as in timm."""
    q, k, v = (t.transpose(1, 2) for t in of_token_major(x, s))
    attention = ((k * s.D**-0.5).transpose(-1, -2) @ v).softmax(dim=-1)
    return (attention @ q.transpose(-1, -2)).permute(0, 3, 1, 2).reshape(s.B, s.N, -1)


def loftr(x: Tensor, s: OpShape) -> Tensor:
    """Linear attention of LoFTR, as in kornia."""
    q, k, v = of_token_major(x, s)
    Q, K, v = F.elu(q) + 1, F.elu(k) + 1, v / s.N
    KV = torch.einsum("nshd,nshv->nhdv", K, v)
    Z = 1 / (torch.einsum("nlhd,nhd->nlh", Q, K.sum(dim=1)) + 1e-6)
    return (torch.einsum("nlhd,nhdv,nlh->nlhv", Q, KV, Z) * s.N).flatten(2)


def _linear(channel_major: bool, feature_map: str, eps: float) -> Function:
    def ours(x: Tensor, s: OpShape) -> Tensor:
        if channel_major:
            q, k, v = (t.transpose(-1, -2) for t in xk.split_qkv(x.view(s.B, s.H, 3, s.D, s.N), 2))
        else:
            q, k, v = (t.transpose(1, 2) for t in xk.split_qkv(x.view(s.B, s.N, 3, s.H, s.D), 2))
        out = xk.linear_attention(q, k, v, feature_map=feature_map, eps=eps)
        return out.transpose(2, 3).reshape(s.B, -1, s.N) if channel_major else out.transpose(1, 2).flatten(2)

    return ours


def _without_norms(roles: tuple[int, int, int], temperature: Callable[[OpShape], float]) -> Function:
    def ours(x: Tensor, s: OpShape) -> Tensor:
        tokens = [t.transpose(1, 2) for t in xk.split_qkv(x.view(s.B, s.N, 3, s.H, s.D), 2)]
        q, k, v = (tokens[i] for i in roles)
        return xk.xfa(q, k, v, x.new_tensor([temperature(s)]), norm="none").transpose(1, 2).flatten(2)

    return ours


MODELS: dict[str, Variant] = {
    "LiteMLA": Variant(True, lite_mla, _linear(True, "relu", 1e-5)),
    "Sana": Variant(False, sana, _linear(False, "relu", 1e-15)),
    "Florence-2": Variant(False, florence, _without_norms((0, 1, 2), lambda s: s.N**-0.5)),
    "DaViT": Variant(False, davit, _without_norms((1, 2, 0), lambda s: s.D**-0.5)),
    "LoFTR": Variant(False, loftr, _linear(False, "elu1", 1e-6)),
}


def measured(model: str, shape: OpShape, seconds: float) -> list[report.Row]:
    variant, rows, yardsticks = MODELS[model], [], measure.Yardsticks(torch.float32, "cpu")
    x = variant.packed(shape)
    ours = dispatch.choose("auto", "cpu", (x.dtype,), (shape.D,))
    functions = {"eager": variant.eager, "compile": compiled(variant.eager), ours: variant.ours}
    leaf = x.clone().requires_grad_()
    dout = torch.randn_like(variant.eager(x, shape))

    def results(function: Function, leaf: Tensor) -> list[Tensor]:
        out = function(leaf, shape)
        return [out.detach(), *torch.autograd.grad(out, leaf, dout.to(out.dtype))]

    wide = results(variant.eager, leaf.detach().double().requires_grad_())
    plain = results(variant.eager, leaf)
    for provider in ("compile", ours):
        checked = zip(results(functions[provider], leaf), plain, wide, strict=True)
        for name, (result, eager, oracle) in zip(("out", "dx"), checked, strict=True):
            assert_close(result, eager, oracle, f"{provider}, {model} {shape}: {name}")

    def forward(function: Function) -> measure.Call:
        def call() -> object:
            with torch.no_grad():
                return function(x, shape)

        return call

    for direction, call_of in (("forward", forward), ("forward+backward", lambda f: partial(results, f, leaf))):
        calls: dict[str, measure.Call] = {name: call_of(function) for name, function in functions.items()}
        backward = direction != "forward"
        times = measure.interleaved({**calls, **yardsticks.calls}, seconds)
        least = shape.least_bytes(backward, x.itemsize)
        limit = yardsticks.limits(times).seconds(shape.flops(backward), least)
        for name in calls:
            timing = times[name]
            peak = measure.peak_extra_bytes(calls[name], "cpu")
            rows.append(
                report.Row(
                    workload=f"{model} {shape}",
                    direction=direction,
                    provider=name,
                    ms=timing.median * 1e3,
                    spread=timing.spread,
                    samples=len(timing.samples),
                    gb_per_s=least / timing.median / 1e9,
                    limit_ms=limit * 1e3,
                    fraction_of_limit=limit / timing.median,
                    speedup_over_eager=times["eager"].median / timing.median,
                    speedup_over_compile=times["compile"].median / timing.median,
                    speedup_over_graphs=None,
                    peak_extra_mb=None if peak is None else peak / 1e6,
                )
            )
            row = rows[-1]
            print(
                f"{row.workload:28} {direction:17} {name:8} {row.ms:9.3f} ms  {row.speedup_over_eager:5.2f} x eager  "
                f"{row.speedup_over_compile:5.2f} x compile  {row.fraction_of_limit:5.2f} of limit  "
                f"{row.peak_extra_mb or 0:7.1f} MB",
                flush=True,
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.variants", description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0, help="measuring time per direction, for all providers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--allocator", choices=("default", "raised"), default="default")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be 1 or more, got {options.threads}")
    if options.allocator == "raised":
        machine.restart_with_raised_allocator()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = [
        row for model in options.models for shape in VARIANTS[model] for row in measured(model, shape, options.seconds)
    ]
    if options.out:
        suffix = "" if machine.allocator() == "default" else "-raised"
        facts = {**machine.facts("cpu"), "device": "cpu", "dtype": "float32"}
        for path in report.save(options.out / machine.slug("cpu") / f"variants-cpu-float32{suffix}", facts, rows):
            print(f"written: {path}")


if __name__ == "__main__":
    main()

"""Time and memory of segmentation: ``python -m bench model --task segment [--out bench/results]``.

One forward of a whole image, from pixels to logits of its size (``Segmenter.predict``): XFA by our kernels, by eager
PyTorch, softmax attention, and LR-ASPP and SegFormer-B0 (:mod:`bench.segmenters`), in one interleaved run;
inference, channels_last, float32. Slow providers take part in fewer rounds, at least 3.

Memory is what the call allocates beside the weights and the image: the most bytes of tensors alive at once, and the
growth of the process.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import xformer
from bench import backbones, baselines, machine, measure, modules, report, segmenters
from bench.segmenters import OTHERS, WholeImage
from bench.terminal import Line, Terminal
from xformer.backbone import HEAD_DIM, VARIANTS
from xformer.counts import count
from xformer.segmentation import Segmenter

CLASSES = 19
LARGEST_MAP = 2**31
"""Bytes: the math form of softmax attention, which holds several maps at once, is run where one has at most these."""
PROVIDERS = {
    **backbones.PROVIDERS,
    "softmax": f"{backbones.PROVIDERS['softmax']}, in the form that torch chooses",
    "softmax-math": "the same weights and operation in its math form, which holds the maps of all heads",
    **OTHERS,
}
XFA = ("xfa", "eager")
FORMS = {name: backbones.VARIANTS[name] for name in ("unfused", "fused")}


@dataclass(frozen=True)
class Segmentation:
    """A forward of one provider of attention, or of another model, at one size.

    What is None was not run, cannot be, or is not of this model.
    """

    provider: str
    variant: str
    images: int
    height: int
    width: int
    parameters: int
    gmacs: float | None  # 1e9 multiply-adds of an image, by xformer.counts, of the unfused model; None without fvcore
    tokens: int | None  # of an image where they are most; of our model
    ms: float | None
    fps: float | None  # images per second
    spread: float | None
    samples: int | None
    over_ours: float | None  # its time over that of our kernels in the same variant
    live_mb: float | None  # most of tensors alive at once, weights and images left out
    extra_mb: float | None  # growth of the process, scratch of libraries included
    live_over_ours: float | None
    map_mb: float | None  # computed: heads * tokens^2 * 4 bytes, all heads' softmax maps of a layer of our model
    error: float | None  # largest, relative to the largest number; of what CHECKS says
    not_run: str | None


CHECKS = {
    "unfused": "xfa to eager, softmax-math to softmax; xfa is also judged beside eager with float64 as the oracle",
    "fused": "to the same provider unfused",
}


def tokens_and_map(variant: str, images: int, height: int, width: int) -> tuple[int, int]:
    """The most tokens that a layer sees of an image, and the bytes of its softmax map in float32, of all heads."""
    reductions = Segmenter(variant, CLASSES).feature_info.reduction()
    tokens, heads = max(
        (-(-height // reduction) * -(-width // reduction), stage.dim // HEAD_DIM)
        for stage, reduction in zip(VARIANTS[variant].stages, reductions, strict=True)
        if stage.dim
    )
    return tokens, 4 * images * heads * tokens**2


def models(variant: str, others: Sequence[str] = tuple(OTHERS)) -> dict[tuple[str, str], WholeImage]:
    """(provider, variant) to a model; of one provider all have the same weights. Those of softmax are not fused.

    `others`: of :data:`bench.segmenters.OTHERS`.
    """
    built = backbones.with_attention(partial(Segmenter, variant, CLASSES))
    built["softmax-math"] = built["softmax"]
    built |= {name: segmenters.build(name, CLASSES) for name in others}
    result: dict[tuple[str, str], WholeImage] = {}
    for provider, model in built.items():
        result[provider, "unfused"] = WholeImage(model.eval().to(memory_format=torch.channels_last))
        if provider in XFA:
            result[provider, "fused"] = WholeImage(xformer.fuse_for_inference(model))
        elif provider in OTHERS:
            result[provider, "fused"] = WholeImage(baselines.fuse(model))
    return result


def forward(provider: str, model: WholeImage, x: Tensor) -> Callable[[], Tensor]:
    if provider != "softmax-math":
        return partial(model, x)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            logits: Tensor = model(x)
        return logits

    return call


def gmacs(model: WholeImage, height: int, width: int) -> float | None:
    """Multiply-adds in 1e9 of one image, upsampling to its size included; None if fvcore is not installed."""
    if importlib.util.find_spec("fvcore") is None:
        return None
    return count(model, (height, width)).macs / 1e9


def run(call: Callable[[], Tensor]) -> tuple[Tensor, float, float | None]:
    """The output; the megabytes of tensors that it takes, and those by which the process grows, if the system tells."""
    kept: list[Tensor] = []

    def once() -> list[Tensor]:
        kept.append(call())
        return kept[:]

    live, extra = measure.peak_live_bytes(once, 1, "cpu"), measure.peak_extra_bytes(call, "cpu")
    return kept[0], live / 1e6, None if extra is None else extra / 1e6


def check(outputs: dict[tuple[str, str], Tensor], key: tuple[str, str], oracle: Tensor) -> float | None:
    """How far an output is from what it must equal; the oracle is of the first image.

    Raises:
        AssertionError: too far.
    """
    provider, variant = key
    y = outputs[key]
    if key == ("xfa", "unfused"):
        return modules.check_gradients(["logits"], [y[:1]], [outputs["eager", variant][:1]], [oracle]).output
    like = (provider, "unfused") if variant == "fused" else ("softmax", variant) if provider == "softmax-math" else key
    if like == key:
        return None
    expected = outputs[like]
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    if not error <= backbones.EQUAL:
        raise AssertionError(f"{provider}, {variant}: its output is off by {error:.1e} of the largest")
    return error


def rows_of(
    variant: str, images: int, height: int, width: int, seconds: float, others: Sequence[str] = tuple(OTHERS)
) -> list[Segmentation]:
    """All providers at one size. All but XFA may lack the memory, which is then said instead of times."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, height, width, generator=random).contiguous(memory_format=torch.channels_last)
    tokens, map_bytes = tokens_and_map(variant, images, height, width)
    all_models = models(variant, others)
    calls: dict[tuple[str, str], Callable[[], Tensor]] = {}
    outputs: dict[tuple[str, str], Tensor] = {}
    live: dict[tuple[str, str], float] = {}
    extra: dict[tuple[str, str], float | None] = {}
    not_run: dict[tuple[str, str], str] = {}
    with torch.inference_mode():
        for key, model in all_models.items():
            call = forward(key[0], model, x)
            if key[0] == "softmax-math" and map_bytes > LARGEST_MAP:
                not_run[key] = f"not tried, since a map of all heads has {map_bytes / 1e6:.0f} MB (computed)"
                continue
            try:
                outputs[key], live[key], extra[key] = run(call)
                calls[key] = call
            except RuntimeError as error:
                if key[0] in XFA or "not enough memory" not in str(error):
                    raise
                not_run[key] = str(error).splitlines()[0]
        oracle = _oracle(all_models["eager", "unfused"], x[:1])
        errors = {key: check(outputs, key, oracle) for key in calls}
        del outputs, oracle
        counted = {
            provider: gmacs(model, height, width)
            for (provider, fused), model in all_models.items()
            if fused == "unfused" and provider != "softmax-math"
        }
        counted["softmax-math"] = counted["softmax"]
        times = measure.interleaved({"/".join(key): call for key, call in calls.items()}, seconds)
    rows = []
    for provider, fused in all_models:
        key = (provider, fused)
        of_ours = provider not in OTHERS
        timing, ours = times.get("/".join(key)), times["/".join(("xfa", fused))]
        rows.append(
            Segmentation(
                provider=provider,
                variant=fused,
                images=images,
                height=height,
                width=width,
                parameters=sum(p.numel() for p in all_models[provider, "unfused"].parameters()),
                gmacs=counted[provider],
                tokens=tokens if of_ours else None,
                ms=timing.median * 1e3 if timing else None,
                fps=images / timing.median if timing else None,
                spread=timing.spread if timing else None,
                samples=len(timing.samples) if timing else None,
                over_ours=timing.median / ours.median if timing else None,
                live_mb=live.get(key),
                extra_mb=extra.get(key),
                live_over_ours=live[key] / live["xfa", fused] if key in live else None,
                map_mb=map_bytes / 1e6 if of_ours else None,
                error=errors.get(key),
                not_run=not_run.get(key),
            )
        )
    return rows


def _oracle(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = copy.deepcopy(model).double()(x.double())
    return logits


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("model",))
    parser.add_argument("--task", choices=("segment",), required=True)
    parser.add_argument("--variant", default="xformer_s", choices=tuple(VARIANTS))
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--halves", type=int, default=1, help="how often the sides are also halved (default: 1)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="measuring time of one size")
    parser.add_argument("--quick", action="store_true", help="the smallest model, a tiny image, little time")
    parser.add_argument("--allocator", default="default", choices=("default", "raised"), help="glibc's thresholds")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    options = parser.parse_args(arguments)
    for name in ("height", "width", "batch", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    if options.halves < 0 or min(options.height, options.width) >> options.halves < 64:
        parser.error(f"--halves must be 0 or more and leave sides of at least 64, got {options.halves}")
    options.suffix = "".join(
        f"-{value}"
        for value, default in (
            (options.variant, "xformer_s"),
            (f"{options.height}x{options.width}", "1024x2048"),
            (f"{options.batch}-images", "1-images"),
        )
        if value != default
    )
    if options.quick:
        options.variant, options.height, options.width, options.suffix = "xformer_xxs", 128, 256, "-quick"
    options.seconds = options.seconds or (1.0 if options.quick else 90.0)
    return options


def print_rows(rows: list[Segmentation], terminal: Terminal) -> None:
    lines: list[Line] = []
    last = None
    for row in rows:
        here = (row.height, row.width)
        numbers = (
            (row.parameters / 1e6, ".2f"),
            (row.gmacs, ".1f"),
            (row.fps, ".2f"),
            (row.ms, ".0f"),
            (row.spread, ".0%"),
            (row.samples, "d"),
            (row.over_ours, ".2f"),
            (row.live_mb, ".0f"),
            (row.live_over_ours, ".2f"),
            (row.extra_mb, ".0f"),
        )
        cells = ("" if value is None else format(value, how) for value, how in numbers)
        said = (f"{row.height} x {row.width}", row.provider, row.variant, row.not_run or "")
        lines.append(Line((*said, *cells), here != last, row.provider == "xfa"))
        last = here
    words = ("image", "attention or model", "variant", "not run")
    figures = ("M parameters", "GMACs", "FPS", "ms", "spread", "samples", "x ours", "live MB", "x ours", "process MB")
    terminal.table("segmentation", (*words, *figures), len(words), lines)
    ours = [row for row in rows if row.provider == "xfa"]
    for height, width, tokens, mb in dict.fromkeys((row.height, row.width, row.tokens, row.map_mb) for row in ours):
        terminal.print(
            f"{height} x {width}: {tokens} tokens; all heads' maps of one softmax layer, computed: {mb:.0f} MB"
        )


def main(arguments: list[str] | None = None) -> int:
    """Prints a table of all sizes; 0."""
    options = parse(arguments)
    if options.allocator == "raised":
        machine.restart_with_raised_allocator()
    torch.set_num_threads(options.threads)
    backbones.limit_memory()
    terminal = Terminal()
    facts: dict[str, Any] = {**machine.facts("cpu"), "device": "cpu", "dtype": "float32", "quick": options.quick}
    others = [name for name in OTHERS if not segmenters.missing(name)]
    providers = {name: said for name, said in PROVIDERS.items() if name not in OTHERS or name in others}
    facts.update(model=options.variant, classes=CLASSES, providers=providers, variants=FORMS, checks=CHECKS)
    terminal.print(
        f"{facts['machine']}, {facts['threads']} threads, torch {torch.__version__}, allocator {facts['allocator']}, "
        f"commit {facts['commit']}"
    )
    for name in [name for name in OTHERS if name not in others]:
        terminal.print(f"{name} is left out: {segmenters.missing(name)} is not installed")
    sizes = [(options.height >> i, options.width >> i) for i in range(options.halves, -1, -1)]
    rows: list[Segmentation] = []
    with terminal.progress(len(sizes)) as begin:
        for height, width in sizes:
            begin(f"{options.variant}, {options.batch} of {height} x {width}")
            rows += rows_of(options.variant, options.batch, height, width, options.seconds, others)
    print_rows(rows, terminal)
    if options.out:
        suffix = options.suffix + ("-raised" if facts["allocator"] == "raised" else "")
        stem = options.out / machine.slug("cpu") / f"model-segment-cpu-float32{suffix}"
        terminal.print("written: " + ", ".join(map(str, report.save(stem, facts, rows))))
    return 0

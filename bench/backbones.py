"""Time and memory of the backbones: ``python -m bench.backbones forward|training [--out bench/results]``.

forward   one size of ours and timm's of that size, in one interleaved run: inference, channels_last, float32
training  forward and backward of the cross entropy: XFA by our kernels, by eager PyTorch, and softmax attention
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer
from bench import baselines, machine, measure, modules, report, runtimes
from bench.providers import Errors
from bench.terminal import Line, Terminal

PEERS = {
    "xformer_s": ("edgenext_small", "mobilevit_s", "efficientnet_b0"),
    "xformer_xs": ("edgenext_x_small", "mobilevit_xs"),
    "xformer_xxs": ("edgenext_xx_small", "mobilevit_xxs"),
}
VARIANTS = {
    "unfused": "as the library makes the model",
    "folded": "batch norms folded into convolutions, public operations only: fuse_for_inference(kernels=False), "
    "torch.nn.utils.fusion.fuse_conv_bn_eval",
    "fused": "the most that is known for either: ours by fuse_for_inference; others by bench.baselines.fuse, with the "
    "oneDNN operations that inductor calls (private to torch) for convolutions and linear layers and the activation "
    "behind them, 1x1 convolutions as linear layers",
    "compiled": "torch.compile of the unfused model with inductor's freezing (public)",
    **runtimes.RUNTIMES,
}
SHAPES = ((224, 8), (512, 8), (1024, 2))
"""(pixels of a side, images) of training: what 24 GiB hold with eager XFA."""
EQUAL = 1e-5
"""How far fused outputs may be from unfused ones, relative to the largest."""
PROVIDERS = {
    "xfa": "our kernels",
    "eager": "the same weights in timm's XCA between torch's layer norm and sum",
    "softmax": "another model: scaled_dot_product_attention over tokens",
}


@dataclass(frozen=True)
class Forward:
    """A model in one variant."""

    model: str
    images: int
    size: int
    variant: str
    ms: float
    spread: float
    samples: int
    over_ours: float  # its time over that of our model of this size in the same variant
    over_fused: float  # its time over that of our fused model of this size
    error: float  # of the output: largest difference from the unfused one, relative to the largest number


@dataclass(frozen=True)
class Training:
    """A step of a model with one provider of attention. What is None did not fit, or cannot be."""

    provider: str
    images: int
    size: int
    ms: float | None
    spread: float | None
    samples: int | None
    ms_per_image: float | None
    over_ours: float | None  # its time over that of our kernels
    live_mb: float | None  # most of tensors alive at once, gradients of weights and what lives before left out
    live_mb_per_image: float | None
    memory_over_ours: float | None
    output_error: float | None  # to eager, relative to the largest number
    gradient_error: float | None
    failure: str | None


# ---------------------------------------------------------------------------------------------------------- forward


def variants(name: str, compile: bool) -> dict[str, nn.Module]:
    """A model in every variant."""
    import timm

    torch.manual_seed(0)
    options = {"zero_init_last": False} if name in PEERS else {}
    model = timm.create_model(name, **options).eval().to(memory_format=torch.channels_last)
    result: dict[str, Any] = {"unfused": model}
    if name in PEERS:
        result["folded"] = xformer.fuse_for_inference(model, kernels=False)
        result["fused"] = xformer.fuse_for_inference(model)
    else:
        result["folded"], result["fused"] = baselines.fold(model), baselines.fuse(model)
    if compile:
        result["compiled"] = torch.compile(copy.deepcopy(model), dynamic=False)
    return result


def forward_rows(
    ours: str, images: int, size: int, seconds: float, compile: bool, others: Sequence[str] = ()
) -> list[Forward]:
    """`others`: of :data:`bench.runtimes.RUNTIMES`; one whose output is not equal is said and left out."""
    x = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[tuple[str, str], measure.Call] = {}
    errors: dict[tuple[str, str], float] = {}
    if compile:
        import torch._inductor.config as inductor

        inductor.freezing = True
        torch.compiler.reset()
    with torch.inference_mode():
        for name in (ours, *PEERS[ours]):
            models = variants(name, compile)
            expected = models["unfused"](x)
            runs = {variant: partial(model, x) for variant, model in models.items()}
            for variant, run in runtimes.load(models["unfused"], name, tuple(x.shape), others).items():
                runs[variant] = partial(run, x.contiguous())
            for variant, run in runs.items():
                error = ((run() - expected).abs().max() / expected.abs().max()).item()
                if not error <= EQUAL:
                    unequal = f"{variant} {name}: its output is off by {error:.1e} of the largest"
                    if variant not in others:
                        raise AssertionError(unequal)
                    print(f"left out: {unequal}")
                    continue
                errors[name, variant] = error
                calls[name, variant] = run
        times = measure.interleaved({"/".join(key): call for key, call in calls.items()}, seconds)
    rows = []
    for name, variant in calls:
        timing = times[f"{name}/{variant}"]
        rows.append(
            Forward(
                model=name,
                images=images,
                size=size,
                variant=variant,
                ms=timing.median * 1e3,
                spread=timing.spread,
                samples=len(timing.samples),
                over_ours=timing.median / times[f"{ours}/{variant}"].median,
                over_fused=timing.median / times[f"{ours}/fused"].median,
                error=errors[name, variant],
            )
        )
    return rows


def run_forward(options: argparse.Namespace, terminal: Terminal) -> list[Forward]:
    rows: list[Forward] = []
    sizes = ["xformer_xxs"] if options.quick else options.models
    pixels, batches = (64, (1,)) if options.quick else (256, (1, 8))
    with terminal.progress(len(sizes) * len(batches)) as begin:
        for name in sizes:
            for images in batches:
                begin(f"{name}, {images} images")
                rows += forward_rows(name, images, pixels, options.seconds, options.compile, options.runtimes)
    lines = [
        Line(
            (
                *(row.model, str(row.images), row.variant),
                *(f"{row.ms:.2f}", f"{row.spread:.0%}", f"{row.over_ours:.2f}", f"{row.over_fused:.2f}"),
            ),
            new=row.variant == "unfused" and row.model in PEERS,
            bold=row.model in PEERS,
        )
        for row in rows
    ]
    terminal.table("forward", ("model", "images", "variant", "ms", "spread", "x ours", "x ours fused"), 3, lines)
    return rows


# --------------------------------------------------------------------------------------------------------- training


def with_attention(build: Callable[..., nn.Module]) -> dict[str, nn.Module]:
    """What `build` makes with each provider as its ``attention=``; ours and the eager one have the same weights."""
    from timm.models.xcit import XCA

    def eager(dim: int, num_heads: int, **_: Any) -> nn.Module:
        return modules.HalfBlock(nn.LayerNorm(dim, eps=1e-6), XCA(dim, num_heads, qkv_bias=False), None)

    torch.manual_seed(0)
    ours, plain, softmax = (build(attention=attention, zero_init_last=False) for attention in ("xfa", eager, "softmax"))
    plain.load_state_dict(ours.state_dict())
    return {"xfa": ours, "eager": plain, "softmax": softmax}


def training_models(name: str) -> dict[str, nn.Module]:
    """The same backbone with each provider of attention."""
    return {provider: model.train() for provider, model in with_attention(getattr(xformer, name)).items()}


def step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], list[Tensor]]:
    """Gives the logits and the gradients of all weights."""
    weights = list(model.parameters())

    def call() -> list[Tensor]:
        logits = model(x)
        return [logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, target), weights)]

    return call


def check(models: dict[str, nn.Module], x: Tensor, target: Tensor) -> Errors:
    """The rule of the other benches: our logits and gradients by eager's, float64 as the oracle; of two images."""
    x, target = x[:2], target[:2]
    ours, eager = (step(copy.deepcopy(models[name]), x, target)() for name in ("xfa", "eager"))
    oracle = step(copy.deepcopy(models["eager"]).double(), x.double(), target)()
    names = ["logits", *(f"d{name}" for name, _ in models["eager"].named_parameters())]
    return modules.check_gradients(names, ours, eager, oracle)


def training_rows(name: str, images: int, size: int, seconds: float) -> list[Training]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(images, 3, size, size, generator=random).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, 1000, (images,), generator=random)
    models = training_models(name)
    errors = check(models, x, target)
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    live: dict[str, float] = {}
    failures: dict[str, str] = {}
    for provider, model in models.items():
        call = step(model, x, target)
        try:
            call()
            live[provider] = measure.peak_live_bytes(call, 1, "cpu") / 1e6
            calls[provider] = call
        except RuntimeError as error:  # torch's word for too little memory on the CPU
            failures[provider] = str(error).splitlines()[0]
    times = measure.interleaved(dict(calls), seconds)
    rows = []
    for provider in models:
        timing = times.get(provider)
        ms = timing.median * 1e3 if timing else None
        mb = live.get(provider)
        rows.append(
            Training(
                provider=provider,
                images=images,
                size=size,
                ms=ms,
                spread=timing.spread if timing else None,
                samples=len(timing.samples) if timing else None,
                ms_per_image=ms / images if ms else None,
                over_ours=timing.median / times["xfa"].median if timing and "xfa" in times else None,
                live_mb=mb,
                live_mb_per_image=mb / images if mb else None,
                memory_over_ours=mb / live["xfa"] if mb and "xfa" in live else None,
                output_error=errors.output if provider == "xfa" else None,
                gradient_error=errors.gradients if provider == "xfa" else None,
                failure=failures.get(provider),
            )
        )
    return rows


def limit_memory() -> None:
    """Makes an allocation beyond what the machine has free an error of this process, and not its end."""
    if not Path("/proc/meminfo").exists():
        return
    import resource

    def kilobytes(file: str, field: str) -> int:
        return next(int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(field))

    free = kilobytes("/proc/self/status", "VmData") + 0.85 * kilobytes("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_DATA, (int(free) * 1024, resource.RLIM_INFINITY))


def run_training(options: argparse.Namespace, terminal: Terminal) -> list[Training]:
    limit_memory()
    name, shapes = ("xformer_xxs", ((64, 2), (96, 2))) if options.quick else ("xformer_s", SHAPES)
    rows: list[Training] = []
    with terminal.progress(len(shapes)) as begin:
        for size, images in shapes:
            begin(f"{name}, {images} images of {size} pixels")
            rows += training_rows(name, images, size, options.seconds)
    lines = [
        Line(
            (
                f"{row.images} x {row.size}",
                row.provider,
                row.failure or "",
                *(
                    "" if value is None else format(value, how)
                    for value, how in (
                        (row.ms_per_image, ".1f"),
                        (row.spread, ".0%"),
                        (row.over_ours, ".2f"),
                        (row.live_mb_per_image, ".1f"),
                        (row.memory_over_ours, ".2f"),
                    )
                ),
            ),
            new=row.provider == "xfa",
            bold=row.provider == "xfa",
        )
        for row in rows
    ]
    headings = ("images", "attention", "failure", "ms/image", "spread", "x ours", "live MB/image", "x ours")
    terminal.table(f"training of {name}", headings, 3, lines)
    return rows


def plot(stem: Path, facts: dict[str, Any], rows: list[Training]) -> Path:
    """Time and memory of an image against its pixels, each with a line of slope 1 through our first point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, field, label in zip(axes, ("ms_per_image", "live_mb_per_image"), ("ms", "live MB"), strict=True):
        for provider in PROVIDERS:
            points = [
                (row.size**2, getattr(row, field))
                for row in rows
                if row.provider == provider and getattr(row, field) is not None
            ]
            ax.plot(*zip(*points, strict=True), marker="o", label=provider)
            if provider == "xfa":
                guide = [(pixels, points[0][1] * pixels / points[0][0]) for pixels, _ in points]
                ax.plot(*zip(*guide, strict=True), color="black", linestyle="--", label="slope 1")
        ax.set(xscale="log", yscale="log", xlabel="pixels of an image", ylabel=f"{label} of an image")
        sizes = sorted({row.size for row in rows})
        ax.set_xticks([size**2 for size in sizes], [f"{size}x{size}" for size in sizes])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    figure.suptitle(f"training step of {facts['model']}: {report.title(facts)}", fontsize=9)
    path = stem.with_suffix(".png")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.backbones", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("forward", "training"))
    parser.add_argument("--models", default=",".join(PEERS), help="comma-separated, of forward")
    parser.add_argument("--compile", action="store_true", help="of forward: also under torch.compile")
    parser.add_argument("--runtimes", default=",".join(runtimes.RUNTIMES), help="comma-separated, of forward")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="measuring time of one comparison")
    parser.add_argument("--quick", action="store_true", help="the smallest model, tiny images, little time")
    parser.add_argument("--allocator", default="default", choices=("default", "raised"), help="glibc's thresholds")
    parser.add_argument("--out", type=Path, help="also write JSON, CSV and a plot to OUT/<machine>/")
    options = parser.parse_args(arguments)
    if options.allocator == "raised":
        machine.restart_with_raised_allocator()
    options.models = options.models.split(",")
    options.runtimes = [name for name in options.runtimes.split(",") if name]
    for option, known in (("models", PEERS), ("runtimes", runtimes.RUNTIMES)):
        unknown = set(getattr(options, option)) - set(known)
        if unknown:
            parser.error(f"--{option} {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    options.seconds = options.seconds or (1.0 if options.quick else 45.0)
    torch.set_num_threads(options.threads)
    terminal = Terminal()
    facts = {**machine.facts("cpu"), "device": "cpu", "dtype": "float32", "quick": options.quick}
    rows: list[Any] = []
    if options.what == "forward":
        facts["variants"] = VARIANTS
        for name in [name for name in options.runtimes if runtimes.missing(name)]:
            terminal.print(f"{name} is left out: {', '.join(runtimes.missing(name))} not installed")
            options.runtimes.remove(name)
        rows += run_forward(options, terminal)
    else:
        facts.update(providers=PROVIDERS, model="xformer_xxs" if options.quick else "xformer_s")
        rows += run_training(options, terminal)
    if not options.out:
        return
    suffix = ("-quick" if options.quick else "") + ("-compile" if options.compile else "")
    suffix += "-raised" if facts["allocator"] == "raised" else ""
    stem = options.out / machine.slug("cpu") / f"backbones-{options.what}-cpu-float32{suffix}"
    written = report.save(stem, facts, rows)
    if options.what == "training" and report.can_plot():
        written.append(plot(stem, facts, rows))
    terminal.print("written: " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()

"""Throughput and memory of XFA, its layer and whole models, against what users would run instead.

python -m bench op|layer|model [--device cpu] [--dtype float32] [--shapes main] [--quick] [--out bench/results]
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine, measure, providers, report, workloads
from xformer_kernels import dispatch

DIRECTIONS = ("forward", "forward+backward")
KERNELS = tuple(name for name in dispatch.BACKENDS if name != "reference")
# what is measured -> (shape sets, cases of a shape, providers)
KINDS: dict[str, tuple[dict[str, Any], Callable[..., Iterator[providers.Case]], tuple[str, ...]]] = {
    "op": (dict(workloads.OP_SHAPES), providers.op_cases, ("eager", "compile", *KERNELS, "sdpa")),
    "layer": (dict(workloads.LAYER_SHAPES), providers.layer_cases, ("eager", "compile", *KERNELS, "sdpa")),
    "model": (
        dict(workloads.MODEL_SHAPES),
        providers.model_cases,
        ("eager", "compile", *KERNELS, *(f"{name}+compile" for name in KERNELS)),
    ),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=KINDS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--shapes", default="main", help="name of a shape set: " + ", ".join(workloads.OP_SHAPES))
    parser.add_argument("--providers", default="", help="comma-separated; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="measuring time per workload and direction")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, and no torch.compile")
    parser.add_argument("--allocator", default="default", choices=("default", "raised"), help="glibc's thresholds")
    parser.add_argument("--out", type=Path, help="also write JSON, CSV and PNG to OUT/<machine>/")
    options = parser.parse_args(arguments)
    sets, _, known = KINDS[options.what]
    if options.shapes not in sets:
        parser.error(f"--shapes {options.shapes}: for {options.what} there are {', '.join(sets)}")
    chosen = tuple(filter(None, options.providers.split(","))) or known
    unknown = set(chosen) - set(known)
    if unknown:
        parser.error(f"--providers {', '.join(sorted(unknown))}: for {options.what} there are {', '.join(known)}")
    options.providers = {name for name in chosen if not (options.quick and "compile" in name)}
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints one table; returns 1 if a result of ours was wrong."""
    options = parse(arguments)
    if options.allocator == "raised":
        machine.restart_with_raised_allocator()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    sets, cases_of, _ = KINDS[options.what]
    shapes = sets[options.shapes]
    console = Console(width=None if sys.stdout.isatty() else 140)
    facts = {**machine.facts(options.device), "device": options.device, "dtype": options.dtype}
    console.print(
        f"{facts['machine']}, {facts['threads']} threads, torch {torch.__version__}, allocator {facts['allocator']}, "
        f"commit {facts['commit']}"
    )
    yardsticks = measure.Yardsticks(dtype, options.device)
    limits: list[measure.Limits] = []
    rows: list[report.Row] = []
    wrong: dict[tuple[str, str], str] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(options.what, total=len(shapes))
        for shape in shapes:
            progress.update(task, description=f"{options.what} {shape}")
            cases = [
                case for case in cases_of(shape, dtype, options.device, options.providers) if _right(case, shape, wrong)
            ]
            for direction in DIRECTIONS:
                rows += _measure(shape, direction, cases, yardsticks, limits, options)
            progress.advance(task)
    if limits:
        facts["copy_gb_per_s"] = statistics.median(limit.bytes_per_second for limit in limits) / 1e9
        facts["matmul_gflop_per_s"] = statistics.median(limit.flops_per_second for limit in limits) / 1e9
        console.print(
            "medians over the rounds: copy {copy_gb_per_s:.1f} GB/s, matrix product {matmul_gflop_per_s:.0f} "
            "GFLOP/s".format(**facts)
        )
    title = f"{options.what}, {options.dtype}, shapes {options.shapes}"
    report.print_table(title, rows, console)
    for direction in DIRECTIONS:
        _print_means(direction, rows, shapes, console)
    for message in wrong.values():
        console.print(f"WRONG: {message}", style="bold red")
    if options.out:
        suffix = "" if options.shapes == "main" else f"-{options.shapes}"
        suffix += "-raised" if facts["allocator"] == "raised" else ""
        stem = options.out / machine.slug(options.device) / f"{options.what}-{options.device}-{options.dtype}{suffix}"
        written = report.save(stem, facts, rows)
        if options.what == "op":
            for key in dict.fromkeys((s.B, s.H, s.D) for s in shapes):
                tokens = {str(s): s.N for s in shapes if key == (s.B, s.H, s.D)}
                if len(tokens) > 2:
                    written.append(report.plot_over_tokens(stem, facts, rows, tokens, "B{}-H{}-D{}".format(*key)))
        console.print("written: " + ", ".join(map(str, written)))
    # a model that torch.compile gets wrong by itself is not our mistake
    ours = [key for key in wrong if key[0].split("+")[0] in KERNELS]
    return 1 if any(name in KERNELS or ("compile", shape) not in wrong for name, shape in ours) else 0


def _right(case: providers.Case, shape: object, wrong: dict[tuple[str, str], str]) -> bool:
    try:
        case.check()
    except AssertionError as error:
        wrong[case.provider, str(shape)] = f"{case.provider} at {shape}, not timed: {error}"
        return False
    return True


def _measure(
    shape: Any,
    direction: str,
    cases: list[providers.Case],
    yardsticks: measure.Yardsticks,
    limits: list[measure.Limits],
    options: argparse.Namespace,
) -> list[report.Row]:
    """Times all cases in one interleaved run, with the yardsticks among them; appends what these gave to `limits`."""
    backward = direction != "forward"
    calls = {case.provider: case.both if backward else case.forward for case in cases}
    if not calls:
        return []
    default = 12.0 if options.what == "model" else 6.0
    seconds = (options.seconds or default) / (10 if options.quick else 1)
    limit = least = None
    if hasattr(shape, "flops"):
        times = measure.interleaved({**calls, **yardsticks.calls}, seconds, options.device)
        limits.append(yardsticks.limits(times))
        times = {name: times[name] for name in calls}
        least = shape.least_bytes(backward, getattr(torch, options.dtype).itemsize)
        limit = limits[-1].seconds(shape.flops(backward), least)
    else:
        times = measure.interleaved(calls, seconds, options.device)

    def ratio(provider: str, name: str) -> float | None:
        return times[provider].median / times[name].median if provider in times else None

    rows = []
    for name, timing in times.items():
        # sdpa is another operator: the limit is not its own
        of_limit = limit if name != "sdpa" else None
        peak = measure.peak_extra_bytes(calls[name], options.device)
        rows.append(
            report.Row(
                workload=str(shape),
                direction=direction,
                provider=name,
                ms=timing.median * 1e3,
                spread=timing.spread,
                samples=len(timing.samples),
                gb_per_s=least / timing.median / 1e9 if least and of_limit else None,
                limit_ms=of_limit * 1e3 if of_limit else None,
                fraction_of_limit=of_limit / timing.median if of_limit else None,
                speedup_over_eager=ratio("eager", name),
                speedup_over_compile=ratio("compile", name),
                peak_extra_mb=None if peak is None else peak / 1e6,
            )
        )
    return rows


def _print_means(direction: str, rows: list[report.Row], shapes: tuple[Any, ...], console: Console) -> None:
    """Geometric means of our kernels, over all workloads and over those of many tokens."""
    many = {str(shape) for shape in shapes if getattr(shape, "N", 0) >= 1024}
    for name in KERNELS:
        mine = [row for row in rows if row.provider == name and row.direction == direction]
        for chosen, which in ((mine, "all"), ([row for row in mine if row.workload in many], "N >= 1024")):
            if chosen and (which == "all" or len(chosen) < len(mine)):
                means = ", ".join(filter(None, (_mean(chosen, *field) for field in MEANS)))
                console.print(f"{name}, {direction}, {which}, geometric mean: {means}")


MEANS = (
    ("speedup_over_eager", "x eager"),
    ("speedup_over_compile", "x compile"),
    ("fraction_of_limit", "of limit"),
)


def _mean(rows: list[report.Row], field: str, label: str) -> str:
    values = [value for row in rows if (value := getattr(row, field))]
    if not values:
        return ""
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.2f} {label} (least {min(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark the throughput and memory of XFA, its layer and whole models against the alternatives.

python -m bench op|layer|model [--device cpu] [--dtype float32] [--shapes main,xcit] [--quick] [--out bench/results]
python -m bench model --task segment [--help] [--out bench/results]

In sets of layers whose names end in "blocks", each layer is wrapped in layer norm, layer scale and a residual
connection. For the set "grid", both forms are timed and the regret of form="auto" is printed; see bench/forms.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import forms, machine, measure, modules, providers, report, workloads
from bench.modules import FORMS, KERNELS
from bench.terminal import Terminal

DIRECTIONS = ("forward", "forward+backward")
TASKS = ("classify", "segment")
DEFAULT = "; ".join(f"on {device} {','.join(names)}" for device, names in workloads.DEFAULT.items())
# kind of benchmark -> (sets of shapes, function that yields the cases of a shape, providers)
KINDS: dict[str, tuple[dict[str, Any], Callable[..., Iterator[providers.Case]], tuple[str, ...]]] = {
    "op": (
        dict(workloads.OP_SHAPES),
        providers.op_cases,
        ("eager", "compile", "compile+graphs", *KERNELS, "triton+graphs", "cuda+graphs", "sdpa"),
    ),
    "layer": (
        dict(workloads.LAYER_SHAPES),
        modules.layer_cases,
        ("eager", "compile", *KERNELS, *(f"{name}-{form}" for name in KERNELS for form in FORMS), "sdpa"),
    ),
    "model": (
        dict(workloads.MODEL_SHAPES),
        modules.model_cases,
        ("eager", "compile", *KERNELS, *(f"{name}+compile" for name in KERNELS)),
    ),
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=KINDS)
    parser.add_argument(
        "--task", choices=TASKS, help="for model: classify, timm models (default), or segment, with its own options"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--shapes", default="", help=f"comma-separated sets; default (those that exist): {DEFAULT}")
    parser.add_argument("--providers", default="", help="comma-separated; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="measuring time per workload and direction")
    parser.add_argument("--stop-after", type=float, default=0.0, help="seconds after which no workload is started")
    parser.add_argument("--quick", action="store_true", help="a tenth of the measuring time, without torch.compile")
    parser.add_argument("--allocator", default="default", choices=("default", "raised"), help="thresholds of glibc")
    parser.add_argument("--out", type=Path, help="also write JSON, CSV and PNG files to OUT/<machine>/")
    options = parser.parse_args(arguments)
    if options.task and options.what != "model":
        parser.error(f"--task {options.task}: only model has tasks, got {options.what}")
    sets, _, known = KINDS[options.what]
    default = tuple(name for name in workloads.DEFAULT[options.device] if name in sets)
    options.shapes = tuple(filter(None, options.shapes.split(","))) or default
    unknown = set(options.shapes) - set(sets)
    if unknown:
        parser.error(f"--shapes {', '.join(sorted(unknown))}: those of {options.what} are {', '.join(sets)}")
    chosen = tuple(filter(None, options.providers.split(","))) or known
    unknown = set(chosen) - set(known)
    if unknown:
        parser.error(f"--providers {', '.join(sorted(unknown))}: those of {options.what} are {', '.join(known)}")
    options.providers = {name for name in chosen if not (options.quick and "compile" in name)}
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Prints a table for each set of shapes; returns 1 if a result of our kernels was wrong, 3 if time ran out."""
    begun = time.monotonic()
    arguments = sys.argv[1:] if arguments is None else arguments
    if _task(arguments) == "segment":
        from bench import segment  # which needs what training needs

        return segment.main(arguments)
    options = parse(arguments)
    if options.allocator == "raised":
        machine.restart_with_raised_allocator()
    torch.set_num_threads(options.threads)
    terminal = Terminal()
    facts = {**machine.facts(options.device), "device": options.device, "dtype": options.dtype}
    terminal.print(
        f"{facts['machine']}, {facts['threads']} threads, torch {torch.__version__}, allocator {facts['allocator']}, "
        f"commit {facts['commit']}"
    )
    yardsticks = measure.Yardsticks(getattr(torch, options.dtype), options.device)
    wrong: dict[tuple[str, str], str] = {}
    late: list[str] = []
    for name in options.shapes:
        if options.what == "layer" and name == workloads.GRID:
            rows = forms.run(workloads.LAYER_SHAPES[name], options, terminal)
            if options.out:
                written = report.save(_stem(name, facts, options), facts, rows)
                terminal.print("written: " + ", ".join(map(str, written)))
        else:
            _run(name, dict(facts), yardsticks, wrong, late, begun, options, terminal)
    for message in wrong.values():
        terminal.print(f"WRONG: {message}", style="bold red")
    if late:
        terminal.print(f"NOT MEASURED within {options.stop_after:.0f} s: {', '.join(late)}", style="bold red")
    # a compiled model does not count if torch.compile is also wrong without our kernels
    ours = [(name, shape) for name, shape in wrong if report.is_ours(name)]
    if any(not name.endswith("+compile") or ("compile", shape) not in wrong for name, shape in ours):
        return 1
    return 3 if late else 0


def _task(arguments: list[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", nargs="?")
    task: str | None = parser.parse_known_args(arguments)[0].task
    return task


def _run(
    name: str,
    facts: dict[str, Any],
    yardsticks: measure.Yardsticks,
    wrong: dict[tuple[str, str], str],
    late: list[str],
    begun: float,
    options: argparse.Namespace,
    terminal: Terminal,
) -> None:
    """Measures, prints and saves one set of shapes; appends to `wrong` and `late`."""
    sets, cases_of, _ = KINDS[options.what]
    shapes = sets[name]
    limits: list[measure.Limits] = []
    rows: list[report.Row] = []
    with terminal.progress(len(shapes)) as begin:
        for shape in shapes:
            begin(f"{options.what} {shape}")
            if options.stop_after and time.monotonic() - begun > options.stop_after:
                late.append(str(shape))
                continue
            given = cases_of(shape, getattr(torch, options.dtype), options.device, options.providers)
            cases = [case for case in given if _right(case, shape, wrong, options.device)]
            for direction in DIRECTIONS:
                rows += _measure(shape, direction, cases, yardsticks, limits, options)
            del cases  # the next shape needs the memory
    if limits:
        facts["copy_gb_per_s"] = statistics.median(limit.bytes_per_second for limit in limits) / 1e9
        facts["matmul_gflop_per_s"] = statistics.median(limit.flops_per_second for limit in limits) / 1e9
        terminal.print(
            "medians over the rounds: copy {copy_gb_per_s:.1f} GB/s, matrix product {matmul_gflop_per_s:.0f} "
            "GFLOP/s".format(**facts)
        )
    report.print_table(f"{options.what}, {options.dtype}, shapes {name}", rows, terminal)
    many = {str(shape) for shape in shapes if getattr(shape, "many", False)}
    report.print_means(rows, many, workloads.MANY.get(options.what, ""), terminal)
    report.print_regrets(rows, terminal)
    report.print_gains(rows, terminal)
    if options.out and rows:
        terminal.print("written: " + ", ".join(map(str, _save(name, shapes, facts, rows, options, terminal))))


def _save(
    name: str,
    shapes: tuple[Any, ...],
    facts: dict[str, Any],
    rows: list[report.Row],
    options: argparse.Namespace,
    terminal: Terminal,
) -> list[Path]:
    stem = _stem(name, facts, options)
    written = report.save(stem, facts, rows)
    if not report.can_plot():
        terminal.print("no plots: matplotlib is not installed")
        return written
    written += report.plot(stem, facts, rows)
    if options.what == "op":
        for key in dict.fromkeys((s.B, s.H, s.D) for s in shapes):
            tokens = {str(s): s.N for s in shapes if key == (s.B, s.H, s.D)}
            if len(tokens) > 2:
                written.append(report.plot_over_tokens(stem, facts, rows, tokens, "B{}-H{}-D{}".format(*key)))
    return written


def _stem(name: str, facts: dict[str, Any], options: argparse.Namespace) -> Path:
    suffix = "" if name == "main" else f"-{name}"
    suffix += "-raised" if facts["allocator"] == "raised" else ""
    folder: Path = options.out / machine.slug(options.device)
    return folder / f"{options.what}-{options.device}-{options.dtype}{suffix}"


def _right(case: providers.Case, shape: object, wrong: dict[tuple[str, str], str], device: str) -> bool:
    """Whether the result is correct; if not, or if the provider raises an error, the message is added to `wrong`."""
    try:
        case.errors = case.check()
    except AssertionError as error:
        wrong[case.provider, str(shape)] = f"{case.provider} at {shape}, not timed: {error}"
    except Exception as error:
        traceback.print_exc()
        wrong[case.provider, str(shape)] = f"{case.provider} at {shape} failed: {type(error).__name__}: {error}"
    if device == "cuda":
        torch.cuda.empty_cache()  # CUDA graphs have separate memory pools
    return (case.provider, str(shape)) not in wrong


def _measure(
    shape: Any,
    direction: str,
    cases: list[providers.Case],
    yardsticks: measure.Yardsticks,
    limits: list[measure.Limits],
    options: argparse.Namespace,
) -> list[report.Row]:
    """Times all cases and the yardsticks in one interleaved run; appends the limits of the machine to `limits`."""
    backward = direction != "forward"
    at = {case.provider: case for case in cases}
    either = {name: case.both if backward else case.forward for name, case in at.items()}
    calls: dict[str, measure.Call] = {name: call for name, call in either.items() if call is not None}
    if not any(not at[name].part for name in calls):
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
    parts = [times.pop(name).median for name in calls if at[name].part]
    live = {name: _live_mb(at[name], backward, options.device) for name in times}
    share = sum(parts) / times["eager"].median if parts and "eager" in times else None

    def ratio(provider: str, name: str) -> float | None:
        return times[provider].median / times[name].median if provider in times else None

    rows = []
    for name, timing in times.items():
        # sdpa is another operator: the limit does not apply
        of_limit = limit if name != "sdpa" else None
        mine, eagers, errors = live[name], live.get("eager"), at[name].errors
        form = _form(at[name], backward)
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
                speedup_over_graphs=ratio("compile+graphs", name),
                peak_extra_mb=_peak_mb(name, calls[name], options.device),
                peak_live_mb=mine,
                memory_of_eager=mine / eagers if mine is not None and eagers else None,
                form=form,
                regret=_regret(name, form, times) if options.what == "layer" and report.is_users(name) else None,
                attention_share=share,
                bound=None if share is None or share >= 1 else 1 / (1 - share),
                output_error=errors.output if errors else None,
                gradient_error=errors.gradients if errors else None,
            )
        )
    return rows


def _peak_mb(name: str, call: measure.Call, device: str) -> float | None:
    """None for CUDA graphs: their memory is reserved at capture, so a call does not show it."""
    size = None if name.endswith("+graphs") else measure.peak_extra_bytes(call, device)
    return None if size is None else size / 1e6


def _live_mb(case: providers.Case, backward: bool, device: str) -> float | None:
    """Peak of live tensors in MB for forward with backward, where memory matters; None for the forward."""
    if not backward or case.both is None:
        return None
    return measure.peak_live_bytes(case.both, case.weights_from, device) / 1e6


def _form(case: providers.Case, backward: bool) -> str | None:
    with torch.set_grad_enabled(backward):
        return case.form() if case.form else None


def _regret(name: str, form: str | None, times: dict[str, measure.Timing]) -> float | None:
    """Time of the form that auto chose over the best of eager, compile and the other form, minus 1.

    Negative if auto is the fastest. The chosen form requested by name runs the same code, so it is not compared.
    """
    others = [
        timing.median
        for other, timing in times.items()
        if other in ("eager", "compile") or (other.startswith(f"{name}-") and other != f"{name}-{form}")
    ]
    return times[name].median / min(others) - 1 if others else None


if __name__ == "__main__":
    sys.exit(main())

"""Time of each kernel of xfa alone on a GPU: ``python -m bench.gpu_kernels [--dtype float32] [--out bench/results]``.

Each time comes with the bytes of tokens, their rate, its fraction of a copy in the same run, and what
:mod:`bench.gpu_model` predicts from the code that ran. Triton's kernels are also timed with other pipeline stages, and
split for half and twice the multiprocessors. Results of each are checked against float64 at few tokens. Of the backend
cuda, torch's profiler gives the times.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from triton.runtime.errors import OutOfResources, PTXASError

from bench import gpu_launches, gpu_model, report
from bench.gpu_launches import Change, Recorded
from bench.gpu_memory import copy_bandwidth, facts, folder, setup
from bench.terminal import Line, Terminal
from bench.workloads import OP_SHAPES, OpShape
from xformer_kernels import reference
from xformer_kernels.testing import assert_close, gradient_terms

STAGES = (1, 2, 3, 4)
FACTORS = (0.5, 2.0)
CHECKED = 300
"""Tokens of the problem that is checked: as many batches and heads take the same launches."""
RESULTS = ("out", "dq", "dk", "dv", "dtemperature")
CALLS = 10


@dataclass(frozen=True)
class Row:
    """One launch. `varied`: what differs from the call as users make it."""

    workload: str
    direction: str
    kernel: str
    varied: str
    programs: int | None
    waves: float | None  # programs over those that the GPU holds at once
    warps: int | None
    stages: int | None
    ms: float
    spread: float
    mb: float | None  # tokens read and written, 10^6 bytes
    gb_per_s: float | None
    of_copy: float | None
    predicted_ms: float | None
    binds: str | None
    right: bool | None  # None: not checked


def is_right(
    shape: OpShape, dtype: torch.dtype, device: str, change: Change | None, backend: str, judged: bool
) -> bool | None:
    """Whether out and all gradients are within the tolerance of the tests; None if nothing is `judged`."""
    tensors = gpu_launches.inputs(replace(shape, N=min(shape.N, CHECKED)), dtype, device, values=judged)
    with gpu_launches.recording(change):
        got = gpu_launches.gradients(tensors, backend)
    if not judged:
        return None
    wide = tuple(x.double() for x in tensors)
    results = []
    for given in (tensors, wide):
        leaves = [x.detach().requires_grad_() for x in given[:-1]]
        out = reference.xfa(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, given[-1])])
    terms = gradient_terms(*wide)
    try:
        for name, x, eager, exact in zip(RESULTS, got, *results, strict=True):
            assert_close(x, eager, exact, name, terms.get(name))
    except AssertionError as error:
        print(f"WRONG: {backend} at {shape}, {dtype}: {error}", flush=True)
        return False
    return True


def variations(recorded: list[tuple[str, Recorded]]) -> Iterator[tuple[str, str, Change | None, float]]:
    """What is varied, the kernel that it is about ("": all), the change, and the factor of multiprocessors."""
    for name, stages in dict.fromkeys((r.name, r.stages) for _, r in recorded if r.stages > 1):
        for other in STAGES:
            if other == stages:
                continue

            def change(kernel: str, options: dict[str, Any], name: str = name, other: int = other) -> None:
                if kernel == name:
                    options["num_stages"] = other

            yield f"stages={other}", name, change, 1.0
    for factor in FACTORS:
        yield f"processors x {factor:g}", "", None, factor


def measure(shape: OpShape, dtype: torch.dtype, copy: float, device: str, vary: bool) -> Iterator[Row]:
    """Rows of the Triton kernels."""
    on_gpu = device == "cuda"
    tensors = gpu_launches.inputs(shape, dtype, device, values=on_gpu)
    first = gpu_launches.of_call(tensors)
    yield from _rows("", first, shape, dtype, copy, device, is_right(shape, dtype, device, None, "triton", on_gpu))
    known = {(direction, r.name): r.programs for direction, r in first}
    for what, name, change, factor in variations(first) if vary else ():
        try:
            with gpu_launches.processors(factor):
                found = gpu_launches.of_call(tensors, change)
                right = is_right(shape, dtype, device, change, "triton", on_gpu)
        except (OutOfResources, PTXASError) as error:
            print(f"{what} of {name} at {shape}, {dtype}: {error}", flush=True)
            continue
        changed = [(d, r) for d, r in found if (r.name == name if name else known.get((d, r.name)) != r.programs)]
        yield from _rows(what, changed, shape, dtype, copy, device, right)


def _rows(
    varied: str,
    found: list[tuple[str, Recorded]],
    shape: OpShape,
    dtype: torch.dtype,
    copy: float,
    device: str,
    right: bool | None,
) -> Iterator[Row]:
    gpu = _gpu(device, copy)
    for direction, recorded in found:
        taken, spread = gpu_launches.seconds(recorded.again, device == "cuda")
        launch = gpu_model.look_at(recorded, shape, dtype.itemsize)
        predicted = gpu_model.predict(launch, gpu) if gpu else None
        yield Row(
            str(shape), direction, gpu_model.name_of(recorded), varied, recorded.programs,
            launch.waves(gpu) if gpu else None, recorded.warps, recorded.stages, taken * 1e3, spread,
            *_rates(launch.moved, taken, copy), predicted.seconds * 1e3 if predicted else None,
            predicted.binds if predicted else None, right,
        )  # fmt: skip


def _rates(moved: int, taken: float, copy: float) -> tuple[float | None, float | None, float | None]:
    return (moved / 1e6, moved / taken / 1e9, moved / taken / copy) if moved else (None, None, None)


def _gpu(device: str, copy: float) -> gpu_model.Gpu | None:
    """The model's GPU that this one is, with the bandwidth of this run; the last one for a dry run."""
    if device != "cuda":
        return gpu_model.GPUS[-1]
    name = torch.cuda.get_device_name()
    return next((gpu._replace(copy=copy) for gpu in gpu_model.GPUS if gpu.name in name), None)


def profiled(shape: OpShape, dtype: torch.dtype, copy: float, device: str) -> Iterator[Row]:
    """Rows of the kernels of the backend cuda: the mean of a few calls, by torch's profiler."""
    tensors = gpu_launches.inputs(shape, dtype, device)
    right = is_right(shape, dtype, device, None, "cuda", judged=True)

    def call() -> tuple[Tensor, ...]:
        return gpu_launches.gradients(tensors, "cuda")

    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and event.self_device_time_total:
            taken = event.self_device_time_total / event.count / 1e6
            yield Row(
                str(shape), "", event.key, "", None, None, None, None, taken * 1e3, 0.0, None, None, None, None, None,
                right,
            )  # fmt: skip


def show(title: str, rows: list[Row], terminal: Terminal) -> None:
    def text(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [
        Line((
            r.workload, r.direction, r.kernel[:60], r.varied, text(r.programs, 0), text(r.waves, 2), text(r.stages, 0),
            text(r.ms, 4), text(r.gb_per_s, 0), text(r.of_copy, 2), text(r.predicted_ms, 4), r.binds or "",
            {None: "", True: "yes", False: "NO"}[r.right],
        ), not r.varied)
        for r in rows
    ]  # fmt: skip
    headings = ("workload", "direction", "kernel", "varied", "programs", "waves", "stages", "ms", "GB/s", "of copy")
    terminal.table(title, (*headings, "predicted ms", "binds", "right"), 4, lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="triton", choices=("triton", "cuda"))
    parser.add_argument("--dtype", default="float32,bfloat16", help="comma-separated")
    parser.add_argument("--shapes", default="0,1", help='indices in the set "gpu" of bench.workloads')
    parser.add_argument("--fixed", action="store_true", help="only as users call it: no other stages, no other splits")
    parser.add_argument("--once", action="store_true", help="one call of each, not timed, for a profiler to watch")
    parser.add_argument("--dry", action="store_true", help="compile for sm_90 and launch nothing; Triton only")
    parser.add_argument("--out", type=Path, help="also write JSON and CSV to OUT/<machine>/")
    options = parser.parse_args(arguments)
    if options.dry and options.backend != "triton":
        parser.error(f"--dry with --backend {options.backend}: it is for triton")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in (*gpu_launches.DTYPES, torch.float16)}
    names, numbers = options.dtype.split(","), [str(i) for i in range(len(OP_SHAPES["gpu"]))]
    chosen = options.shapes.split(",")
    for option, given, accepted in (("dtype", names, list(dtypes)), ("shapes", chosen, numbers)):
        if unknown := [x for x in given if x not in accepted]:
            parser.error(f"--{option} must be of {', '.join(accepted)}, got {', '.join(unknown)}")
    device, on_gpu, _ = setup(options.dry)
    compiled = gpu_launches.count_compiled()
    copy = copy_bandwidth(device, on_gpu)
    terminal = Terminal()
    wrong = False
    for name in names:
        dtype = dtypes[name]
        rows: list[Row] = []
        for shape in (OP_SHAPES["gpu"][int(i)] for i in chosen):
            if options.once:
                gpu_launches.gradients(gpu_launches.inputs(shape, dtype, device, values=on_gpu), options.backend)
            elif options.backend == "cuda":
                rows += profiled(shape, dtype, copy, device)
            else:
                rows += measure(shape, dtype, copy, device, not options.fixed)
        if not rows:
            continue
        dry = "" if on_gpu else "; DRY, no times of a GPU"
        show(f"kernels of {options.backend}, {name}; a copy moves {copy / 1e9:.0f} GB/s{dry}", rows, terminal)
        wrong |= any(row.right is False for row in rows)
        if options.out:
            stem = folder(options.out, device) / f"kernels-{options.backend}-{name}"
            written = report.save(stem, {**facts(device, copy), "dtype": name}, rows)
            terminal.print("written: " + ", ".join(map(str, written)))
    if on_gpu:
        torch.cuda.synchronize()
    terminal.print(f"kernels of Triton: {compiled[False]} compiled, {compiled[True]} found in its cache")
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

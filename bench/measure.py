"""Measurement of time and memory. Providers are interleaved in one process; only ratios within a run are meaningful.

On the CPU, a sample is wall time by default. On CUDA, it is the time between two events, recorded before the first and
after the last of several consecutive calls, divided by their number: GPU time if the GPU is the bottleneck, and host
time if kernels run faster than they can be launched. A small call is thus timed as in a loop of such calls, with caches
as the previous call leaves them; nothing is flushed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler; read when torch is imported

import torch
from torch import Tensor
from torch._C._profiler import _EventType

from bench.machine import give_memory_back

Call = Callable[[], object]
SHORTEST = {"cpu": 2e-4, "cuda": 2e-3}
"""Seconds; calls shorter than this are timed in groups."""


def python_calls(call: Call) -> int:
    """Number of Python function calls in a call, including itself."""
    count = 0

    def profile(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@dataclass(frozen=True)
class Timing:
    """Samples of the time of one call, in seconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


@dataclass(frozen=True)
class Limits:
    """Peak rates of the machine, measured with torch; see :class:`Yardsticks`."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: int, least_bytes: int) -> float:
        return max(flops / self.flops_per_second, least_bytes / self.bytes_per_second)


def time_once(call: Call, repeat: int, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean time in seconds of `repeat` calls; on the CPU, by `clock`."""
    if device == "cuda":
        return _time_on_stream(call, repeat)
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def _time_on_stream(call: Call, repeat: int) -> float:
    """Does not synchronise first: the preceding untimed call keeps the stream busy while the first calls are queued."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(repeat):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / repeat


def interleaved(
    calls: dict[str, Call], seconds: float, device: str = "cpu", clock: Callable[[], float] = time.perf_counter
) -> dict[str, Timing]:
    """Times the calls in rounds. In each round every call runs once untimed, to warm up memory and threads, then timed.

    Each round starts with a different call. A call leaves the rounds when it has used its share of `seconds` and has 5
    samples (3 if a single call takes longer than its share).
    """
    share = seconds / len(calls)
    first = {name: time_once(call, 1, device) for name, call in calls.items()}
    repeat = {
        name: 1 if t > 1 else max(1, round(SHORTEST[device] / min(t, time_once(calls[name], 1, device))))
        for name, t in first.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used = dict.fromkeys(calls, 0.0)
    names = list(calls)
    while names:
        names = names[1:] + names[:1]
        for name in list(names):
            call, start = calls[name], time.perf_counter()
            call()
            samples[name].append(time_once(call, repeat[name], device, clock))
            used[name] += time.perf_counter() - start
            enough = 3 if first[name] > share else 5
            if used[name] > share and len(samples[name]) >= enough:
                names.remove(name)
    return {name: Timing(tuple(taken)) for name, taken in samples.items()}


class Yardsticks:
    """Calls that measure the limits of the machine, in the same rounds as the benchmarked calls.

    They are a copy larger than the caches, and large matrix products in the dtype and in float32, of which the faster
    counts.
    """

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        source = torch.randn(1 << (24 if device == "cpu" else 28), device=device)
        target = torch.empty_like(source)
        self._bytes = 2 * source.numel() * source.element_size()
        n = 1024 if device == "cpu" else 8192
        self._flops = 2 * n**3
        self.calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
        for kind in {dtype} if dtype == torch.float64 else {dtype, torch.float32}:
            a = torch.randn(n, n, device=device).to(kind)
            out = torch.empty_like(a)
            self.calls[f"product in {kind}"] = lambda a=a, out=out: torch.mm(a, a, out=out)  # type: ignore[misc]

    def limits(self, times: dict[str, Timing]) -> Limits:
        """The limits, from the times of ``calls``."""
        products = [times[name].median for name in self.calls if name != "copy"]
        return Limits(self._bytes / times["copy"].median, self._flops / min(products))


def peak_extra_bytes(call: Call, device: str) -> int | None:
    """Peak memory of a call in addition to the memory in use before it; None if the system cannot report it."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        give_memory_back()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def peak_live_bytes(call: Callable[[], list[Tensor]], weights_from: int, device: str) -> int:
    """Peak of the total size of live tensors that a call allocates, excluding the gradients of weights.

    The gradients of weights are the results of `call` from index `weights_from` on. The figure is exact: it counts all
    allocations and releases through torch's allocator, by torch operators, compiled code and our kernels. It excludes
    scratch memory that C++ allocates elsewhere (oneDNN and our CPU kernels); :func:`peak_extra_bytes` includes it, and
    also pages of code and of the allocator.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    weights = {x.untyped_storage().data_ptr() for x in results[weights_from:] if x.numel()}
    del results
    events, waiting = [], list(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == device:
            events.append(event)
    events.sort(key=lambda event: event.start_time_ns)
    last = {event.extra_fields.ptr: i for i, event in enumerate(events) if event.extra_fields.alloc_size > 0}
    sizes: dict[int, int] = {}
    live = peak = 0
    for i, event in enumerate(events):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            sizes[address] = 0 if address in weights and last[address] == i else size
            live += sizes[address]
            peak = max(peak, live)
        else:  # tensors allocated before the call are not counted
            live -= sizes.pop(address, 0)
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")

"""Time and memory. Providers are interleaved in one process: only ratios within a run mean something.

On the CPU a sample is wall time. On cuda it is the time between two events that the stream meets before the first and
after the last of several calls made back to back, divided by their number: the GPU's time where it is the slower side,
and the host's where launches cannot be prepared as fast as they run. So a small call is timed as a loop of such calls
takes it, with what the call before left in the caches; nothing is flushed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: no word about each use of the profiler

import torch
from torch import Tensor
from torch._C._profiler import _EventType

from bench.machine import give_memory_back

Call = Callable[[], object]
SHORTEST = {"cpu": 2e-4, "cuda": 2e-3}
"""Seconds: calls shorter than this are timed several at once."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


@dataclass(frozen=True)
class Limits:
    """What this machine does at best: measured with torch, in the dtype that is benchmarked."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, flops: int, least_bytes: int) -> float:
        return max(flops / self.flops_per_second, least_bytes / self.bytes_per_second)


def time_once(call: Call, repeat: int, device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one of `repeat` calls, on the CPU by a clock."""
    if device == "cuda":
        return _time_on_stream(call, repeat)
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def _time_on_stream(call: Call, repeat: int) -> float:
    """Does not wait first: behind an untimed call, the stream finds its work prepared when it meets the first event."""
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
    """Rounds in which each call runs once untimed, to bring its memory and threads back, and once timed.

    Each round starts with another call. A call stops when it has used its share of `seconds` and has 5 samples (3 if
    one lasts longer than its share).
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
    """What the limit of a call is measured with, in the same rounds as the call: a copy that no cache holds, and the
    best large matrix product in the dtype or in float32."""

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
        """From the times of ``calls``."""
        products = [times[name].median for name in self.calls if name != "copy"]
        return Limits(self._bytes / times["copy"].median, self._flops / min(products))


def peak_extra_bytes(call: Call, device: str) -> int | None:
    """Memory that a call needs at its peak beside what lives before it; None where the system does not tell."""
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
    """The most bytes of tensors alive at once that a call allocates, but for gradients of weights, its results from
    `weights_from` on.

    Exact: every allocation and release in torch's allocator is seen, by torch's operators, compiled code and our
    kernels alike. Scratch that C++ takes from elsewhere is not (oneDNN's, and that of our CPU kernels):
    :func:`peak_extra_bytes` has it, with pages of code and of the allocator beside it.
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
        else:  # what was allocated before is no part of it
            live -= sizes.pop(address, 0)
    return peak


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")

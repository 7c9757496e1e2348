"""Replays the launches of a call, which are recorded once per combination of shapes, strides, dtypes and options.

The first call of a function decorated with :func:`planned` runs normally, and its allocations, launches and reductions
are recorded as a plan. Later calls with the same cache key allocate the same buffers and repeat the same launches with
new addresses. The key contains everything that a plan depends on: the shape, strides, dtype, device and address
alignment of each tensor; the other arguments; and whether TF32 is allowed. The autotuner's environment variable is read
only when a call is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from xformer_kernels.backends import tf32_allowed
from xformer_kernels.backends.triton import launch

MOST = 4096
"""Maximum number of plans per function. When it is reached, all of them are discarded."""

_current = threading.local()


class View(NamedTuple):
    """Part of a buffer."""

    buffer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        return buffers[self.buffer].as_strided(self.size, self.stride, self.offset)


class Launch:
    """A launch of a compiled kernel. All arguments are fixed except the addresses, which come first.

    Triton's launcher accepts an address in place of a tensor, and then does not query the driver about it.
    """

    def __init__(self, kernel: Any, compiled: Any, grid: int, places: list[tuple[int, int]], values: tuple[Any, ...]):
        self.kernel, self.compiled, self.grid = kernel, compiled, (grid, 1, 1)
        self.places, self.values = places, values
        self.run, self.handle = compiled.run, (compiled.function, compiled.packed_metadata)

    def __call__(self, addresses: list[int], buffers: Sequence[Tensor], stream: int, hooked: bool) -> None:
        pointers = [addresses[tensor] + offset for tensor, offset in self.places]
        if hooked or self.kernel.pre_run_hooks:
            for hook in self.kernel.pre_run_hooks:
                hook(*pointers, *self.values)
            self.compiled[self.grid](*pointers, *self.values, stream=stream)
        else:
            self.run(*self.grid, stream, *self.handle, None, None, None, *pointers, *self.values)


def _has_hooks() -> bool:
    """Whether something, such as a profiler, has registered a Triton launch hook."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    # chains of hooks by default; a user may have replaced one by a function or None
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Reduction(NamedTuple):
    """``function(source, 0, out=out)``"""

    function: Callable[..., Tensor]
    source: View
    out: View

    def __call__(self, addresses: list[int], buffers: Sequence[Tensor], stream: int, hooked: bool) -> None:
        self.function(self.source.of(buffers), 0, out=self.out.of(buffers))


class Recorder:
    """Records the steps of a call. Every tensor in them must be an argument, a buffer or a view of a buffer."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        self.arguments = arguments
        self.buffers: list[Tensor] = []
        self.steps: list[Launch | Reduction] = []
        self.repeatable = True

    def launched(self, kernel: Any, compiled: Any, grid: int, args: Sequence[Any], constants: dict[str, Any]) -> None:
        places = [self._place(x) for x in args if isinstance(x, Tensor)]
        values = (*args[len(places) :], *(constants[name] for name in kernel.arg_names[len(args) :]))
        self.steps.append(Launch(kernel, compiled, grid, places, values))

    def reduced(self, function: Callable[..., Tensor], source: Tensor, out: Tensor) -> None:
        self.steps.append(Reduction(function, self.view(source), self.view(out)))

    def view(self, t: Tensor) -> View:
        place, offset = self._place(t)
        return View(place - len(self.arguments), tuple(t.shape), t.stride(), offset // t.element_size())

    def _place(self, t: Tensor) -> tuple[int, int]:
        """Index of an argument or, after the arguments, of a buffer; and an offset in bytes."""
        for i, known in enumerate((*self.arguments, *self.buffers)):
            if t is known:
                return i, 0
        for i, buffer in enumerate(self.buffers, len(self.arguments)):
            if t.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                return i, t.data_ptr() - buffer.data_ptr()
        self.repeatable = False
        return 0, 0


class Plan:
    """The recorded steps of a call."""

    def __init__(self, recorder: Recorder, results: Tensor | tuple[Tensor, ...]) -> None:
        self.device = recorder.buffers[0].device
        self.buffers = [(tuple(t.shape), t.dtype) for t in recorder.buffers]
        self.steps = recorder.steps
        self.single = isinstance(results, Tensor)
        self.results: list[int | View] = []
        for t in (results,) if isinstance(results, Tensor) else results:
            whole = [i for i, buffer in enumerate(recorder.buffers) if buffer is t]
            self.results.append(whole[0] if whole else recorder.view(t))

    def run(self, addresses: list[int]) -> Any:
        device = self.device
        buffers = [torch.empty(size, dtype=dtype, device=device) for size, dtype in self.buffers]
        addresses += [t.data_ptr() for t in buffers]
        if launch.is_current(device):
            self._launch(addresses, buffers)
        else:
            with torch.cuda.device(device):
                self._launch(addresses, buffers)
        results = [buffers[x] if isinstance(x, int) else x.of(buffers) for x in self.results]
        return results[0] if self.single else tuple(results)

    def _launch(self, addresses: list[int], buffers: Sequence[Tensor]) -> None:
        stream, hooked = driver.active.get_current_stream(self.device.index), _has_hooks()
        for step in self.steps:
            step(addresses, buffers, stream, hooked)


def planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for functions that take tensors and hashable values and return buffers.

    In Triton's interpreter, which compiles nothing, the function is returned unchanged.
    """
    if launch.INTERPRETING:
        return function
    plans: dict[tuple[Any, ...], Plan | None] = {}

    @wraps(function)
    def call(*args: Any) -> Any:
        key: list[Any] = [args[0].dtype is torch.float32 and tf32_allowed()]
        addresses = []
        for x in args:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                addresses.append(address)
                key += (x.shape, x.stride(), x.dtype, x.device, address % launch.VECTOR_BYTES)
            else:
                key.append(x)
        known = tuple(key)
        plan = plans.get(known)
        if plan is not None:
            return plan.run(addresses)
        if known in plans:
            return function(*args)
        # detach, so that a tensor passed twice is two objects: the next call may pass two different tensors
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        with _recording([x for x in args if isinstance(x, Tensor)]) as recorder:
            results = function(*args)
        if len(plans) >= MOST:
            plans.clear()
        launched = any(isinstance(step, Launch) for step in recorder.steps)
        plans[known] = Plan(recorder, results) if launched and recorder.repeatable else None
        return results

    call.plans = plans  # type: ignore[attr-defined]
    return call


@contextmanager
def _recording(arguments: Sequence[Tensor]) -> Iterator[Recorder]:
    before, _current.recorder = recorder(), Recorder(arguments)
    try:
        yield _current.recorder
    finally:
        _current.recorder = before


@contextmanager
def paused() -> Iterator[None]:
    """Context in which launches are not recorded, because they are not part of the call."""
    before, _current.recorder = recorder(), None
    try:
        yield
    finally:
        _current.recorder = before


def recorder() -> Recorder | None:
    """The recorder of the call that is being recorded in this thread, if any."""
    return getattr(_current, "recorder", None)

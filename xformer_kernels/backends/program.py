"""Sequences of CPU kernels that run in one call, recorded for one input shape.

A function is recorded by calling it with a :class:`Value` instead of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from xformer_kernels.backends import arguments

_LINE = 16  # floats in a cache line
_NOWHERE = (-1, 0)
INPUT, OUTPUT, WORKSPACE = range(3)
"""The memory blocks that a program is called with."""


def _or_null(t: Tensor | None) -> Tensor | int:
    return 0 if t is None else t


class Unrecordable(Exception):
    """Raised while recording a function that calls anything other than kernels."""


class Value:
    """Stands for a contiguous float32 tensor while a program is recorded. Views share its buffer."""

    def __init__(self, recorder: Recorder, shape: Sequence[int], buffer: int) -> None:
        self.recorder, self.shape, self.buffer = recorder, torch.Size(shape), buffer

    def view(self, shape: Sequence[int]) -> Value:
        return Value(self.recorder, shape, self.buffer)

    def flatten(self, first: int, last: int) -> Value:
        shape = self.shape
        return self.view((*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]))

    def contiguous(self) -> Value:
        return self

    def linear(
        self,
        packed: Tensor,
        bias: Tensor | None,
        layer_norm: tuple[Any, ...] | None,
        hard_swish: bool,
        add: Any,
        features: int,
    ) -> Value:
        """See :func:`xformer_kernels.inference.linear`; `features` is the number of output features."""
        *rows, I = self.shape  # noqa: E741
        y = self.recorder.new((*rows, features))
        weight, shift, eps = layer_norm or (None, None, None)
        self.recorder.step(
            "linear", prod(rows), I, features, self, _or_null(weight), _or_null(shift), eps, packed, _or_null(bias),
            hard_swish, _NOWHERE if add is None else add, y,
        )  # fmt: skip
        return y

    def depthwise(self, weight: Tensor, bias: Tensor | None, stride: int, hard_swish: bool) -> Value:
        """See :func:`xformer_kernels.inference.depthwise`."""
        B, H, W, C = self.shape
        y = self.recorder.new((B, -(-H // stride), -(-W // stride), C))
        self.recorder.step(
            "depthwise", B, H, W, C, weight.shape[-1], stride, self, weight, _or_null(bias), hard_swish, y
        )
        return y

    def xfa(self, heads: int, temperature: Tensor, spec: Any) -> Value:
        """XFA of packed q, k and v (B, N, 3 C), to (B, N, C)."""
        B, N, width = self.shape
        D = width // 3 // heads
        y, stats = self.recorder.new((B, N, heads * D)), self.recorder.new((B, heads, D * D + 2 * D))
        self.recorder.step("xfa", B, N, heads, D, *arguments.choices(spec), temperature, self, stats, y)
        return y


class Recorder:
    """The recorded steps, and for each buffer its size and the first and last step that use it."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, tuple[Any, ...]]] = []
        self.sizes: list[int] = []
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def new(self, shape: Sequence[int]) -> Value:
        self.sizes.append(-(-prod(shape) // _LINE) * _LINE)
        return Value(self, shape, len(self.sizes) - 1)

    def step(self, name: str, *args: Any) -> None:
        for value in args:
            if isinstance(value, Value):
                self.first.setdefault(value.buffer, len(self.steps))
                self.last[value.buffer] = len(self.steps)
        self.steps.append((name, args))

    def offsets(self, placed: Sequence[int]) -> tuple[dict[int, int], int]:
        """Offsets in the workspace of all buffers except `placed`, and the size of the workspace.

        Each buffer gets the lowest offset that is free from its first to its last use.
        """
        found: dict[int, int] = {}
        for buffer in (b for b in self.first if b not in placed):
            start = 0
            for other in sorted(found, key=lambda b: found[b]):
                if self.last[other] < self.first[buffer]:
                    continue
                if start + self.sizes[buffer] <= found[other]:
                    break
                start = max(start, found[other] + self.sizes[other])
            found[buffer] = start
        return found, max((found[b] + self.sizes[b] for b in found), default=0)


class Program:
    """A recorded function of one contiguous tensor.

    Args:
        calls: an empty ``_C.Program``, to which the steps are added. It reads parameters by address; this object keeps
            them alive.
        shape: the shape of the input.
        function: the function to record; it maps a :class:`Value` to a :class:`Value`.

    Raises:
        Unrecordable: `function` calls anything other than kernels.
    """

    def __init__(self, calls: Any, shape: Sequence[int], function: Callable[[Any], Any]) -> None:
        recorder = Recorder()
        x = recorder.new(shape)
        y = function(x)
        offsets, self.workspace = recorder.offsets((x.buffer, y.buffer))
        self.shape, self.names = y.shape, [name for name, _ in recorder.steps]
        self.keeps = [t for _, args in recorder.steps for t in args if isinstance(t, Tensor)]
        self.calls = calls
        blocks = {x.buffer: INPUT, y.buffer: OUTPUT}

        def place(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.data_ptr()
            if not isinstance(value, Value):
                return value
            return blocks.get(value.buffer, WORKSPACE), offsets.get(value.buffer, 0)

        for name, args in recorder.steps:
            getattr(self.calls, name)(*map(place, args))

"""Timing of layers in both forms, and fitting of a machine's figures to the times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import inference, ops
from xformer_kernels.layer import cost
from xformer_kernels.layer.ops import Operands
from xformer_kernels.spec import Spec

FORMS = ("gram", "direct")
COARSEST = 1e-5
"""Clock resolution in seconds; with a coarser clock nothing is measured."""
PROBES = ((1, 784, 64, 4), (1, 784, 192, 6), (8, 196, 128, 4), (1, 2304, 128, 4), (1, 196, 384, 8), (1, 16384, 48, 1))
"""(B, N, C, H) of the layers that the figures are fitted to: each figure is a large part of the time of one of them."""
BUSY = 0.2
"""Relative root mean square error of the fit above which the machine is assumed to be busy with other work."""
LONGEST = 0.6
"""Seconds after which no further round of probes is started, except for the first three."""


AGREED, ROUNDS = 1.03, 4
LEAST, ENOUGH = 0.06, 1.0
"""Seconds spent timing one layer: times are not trusted before LEAST, and no round is started after ENOUGH."""


def usable_clock() -> bool:
    return time.get_clock_info("perf_counter").resolution <= COARSEST


def clock() -> Callable[[], float]:
    """With a single thread, the clock of its CPU time, which excludes other threads; otherwise wall time."""
    alone = torch.get_num_threads() == 1 and time.get_clock_info("thread_time").resolution <= COARSEST
    return time.thread_time if alone else time.perf_counter


def seconds(checked: Callable[..., Any], call: Any, o: Operands, block: tuple[Any, ...], form: str) -> float:
    """The time of one call of a layer in a form, with backward if autograd records the call.

    Does not affect the operands' gradients, hooks and graph, nor saved tensor hooks and the random number generator.
    """
    leaves = Operands(*(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in o))  # type: ignore[arg-type]
    wanted = [t for t in leaves if t is not None and t.requires_grad] if ops.wants_grad(*o) else []

    def as_it_is(t: Tensor) -> Tensor:
        return t

    with (
        torch.random.fork_rng(devices=[], enabled=call.dropout_p > 0),
        torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is),
    ):
        now = clock()
        begun = now()
        y = checked(call._replace(form=form), leaves, *block)()[0]
        if wanted:
            torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)
        return now() - begun


def faster(seconds: Callable[[str], float], estimated: float) -> str:
    """The form whose fastest call takes less time. The forms are called in turn.

    Stops when the two fastest calls of each form agree, or after ENOUGH seconds. If each form was called only once by
    then, `estimated`, the ratio of the costs, counts as much as the measured ratio.
    """
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    for i in range(100):
        for form in FORMS[:: 1 if i % 2 else -1]:
            taken[form] = sorted([*taken[form], seconds(form)])
        spent = sum(map(sum, taken.values()))
        if spent > ENOUGH or spent == 0:
            break
        if i + 1 >= ROUNDS and spent > LEAST and all(b <= AGREED * a for a, b, *_ in taken.values()):
            break
    gram, direct = (taken[form][0] for form in FORMS)
    if gram == direct:  # also if the clock does not advance
        return "gram" if estimated < 1 else "direct"
    return "gram" if gram * (1 if i else estimated) < direct else "direct"


def measure(dtype: torch.dtype = torch.float32) -> cost.Machine | None:
    """The figures whose estimates best fit the smallest measured times of PROBES in both forms.

    None if no figures fit, or the clock did not advance.
    """
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        calls = _probes(dtype)
        least = [math.inf] * len(calls)
        begun, rounds = time.perf_counter(), 0
        while rounds < 3 or (rounds < 12 and time.perf_counter() - begun < LONGEST):
            for i, (_, call) in enumerate(calls):
                least[i] = min(least[i], call())
            rounds += 1
    return fit([(work, taken) for (work, _), taken in zip(calls, least, strict=True)]) if min(least) > 0 else None


def _probes(dtype: torch.dtype) -> list[tuple[cost.Work, Callable[[], float]]]:
    """The work of each probe, and a function that times it: both forms of a layer, and a product by our kernels."""
    from xformer_kernels.layer.call import Call  # imported here because these modules import the figures
    from xformer_kernels.layer.functional import checked

    random = torch.Generator().manual_seed(0)
    calls: list[tuple[cost.Work, Callable[[], float]]] = []
    for B, N, C, H in PROBES:
        x, qkv, proj = (
            torch.randn(size, generator=random, device="cpu").to(dtype) for size in ((B, N, C), (3 * C, C), (C, C))
        )
        o = Operands(x, qkv / C**0.5, None, torch.ones(H, dtype=dtype, device="cpu"), proj / C**0.5, None)
        call = Call(Spec(), None, 0.0, "auto", None, "auto")
        s = cost.Shape(B, N, C, H, C, C, x.element_size(), False)
        for form, work in zip(FORMS, (cost.work_of_gram(s), cost.work_of_direct(s)), strict=True):
            calls.append((work, partial(seconds, checked, call, o, (), form)))
        if inference.asked(x, qkv):
            calls.append((cost.work_of_linear(B * N, C, 3 * C), partial(_seconds_of_linear, x, o.qkv_weight)))
    return calls


def _seconds_of_linear(x: Tensor, weight: Tensor) -> float:
    packed = inference.KERNELS.pack_linear(weight)
    now = clock()
    begun = now()
    inference.KERNELS.linear(x, weight, None, None, None, False, None, packed)
    return now() - begun


def fit(times: list[tuple[cost.Work, float]]) -> cost.Machine | None:
    """Least squares fit of relative errors, by multiplicative updates that keep figures positive (Lee and Seung).

    A figure that no probe depends on keeps its built-in ratio to ``matmul``. None if the remaining error is above BUSY.
    """
    first = cost.built_in("cpu")
    units = [1 / first.matmul, 1 / first.kernel, 1 / first.linear, 1 / first.bandwidth, first.start]
    rows = [[amount * unit / taken for amount, unit in zip(work, units, strict=True)] for work, taken in times]
    n = range(len(units))
    wanted = [sum(row[i] for row in rows) for i in n]
    square = [[sum(row[i] * row[j] for row in rows) for j in n] for i in n]
    slower = [1.0 for _ in n]
    for _ in range(3000):
        for i in n:
            if wanted[i]:
                slower[i] *= wanted[i] / sum(square[i][j] * slower[j] for j in n)
    slower = [x if wanted[i] else slower[0] for i, x in enumerate(slower)]
    errors = [sum(x * part for x, part in zip(slower, row, strict=True)) - 1 for row in rows]
    if sum(error * error for error in errors) > BUSY**2 * len(errors):
        return None
    matmul, kernel, linear, bandwidth, start = (x * unit for x, unit in zip(slower, units, strict=True))
    return cost.Machine(1 / matmul, 1 / kernel, 1 / linear, 1 / bandwidth, start)

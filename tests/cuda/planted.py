"""Runs checks of the emulated kernels with one of their steps left out after the other: see test_planted.py.

    python planted.py FOLDER FAULT...

FOLDER has the module; without faults it is an ordinary one. Prints, as JSON, what found a fault in which kernels:
{fault: {part: [accuracy | bits | launch]}}, with the kernels as they are under the name "none".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emulated
import guarded
import torch
from torch import Tensor

SEEDS = (0, 1, 2)

# A call of the kernels in question, and what judges its results; both take no faults into account.
Case = tuple[Callable[[], tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], None]]


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """For launches, which look there each time."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def xfa_cases(path: str) -> tuple[list[Case], list[Case]]:
    """Of forward and of backward, on statistics that a whole forward wrote."""
    from cases import RESULTS, Config, make_problem

    from xformer_kernels.backends import cuda
    from xformer_kernels.testing import assert_close

    configs = [Config(), Config("key_value"), *([Config(norm="feature")] if path == "two passes" else [])]
    shapes = ((2, 21, 2, 5), (1, 300, 1, 35)) if path == "two passes" else ((2, 21, 2, 5), (2, 150, 1, 36))
    forward, backward = [], []
    for shape in shapes:
        for config in configs:
            problem = make_problem(shape, config, masked=config.map == "key_value")
            eager, oracle, terms = problem.eager(), problem.oracle(), problem.terms()
            inputs = (problem.q, problem.k, problem.v, problem.temperature)
            options = (problem.token_mask, config.spec)

            def judge(names, results, eager=eager, oracle=oracle, terms=terms):
                for name, result in zip(names, results, strict=True):
                    assert_close(result, eager[name], oracle[name], name, terms.get(name))

            def run_forward(inputs=inputs, options=options):
                cuda.path = path
                out, stats = cuda.xfa_forward(*inputs, *options)
                return out.transpose(1, 2), stats

            _, stats = run_forward()

            def run_backward(dout=problem.dout, inputs=inputs, stats=stats, options=options):
                cuda.path = path
                dqkv, dtemperature = cuda.xfa_backward(dout, *inputs, stats, *options)
                return (*dqkv.transpose(2, 3).unbind(0), dtemperature)

            forward.append((run_forward, lambda results, judge=judge: judge(("out",), results[:1])))
            backward.append((run_backward, partial(judge, RESULTS[1:])))
    return forward, backward


def primitive_cases() -> dict[str, list[Case]]:
    """Of gram and of channel_mix, whose tokens end where memory does; and of the same by fragments."""
    from cases import randn

    from xformer_kernels import reference
    from xformer_kernels.backends import cuda
    from xformer_kernels.testing import assert_close

    a, b = (guarded.like(randn(2, 2, 21, features, seed=features), end=True) for features in (5, 9))
    weight, wide_weight = randn(2, 2, 7, 5, seed=3), randn(1, 1, 36, 36, seed=4)

    def judge(reference_of, double, results):
        for result, eager, oracle in zip(results, reference_of, double, strict=True):
            assert_close(result, eager, oracle, "result")

    wide = [guarded.like(randn(1, 1, 300, 36, seed=seed), end=True) for seed in (1, 2)]

    gram = reference.gram(a, b), reference.gram(a.double(), b.double())
    wide_gram = reference.gram(*wide), reference.gram(*(x.double() for x in wide))
    mix = (reference.channel_mix(a, weight),), (reference.channel_mix(a.double(), weight.double()),)
    wide_mix = (
        (reference.channel_mix(wide[0], wide_weight),),
        (reference.channel_mix(wide[0].double(), wide_weight.double()),),
    )
    nothing = (None,) * 5
    return {
        "gram": [(lambda: cuda.gram(a, b, False, None), partial(judge, *gram))],
        "fragment_gram": [(lambda: cuda.gram(*wide, False, None), partial(judge, *wide_gram))],
        "fragment_mix": [
            (
                lambda: (cuda.channel_mix(wide[0], wide_weight, *nothing).transpose(1, 2),),
                partial(judge, *wide_mix),
            )
        ],
        "channel_mix": [(lambda: (cuda.channel_mix(a, weight, *nothing).transpose(1, 2),), partial(judge, *mix))],
    }


def findings(run: Callable[[], tuple[Tensor, ...]], judge: Callable[[tuple[Tensor, ...]], None]) -> set[str]:
    """Everything that is wrong with a call, under several orders of its threads."""
    from xformer_kernels.testing import assert_bitwise

    found: set[str] = set()
    first = None
    for seed in SEEDS:
        with environment(XK_EMULATION_SEED=str(seed)):
            try:
                results = run()
            except RuntimeError:
                found.add("launch")
                continue
        try:
            judge(results)
        except AssertionError:
            found.add("accuracy")
        first = results if first is None else first
        try:
            for one, other in zip(first, results, strict=True):
                assert_bitwise(one, other, "result")
        except AssertionError:
            found.add("bits")
    return found


def report(*faults: str) -> dict[str, dict[str, list[str]]]:
    """What is found without a fault and with each of these."""
    parts = {}
    for path in ("one launch", "two passes"):
        parts[f"{path}, forward"], parts[f"{path}, backward"] = xfa_cases(path)
    parts |= primitive_cases()
    result = {}
    for fault in ("none", *faults):
        with environment(XK_EMULATION_PLANTED=fault):
            found = {part: set().union(*(findings(*case) for case in cases)) for part, cases in parts.items()}
        result[fault] = {part: sorted(kinds) for part, kinds in found.items() if kinds}
    return result


if __name__ == "__main__":
    emulated.load(Path(sys.argv[1]))
    torch.set_num_threads(1)
    print(json.dumps(report(*sys.argv[2:])))

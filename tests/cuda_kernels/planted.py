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

    shapes = ((2, 21, 2, 5), (1, 300, 1, 36)) if path == "two passes" else ((2, 21, 2, 5), (2, 150, 1, 36))
    forward, backward = [], []
    for shape in shapes:
        for config in (Config(), Config("key_value")):
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


def pass_cases() -> dict[str, list[Case]]:
    """Of each of the two passes. A fault of the first is seen in the norms that it adds up. The second one's end of the
    tokens is seen in products with a map that the first computes from whole steps."""
    from cases import randn

    from xformer_kernels.backends import cuda
    from xformer_kernels.spec import Spec
    from xformer_kernels.testing import assert_close

    q, k, v = (guarded.like(randn(1, 1, 300, 36, seed=seed), end=True) for seed in (1, 2, 3))
    few = [guarded.like(randn(1, 1, 24, 24, seed=seed), end=True) for seed in (1, 2, 3)]
    one = torch.ones(1)

    def sums():
        cuda.path = "two passes"
        _, stats = cuda.xfa_forward(q, k, v, one, None, Spec(activation="identity"))
        return (stats[..., -72:],)

    def products():
        cuda.path = "two passes"
        out, _ = cuda.xfa_forward(*few, one, None, Spec(norm="none", activation="identity"))
        return (out.transpose(1, 2),)

    def norms(x, y):
        return torch.cat((x.norm(dim=2), y.norm(dim=2)), -1)

    def judge(eager, oracle, results):
        assert_close(results[0], eager, oracle, "result")

    def product(q, k, v):
        return v @ (k.mT @ q)

    return {
        "sums": [(sums, partial(judge, norms(q, k), norms(q.double(), k.double())))],
        "products": [(products, partial(judge, product(*few), product(*(x.double() for x in few))))],
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
    parts |= pass_cases()
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

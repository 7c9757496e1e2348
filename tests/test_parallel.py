"""Tokens split over 2 and 3 processes, compared with one process: outputs, gradients, errors, bytes sent."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import rank_modules
import torch
from rank_cases import CASES, LAYER_WEIGHTS, Case
from rank_modules import MODELS, PAIRS
from rank_refusals import REFUSALS
from ranks import COUNTED

import xformer_kernels as xk
from xformer_kernels import parallel, reference
from xformer_kernels.testing import assert_close

ROOT = Path(__file__).parents[1]
LIMIT = 120
"""Seconds after which processes are considered hanging."""

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


def run_ranks(count, command, **environment):
    """The outputs of `count` processes, started with `command(rank)`; all must end within the limit."""
    # without OMP_NUM_THREADS of the caller: ranks set their number of threads themselves
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), **environment}
    processes = [
        subprocess.Popen(command(rank), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(count)
    ]
    end = time.monotonic() + LIMIT
    try:
        printed = [p.communicate(timeout=max(1, end - time.monotonic()))[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    for rank, (p, text) in enumerate(zip(processes, printed, strict=True)):
        assert p.returncode == 0, f"rank {rank}:\n{text[-4000:]}"
    return printed


class Ranks(list):
    """The outcomes of all ranks, by name."""

    def of(self, name):
        outcomes = [rank[name] for rank in self]
        for rank, outcome in enumerate(outcomes):
            assert "error" not in outcome, f"rank {rank}: {outcome['trace']}"
        return [outcome["result"] for outcome in outcomes]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """``outcomes(count)``: the outcomes of `count` ranks, which run once for all test processes."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # shared by the test processes

    @cache
    def run(count):
        folder = base / f"ranks{count}"
        script = str(ROOT / "tests" / "ranks.py")
        failure = folder / "failure.txt"
        with open(base / f"ranks{count}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                folder.mkdir()
                try:
                    run_ranks(count, lambda rank: [sys.executable, script, str(rank), str(count), str(folder)])
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    failure.write_text(str(error))
        if failure.exists():
            return RuntimeError(failure.read_text())
        return Ranks(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count))

    def run_once(count):
        result = run(count)
        if isinstance(result, Exception):
            pytest.fail(str(result))
        return result

    return run_once


@pytest.fixture(params=[pytest.param(2, marks=pytest.mark.nightly), 3], ids=["2 ranks", "3 ranks"])
def ranks(request, outcomes):
    return outcomes(request.param)


def joined(results):
    """The concatenated tokens of the ranks, and the sums of their gradients of weights."""
    whole = {name: torch.cat([r[name] for r in results], 1) for name in ("out", "dx") if name in results[0]}
    for name in results[0].keys() - whole.keys():
        total = sum(r[name].double() for r in results)
        whole[name] = total.to(results[0][name].dtype)
    return whole


def check(case, results):
    whole, eager, oracle = joined(results), case.by_reference(None), case.by_reference(torch.float64)
    assert whole.keys() == oracle.keys()
    for name, expected in oracle.items():
        assert whole[name].dtype == eager[name].dtype, name
        assert_close(whole[name], eager[name], expected, name)


@pytest.mark.one_in(2, slow=False)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_one_process(case, ranks):
    check(case, ranks.of(f"case {case}"))


def test_ranks_alone_would_choose_different_forms():
    case = next(c for c in CASES if c.form == "auto")
    x, _, w, _ = case.inputs()
    forms = set()
    for shard in x.split(case.shards(2), 1):
        forms.add(xk.explain_layer(shard.requires_grad_(), *(w[name] for name in LAYER_WEIGHTS)).form)
    assert forms == {"gram", "direct"}


@pytest.mark.parametrize("name", REFUSALS)
def test_error_of_one_rank_is_raised_on_every_rank(name, ranks):
    outcomes = [rank[f"refusal {name}"] for rank in ranks]
    for outcome in outcomes:
        assert outcome.get("error") in {t.__name__ for t in REFUSALS[name].types}, outcome
        assert outcome["seconds"] < 10
        assert outcome["in_step"]
    assert any(REFUSALS[name].words in outcome["words"].lower() for outcome in outcomes), outcomes


def expected_of_network(loss):
    model = rank_modules.network()
    x, target = rank_modules.network_input()
    loss(model(x) - target).backward()
    return rank_modules.grads_of(model)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_network(name, ranks):
    """The loss is a sum over all tokens, except for the mean; DDP and FSDP2 divide by the number of ranks."""
    loss = (lambda d: d.square().mean()) if name == "ddp_mean" else (lambda d: d.square().sum())
    expected = expected_of_network(loss)
    for grads in ranks.of(f"model {name}"):
        assert grads.keys() == expected.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", PAIRS)
def test_same_as_one_process(name, ranks):
    for pairs in ranks.of(f"pairs {name}"):
        for key, (ours, alone) in pairs.items():
            assert ours.dtype == alone.dtype
            tolerance = 1e-9 if ours.dtype == torch.float64 else 0.02
            torch.testing.assert_close(
                ours, alone, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
            )  # fmt: skip


def test_compiled_calls_are_outside_of_graphs(outcomes):
    expected = expected_of_network(lambda d: d.square().sum())
    for grads in outcomes(2).of("model compiled"):
        for key, grad in grads.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-9)


def test_export_with_a_group_is_refused(outcomes):
    for rank in outcomes(2):
        assert rank["exported"]["error"] == "NotImplementedError"
        assert "export without group" in rank["exported"]["words"]


def test_direct_form_can_be_differentiated_twice(ranks):
    case = Case("direct", dtype=torch.float64)
    x, dout, weights, _ = case.inputs()
    expected = rank_modules.second(lambda x, w: reference.xfa_layer(x, *w.values()), x, dout, weights)
    for name, result in joined(ranks.of("twice")).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_group_of_some_ranks(outcomes):
    inside = [rank["pair"] for rank in outcomes(3)]
    outside = inside.pop(1)
    assert outside["error"] == "TypeError" and "not one of its ranks" in outside["words"]
    check(Case(), [outcome["result"] for outcome in inside])


def payload(case):
    """Bytes that a rank passes to each kind of collective, by the formulas of docs/token_parallel.md."""
    B, C, H = case.B, case.C, case.H
    D, size = C // H, reference.accumulate_dtype(case.dtype).itemsize
    gram, direct = (C + 1) + (C * C + C + 1) + (C * C + C), 2 * (H * D * D + 2 * H * D)
    numbers = gram if case.form == "gram" else direct
    counts = {"all_reduce": B * numbers * size, "all_gather": 8 * (len(parallel._SHOWN) + len(parallel._CODED) + 1)}
    if case.dropout_p:
        counts["broadcast"] = B * H * D * D * size
    return counts


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_do_not_depend_on_the_number_of_tokens(name, ranks):
    for seen in ranks.of(f"count {name}"):
        assert seen == payload(COUNTED[name])


@pytest.mark.parametrize("launch", ["python", pytest.param("torchrun", marks=pytest.mark.nightly)])
def test_example_agrees_with_one_process_and_the_formula(launch):
    example = [str(ROOT / "examples" / "token_parallel.py"), "--height", "40", "--width", "50"]
    python = [sys.executable, *example, "--ranks", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *example]
    (text,) = run_ranks(1, lambda _: python if launch == "python" else torchrun)
    assert len(re.findall("output and all gradients agree with one process", text)) == 2, text
    received = re.findall(r"received (\d+) B in the step, by the formula (\d+) B", text)
    assert len(received) == 2 or "bytes not counted" in text, text
    for counted, formula in received:
        # besides the sums: headers, and the integers that ranks compare
        assert int(formula) <= int(counted) <= int(formula) + 5000, text


def test_table_of_bytes_follows_the_formula():
    text = (ROOT / "docs" / "token_parallel.md").read_text()
    C, H = 384, 8
    gram, direct = (payload(Case(form, B=1, C=C, H=H))["all_reduce"] for form in ("gram", "direct"))
    rows = re.findall(r"^\| ([\d,]+) \| (.*) \|$", text, re.M)
    assert len(rows) >= 4
    for tokens, cells in rows:
        keys_and_values = 2 * 2 * int(tokens.replace(",", "")) * C * 2
        for ranks, cell in zip((2, 8, 64), cells.split(" | "), strict=True):
            expected = [2 * gram, 2 * direct, keys_and_values]
            assert cell == " / ".join(f"{(ranks - 1) / ranks * b / 1e6:,.2f}" for b in expected)

"""The benchmark's workloads, providers and output; no times."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
GB = 10**9
# a GPU of 80 GB, beside the inputs, the caches of the allocator and the pools of CUDA graphs
MOST = 60 * GB


@pytest.fixture
def load(monkeypatch):
    """``load("providers")`` imports the module of bench/ that lies beside these tests."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.partition(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)
    return lambda name: importlib.import_module(f"bench.{name}")


def test_shapes_of_a_gpu_fill_its_caches_and_fit_its_memory(load):
    workloads = load("workloads")
    for shape in workloads.OP_SHAPES["gpu"]:
        assert shape.check_bytes <= MOST, f"{shape}: {shape.check_bytes / GB:.0f} GB"
        assert shape.least_bytes(False, torch.bfloat16.itemsize) > 2 * 10**8, shape
    for shape in workloads.OP_SHAPES["gpu-latency"]:
        assert shape.B == 1, shape


def test_every_kind_has_the_sets_that_are_run_by_default(load):
    main, workloads = load("__main__"), load("workloads")
    for sets, _, _ in main.KINDS.values():
        for names in workloads.DEFAULT.values():
            assert set(names) <= set(sets)
            assert all(sets[name] for name in names)
        for shapes in sets.values():
            assert len(set(map(str, shapes))) == len(shapes)


def test_op_cases(load, need_backend):
    need_backend("cpp")
    providers, workloads = load("providers"), load("workloads")
    wanted = {"eager", "compile+graphs", "cpp", "triton+graphs", "sdpa"}
    cases = list(providers.op_cases(workloads.OpShape(1, 16, 2, 8), torch.float32, "cpu", wanted))
    assert [case.provider for case in cases] == ["eager", "cpp", "sdpa"]  # graphs are for cuda
    for case in cases:
        case.check()
        case.forward()
        case.both()


def test_layer_cases(load, need_backend):
    need_backend("cpp")
    pytest.importorskip("timm", reason="the layer that is compared with is timm's")
    providers, workloads = load("providers"), load("workloads")
    cases = list(providers.layer_cases(workloads.LayerShape(1, 16, 16, 2), torch.float32, "cpu", {"eager", "cpp"}))
    assert [case.provider for case in cases] == ["eager", "cpp"]
    for case in cases:
        case.check()
        case.forward()
        case.both()


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_run(rich, load, monkeypatch, capsys, tmp_path):
    """Everything from the arguments to the files, with what is optional and without it."""
    if rich:
        pytest.importorskip("rich", reason="tables are drawn with rich where it is installed")
    else:
        for name in ("rich.console", "rich.progress", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
    main, report, workloads = load("__main__"), load("report"), load("workloads")
    monkeypatch.setattr(report, "can_plot", lambda: False)
    monkeypatch.setitem(main.KINDS["op"][0], "test", (workloads.OpShape(1, 16, 1, 8), workloads.OpShape(1, 8, 2, 4)))
    status = main.main(
        ["op", "--shapes", "test", "--providers", "eager,sdpa", "--seconds", "0.01", "--out", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "(1,16,1,8)" in printed and "sdpa" in printed and "no plots" in printed
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["op-cpu-float32-test.csv", "op-cpu-float32-test.json"]


def test_what_does_not_fit_the_time_is_said(load, monkeypatch, capsys):
    main, workloads = load("__main__"), load("workloads")
    monkeypatch.setitem(main.KINDS["op"][0], "test", (workloads.OpShape(1, 16, 1, 8),))
    assert main.main(["op", "--shapes", "test", "--stop-after", "1e-9"]) == 3
    assert "NOT MEASURED" in capsys.readouterr().out


def test_wrong_and_failing_providers_are_told_apart_from_right_ones(load, capsys):
    main, providers = load("__main__"), load("providers")

    def wrong():
        raise AssertionError("off by one")

    def broken():
        raise RuntimeError("out of memory")

    told = {}
    for name, check, right in (("a", lambda: None, True), ("b", wrong, False), ("c", broken, False)):
        case = providers.Case(name, lambda: None, None, check)
        assert main._right(case, "shape", told, "cpu") == right
    assert "not timed: off by one" in told["b", "shape"]
    assert "failed: RuntimeError: out of memory" in told["c", "shape"]

"""Workloads, providers and output of the benchmarks; no times are checked."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from xformer_kernels import dispatch
from xformer_kernels.integrations import replace_attention

ROOT = Path(__file__).parents[1]
GB = 10**9
# for a GPU of 80 GB, minus inputs, caches of the allocator and pools of CUDA graphs
MOST = 60 * GB


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
            assert sets[names[0]]
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


@pytest.mark.parametrize("kind", ["LayerShape", "BlockShape"])
def test_layer_cases(kind, load, need_backend):
    need_backend("cpp")
    pytest.importorskip("timm", reason="the layer that is compared with is timm's")
    modules, workloads = load("modules"), load("workloads")
    wanted = {"eager", "cpp", "cpp-gram", "cpp-direct", "sdpa"}
    shape = getattr(workloads, kind)(1, 16, 16, 2)
    cases = list(modules.layer_cases(shape, torch.float32, "cpu", wanted))
    expected = ["eager", "cpp", "cpp-gram", "cpp-direct"]
    assert [case.provider for case in cases] == expected + (["sdpa"] if kind == "LayerShape" else [])
    for case in cases:
        errors = case.check()
        assert max(errors) < 1e-5 and (max(errors) > 0 or case.provider == "eager")
        case.forward()
        case.both()
    assert [case.form() for case in cases[2:4]] == ["gram", "direct"]
    assert cases[1].form() in modules.FORMS


def test_named_forms_run(load, need_backend):
    need_backend("cpp")
    pytest.importorskip("timm", reason="the layer that is compared with is timm's")
    modules, workloads = load("modules"), load("workloads")
    for shape in (workloads.LayerShape(1, 16, 16, 2), workloads.BlockShape(1, 16, 16, 2)):
        for case in modules.layer_cases(shape, torch.float32, "cpu", {"cpp-gram", "cpp-direct"}):
            with dispatch.record() as ran:
                case.both()
            assert ("cpp", f"{'layer' if case.provider == 'cpp-gram' else 'xfa'}_backward") in ran


def test_layers_and_blocks_have_the_same_shapes(load):
    sets = load("workloads").LAYER_SHAPES
    assert [f"block {shape}" for shape in sets["main"]] == list(map(str, sets["blocks"]))
    assert [shape.N for shape in sets["main"] if shape.many] == [65536, 16384, 3136]


@pytest.mark.parametrize("backward", [False, True])
def test_limit_of_a_layer_is_that_of_the_cheaper_form(backward, load):
    LayerShape = load("workloads").LayerShape
    long, short = LayerShape(1, 65536, 64, 4), LayerShape(16, 8, 240, 4)
    assert long.flops(backward) == long.gram_flops(backward) < long.direct_flops(backward) / 2
    assert short.flops(backward) == short.direct_flops(backward) < short.gram_flops(backward)


def test_peak_of_live_tensors(load):
    """Temporaries count; tensors allocated before the call and gradients of weights do not."""
    measure = load("measure")
    x = torch.ones(1000, 64, requires_grad=True)
    w = torch.ones(64, 64, requires_grad=True)

    def temporary():
        torch.empty(5000)
        return [torch.empty(1000)]

    def gradients():
        return list(torch.autograd.grad(x @ w, (x, w), x.detach()))

    gradients()
    assert measure.peak_live_bytes(temporary, 1, "cpu") == 4 * 5000
    assert measure.peak_live_bytes(lambda: [torch.empty(5000), torch.empty(1000)], 1, "cpu") == 4 * 5000
    numbers = 2 * x.numel()  # the product, kept alive by the tuple of arguments, and dx
    assert measure.peak_live_bytes(gradients, 1, "cpu") == 4 * numbers
    assert measure.peak_live_bytes(gradients, 2, "cpu") > 4 * numbers


def test_peak_of_the_gram_form_is_its_results(load, need_backend):
    """Allocations of our kernels are counted: y, dx, and statistics, whose size does not depend on the tokens."""
    need_backend("cpp")
    pytest.importorskip("timm", reason="the layer that is compared with is timm's")
    measure, modules, workloads = load("measure"), load("modules"), load("workloads")
    shape = workloads.LayerShape(1, 4096, 16, 2)
    given = modules.layer_cases(shape, torch.float32, "cpu", {"eager", "cpp-gram"})
    eager, gram = (measure.peak_live_bytes(case.both, case.weights_from, "cpu") for case in given)
    one = 4 * 4096 * 16
    assert 2 * one <= gram < 2.5 * one
    assert eager > 4 * gram


def test_regret(load):
    main, measure = load("__main__"), load("measure")
    times = {name: measure.Timing((ms,)) for name, ms in (("eager", 9), ("cpp", 3), ("cpp-gram", 2), ("cpp-direct", 4))}
    assert main._regret("cpp", "direct", times) == 0.5
    assert main._regret("cpp", "gram", times) == 3 / 4 - 1
    assert main._regret("cpp", "gram", {name: times[name] for name in ("cpp", "eager")}) == 3 / 9 - 1
    assert main._regret("cpp", "gram", {"cpp": times["cpp"]}) is None


def test_layers_and_blocks_in_one_run(load, need_backend, monkeypatch, capsys, tmp_path):
    need_backend("cpp")
    pytest.importorskip("timm", reason="the layer that is compared with is timm's")
    main, report, workloads = load("__main__"), load("report"), load("workloads")
    monkeypatch.setattr(report, "can_plot", lambda: False)
    sets = main.KINDS["layer"][0]
    monkeypatch.setitem(sets, "main", (workloads.LayerShape(1, 128, 16, 2),))
    monkeypatch.setitem(sets, "blocks", (workloads.BlockShape(1, 128, 16, 2),))
    providers = "eager,cpp,cpp-gram,cpp-direct"
    status = main.main(["layer", "--providers", providers, "--seconds", "0.1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count("worst regret") == 4 and "block (1,128,16,2)" in printed
    for name in ("layer-cpu-float32.json", "layer-cpu-float32-blocks.json"):
        (path,) = tmp_path.glob(f"*/{name}")
        rows = json.loads(path.read_text())["rows"]
        (ours,) = [r for r in rows if (r["provider"], r["direction"]) == ("cpp", "forward+backward")]
        assert ours["form"] in ("gram", "direct") and ours["regret"] > -1 and 0 < ours["memory_of_eager"] < 1


def test_models_report_the_possible_gain(load, need_backend, monkeypatch, capsys, tmp_path):
    need_backend("cpp")
    main, mdta, workloads = load("__main__"), load("mdta"), load("workloads")
    monkeypatch.setattr(mdta, "mdta_48", lambda: mdta.Stack(8, 2, 2))
    monkeypatch.setattr(load("report"), "can_plot", lambda: False)
    monkeypatch.setitem(main.KINDS["model"][0], "test", (workloads.ModelShape("mdta_48", 1, 40),))
    command = ["model", "--shapes", "test", "--providers", "eager,cpp", "--seconds", "0.1", "--out", str(tmp_path)]
    assert main.main(command) == 0
    printed = capsys.readouterr().out
    assert "of its time, so at most" in printed and "worst relative error" in printed
    (path,) = tmp_path.glob("*/*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} == {"eager", "cpp"}
    assert all(row["attention_share"] > 0 and row["gradient_error"] < 1e-5 for row in rows)


@pytest.mark.parametrize("half", [False, True], ids=["attention", "half block"])
def test_replaced_parts(half, load):
    pytest.importorskip("timm", reason="the model is timm's")
    from timm.models.xcit import XCABlock

    modules = load("modules")
    model = torch.nn.Sequential(XCABlock(16, 2), torch.nn.Linear(16, 16)).eval()
    replaced = copy.deepcopy(model)
    replace_attention(replaced if half else replaced[0].attn)
    (part,) = modules.replaced_parts(model, replaced)
    assert (part.attn if half else part) is model[0].attn
    if half:
        x = torch.randn(1, 9, 16)
        expected = x + model[0].gamma1 * model[0].attn(model[0].norm1(x))
        torch.testing.assert_close(part(x), expected)


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_run(rich, load, monkeypatch, capsys, tmp_path):
    """A whole run, from arguments to files, with and without rich."""
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


def test_workloads_without_time_are_reported(load, monkeypatch, capsys):
    main, workloads = load("__main__"), load("workloads")
    monkeypatch.setitem(main.KINDS["op"][0], "test", (workloads.OpShape(1, 16, 1, 8),))
    assert main.main(["op", "--shapes", "test", "--stop-after", "1e-9"]) == 3
    assert "NOT MEASURED" in capsys.readouterr().out


def test_wrong_and_failing_providers_are_reported(load, capsys):
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


def test_table_of_layers(load, monkeypatch, tmp_path):
    table = load("table")
    monkeypatch.setattr("bench.cells.ROOT", tmp_path)
    facts = dict(machine="m", threads=2, versions={"torch": "2"}, date="2026-01-01T", commit="c", copy_gb_per_s=9.6)
    for suffix, prefix in (("", ""), ("-blocks", "block ")):
        rows = [
            dict(
                workload=f"{prefix}({N},{N},16,2)", direction=direction, provider="cpp", speedup_over_eager=N / 32,
                speedup_over_compile=None if N == 64 else 1.5, memory_of_eager=memory, regret=N / 1e4, form=form,
            )
            for N in (64, 128, 512)
            for direction, memory, form in (("forward", None, "direct"), ("forward+backward", 0.25, "gram"))
        ]  # fmt: skip
        path = tmp_path / f"layer-cpu-float32{suffix}.json"
        assert "Not measured yet." in table.render_layers(tmp_path)
        path.write_text(json.dumps({**facts, "matmul_gflop_per_s": 99.0, "rows": rows}))
    text = table.render_layers(tmp_path)
    assert "worst regret is 5%, at block (512,512,16,2) forward" in text
    assert "| (64,64,16,2) | 2.00 | - | 2.00 | - | 0.25 | direct, then gram |" in text
    assert "| mean of blocks where N >= 8C | 8.00 | 1.50 | 8.00 | 1.50 | 0.25 | |" in text
    readme = f"a\n{table.BEGIN}\n1\n{table.END}\nb\n{table.LAYERS}\n2\n{table.END}\nc\n"
    replaced = table.replace(readme, text)
    assert replaced == f"a\n{table.BEGIN}\n1\n{table.END}\nb\n{text}\nc\n"


@pytest.mark.parametrize(
    "family, model, name", [(25, 0x01, "zen3"), (25, 0x11, "zen4"), (25, 0x61, "zen4"), (26, 0x02, "zen5")]
)
def test_folders_are_named_by_cores_and_instructions(family, model, name, load, monkeypatch):
    machine = load("machine")
    text = f"vendor_id\t: AuthenticAMD\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path, **_: text)
    monkeypatch.setattr(machine, "level", lambda: "avx2")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    assert machine.slug("cpu") == f"amd-{name}-2-cores-avx2"

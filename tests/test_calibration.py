"""Figures that form="auto" uses: measuring, saving and loading them, and timing of layers. No times are checked."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import xformer_kernels as xk
from xformer_kernels import calibrate
from xformer_kernels.layer import calibration, cost, timing

MEASURED = cost.Machine(matmul=1e11, kernel=1e11, linear=1e11, bandwidth=1e10, start=1e-5)
CLOSE, FAR = (1, 784, 192), (1, 4, 192)


@pytest.fixture
def file(tmp_path, monkeypatch, need_backend):
    """Calibration is on, with a temporary file, and measuring the figures is replaced by a constant."""
    need_backend("cpp")
    monkeypatch.setenv(calibration.ENVIRONMENT, str(tmp_path / "figures.json"))
    monkeypatch.setattr(timing, "measure", lambda dtype=torch.float32: MEASURED)
    calibration.forget()
    yield tmp_path / "figures.json"
    calibration.forget()


@pytest.fixture
def timed(file, monkeypatch):
    """The forms that were timed, in order; the Gram form is always faster."""
    seen = []

    def seconds(*args):
        seen.append(args[-1])
        return 1.0 if args[-1] == "gram" else 2.0

    monkeypatch.setattr(timing, "seconds", seconds)
    return seen


@pytest.fixture
def layer():
    return xk.XFA(192, 6, True)


def explained(layer, size=CLOSE):
    return xk.explain_layer(torch.randn(size), *layer.weights())


def held(machines=None, timed=None, **others):
    machines = {"float32": MEASURED._asdict()} if machines is None else machines
    key = vars(calibration.key())
    return {
        "version": calibration.VERSION, "key": key, "date": "2026-01-02", "machines": machines, "timed": timed or {},
        **others,
    }  # fmt: skip


def test_calibrate_says_that_there_are_no_kernels(file, monkeypatch, capsys):
    monkeypatch.setattr(calibrate.backends, "load", lambda name: (None, "not built"))
    assert calibrate.main([]) == 1
    assert "CPU kernels are not there (not built)" in capsys.readouterr().out and not file.exists()


def test_measured_figures_are_kept_and_read_again(layer, file, timed):
    assert explained(layer).figures == "built-in"
    layer(torch.randn(CLOSE))
    assert set(timed) == {"gram", "direct"}
    text, form = str(explained(layer)), explained(layer).form
    assert "figures: measured 20" in text
    assert f"in {file}; both forms were timed for this shape, and {form} was faster" in text
    calibration.forget()
    timed.clear()
    layer(torch.randn(CLOSE))
    assert calibration.in_use().machines == {"float32": MEASURED} and not timed
    assert explained(layer).form == "gram"


def test_timed_form_is_used_for_similar_shapes(layer, file, timed):
    """The result applies to shapes within an eighth of an octave, but not to calls that record gradients."""
    x = torch.randn(CLOSE)
    with torch.no_grad():
        for size in (CLOSE, CLOSE, (1, 790, 192)):
            layer(torch.randn(size))
        assert len(timed) == 2 and explained(layer).form == "gram"
    layer(x)
    assert len(timed) == 4
    assert sorted(json.loads(file.read_text())["timed"].values()) == ["gram", "gram"]


def test_nothing_is_measured_if_the_choice_is_clear(layer, file, timed, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda dtype: pytest.fail("measured"))
    layer(torch.randn(FAR))
    assert explained(layer, FAR).form == "direct" and not timed and not file.exists()


@pytest.mark.parametrize("state", ["compile", "export", "vmap", "profiler", "deterministic", "off", "reference"])
def test_nothing_is_measured_in_states_that_would_notice(state, layer, file, timed, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda dtype: pytest.fail("measured"))
    x = torch.randn(CLOSE)
    with torch.no_grad():
        if state == "compile":
            torch.compile(layer, backend="eager")(x)
        elif state == "export":
            torch.export.export(layer, (x,))
        elif state == "vmap":
            torch.func.vmap(layer)(x.unsqueeze(0))
        elif state == "profiler":
            with torch.autograd.profiler.profile():
                layer(x)
        elif state == "deterministic":
            torch.use_deterministic_algorithms(True)
            try:
                layer(x)
            finally:
                torch.use_deterministic_algorithms(False)
        elif state == "off":
            monkeypatch.setenv(calibration.ENVIRONMENT, "off")
            layer(x)
            assert explained(layer).figures == "built-in"
        else:
            layer.backend = "reference"
            layer(x)
    assert not timed and not file.exists()


def test_compiled_layer_uses_the_figures_of_the_file(layer, file, monkeypatch):
    """With figures where products cost nothing, the direct form is cheaper at any size."""
    free = MEASURED._replace(matmul=1e20, bandwidth=1e20)
    file.write_text(json.dumps(held({"float32": free._asdict()})))
    x = torch.randn(1, 4096, 192)
    calls = []

    def seen(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(layer, backend=seen, fullgraph=True, dynamic=True)(x)
    assert any("xfa_forward" in call for call in calls) and not any("layer_forward" in call for call in calls)


BAD = {
    "not JSON": "{",
    "no object": "[1]",
    "another version": lambda: held(version=0),
    "another machine": lambda: held(key={**vars(calibration.key()), "threads": 999}),
    "foreign keys": lambda: held(more=1),
    "a figure too many": lambda: held({"float32": {**MEASURED._asdict(), "more": 1.0}}),
    "a figure too few": lambda: held({"float32": {"matmul": 1e11}}),
    "nan": lambda: held({"float32": MEASURED._replace(kernel=float("nan"))._asdict()}),
    "infinity": lambda: held({"float32": MEASURED._replace(start=float("inf"))._asdict()}),
    "zero": lambda: held({"float32": MEASURED._replace(start=0)._asdict()}),
    "text": lambda: held({"float32": MEASURED._replace(start="1")._asdict()}),
    "no form": lambda: held(timed={"float32 B=1": "best"}),
    "no table": lambda: held(timed=[1]),
    "a folder": None,
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_file_is_not_changed_and_warned_about_once(bad, layer, file, timed):
    content = BAD[bad]
    if content is None:
        file.mkdir()
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content()))
    before = None if content is None else file.read_text()
    with pytest.warns(RuntimeWarning, match="is not used") as warned:
        for _ in range(2):
            layer(torch.randn(CLOSE))
            layer(torch.randn(FAR))
    assert len(warned) == 1 and str(file) in str(warned[0].message)
    assert "kept in this process" in explained(layer).figures
    assert before is None or file.read_text() == before


def test_unwritable_file_is_no_error(layer, file, timed, monkeypatch, tmp_path, capsys):
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv(calibration.ENVIRONMENT, str(tmp_path / "no folder" / "figures.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(CLOSE))
        layer(torch.randn(CLOSE))
        assert calibrate.main(["--force"]) == 0
    assert len(timed) == 2 and explained(layer).figures.startswith("measured")
    assert "not kept: " in capsys.readouterr().out


def test_default_file(monkeypatch, tmp_path):
    monkeypatch.delenv(calibration.ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    path, of = calibration.path(), calibration.key()
    assert path.parent == tmp_path / "xformer-kernels"
    assert of.threads == torch.get_num_threads() and of.torch == torch.__version__
    torch.set_num_threads(1)
    assert calibration.path() != path


def test_command(file, capsys, monkeypatch):
    assert calibrate.main([]) == 0
    assert f"written to {file}" in capsys.readouterr().out
    text = file.read_text()
    assert calibrate.main([]) == 0
    said = capsys.readouterr().out
    assert "--force measures again" in said and "100.0  GFLOP/s of torch's matrix products" in said
    assert file.read_text() == text
    file.write_text("{")
    assert calibrate.main(["--force"]) == 0
    assert json.loads(file.read_text())["machines"] == {"float32": MEASURED._asdict()}
    calibration.forget()
    monkeypatch.setenv(calibration.ENVIRONMENT, "off")
    assert calibrate.main([]) == 0
    assert "nothing is measured" in capsys.readouterr().out


def keep(name):
    known = calibration.in_use()
    for i in range(100):
        known.timed[f"{name} {i}"] = "gram"
        assert not calibration.save(known, calibration.key())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are started by fork: they need no import of torch")
def test_two_processes_at_once(file):
    """Each process writes the whole file, including the results of the other."""
    calibration.key()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python, since fork does not copy threads
        ours = [multiprocessing.get_context("fork").Process(target=keep, args=(name,)) for name in "ab"]
        for process in ours:
            process.start()
        for process in ours:
            process.join()
    assert [process.exitcode for process in ours] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibration.load(file, calibration.key()).timed
    assert {f"{name} 99" for name in "ab"} & set(found)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("clock", ["coarse", "stopped"])
def test_unusable_clock(clock, layer, file, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv(calibration.ENVIRONMENT, str(file))
    if clock == "coarse":
        monkeypatch.setattr(timing, "COARSEST", 0.0)
    else:
        monkeypatch.setattr(timing.time, "perf_counter", lambda: 1.0)
        monkeypatch.setattr(timing, "PROBES", ((1, 16, 4, 1),))
    layer(torch.randn(CLOSE))
    assert explained(layer).figures.startswith("built-in") and not file.exists()


def test_layers_are_timed_if_no_figures_fit(layer, file, timed, monkeypatch):
    """If no figures fit (the machine is busy), layers are timed in a wider range, and results are not saved."""
    measured = []
    monkeypatch.setattr(timing, "measure", measured.append)
    for size in (CLOSE, (1, 400, 192), (1, 2000, 192), FAR, CLOSE):
        layer(torch.randn(size))
    assert len(measured) == 1 and len(timed) == 6 and not file.exists()
    assert explained(layer, (1, 400, 192)).form == "gram" and explained(layer, FAR).form == "direct"
    assert "none fit what was measured; both forms were timed" in str(explained(layer))


def test_figures_are_fitted_to_times():
    shapes = [cost.Shape(B, N, C, H, C, C, 4, False) for B, N, C, H in timing.PROBES]
    work = [of(s) for s in shapes for of in (cost.work_of_gram, cost.work_of_direct)]
    work += [cost.work_of_direct(s._replace(kernels=True)) for s in shapes]
    times = [(w, w.on(MEASURED).seconds) for w in work]
    for found, right in zip(timing.fit(times), MEASURED, strict=True):
        assert found == pytest.approx(right, rel=0.05)
    assert timing.fit([(w, taken * (1 + 9 * (i % 3))) for i, (w, taken) in enumerate(times)]) is None
    without = timing.fit(times[: 2 * len(shapes)])
    assert without.linear / without.matmul == pytest.approx(2)


def test_measure(monkeypatch):
    """On a busy machine too: the result is None or valid figures; the random number generator is unchanged."""
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    state = torch.get_rng_state()
    figures = timing.measure()
    assert figures is None or all(0 < x < float("inf") for x in figures)
    assert torch.equal(torch.get_rng_state(), state)


def test_timing_has_no_side_effects(file, layer):
    """Random numbers, gradients, hooks and saved tensors are the same as with the form requested by name."""
    layer = xk.XFABlock(192, 6, True, attn_drop=0.3, layer_scale=1.0)
    x = torch.randn(CLOSE, requires_grad=True)
    touched = []
    x.register_hook(touched.append)

    def run(form):
        layer.attn.form = form
        layer.zero_grad()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            y = layer(x)
        y = y + checkpoint(layer, x, use_reentrant=False)
        y.sum().backward()
        result = [y.detach(), x.grad, *(p.grad for p in layer.parameters()), torch.get_rng_state()]
        x.grad = None
        return result, len(kept)

    first, kept = run("auto")
    assert len(touched) == 1 and len(calibration.in_use().timed) == 1
    form = next(iter(calibration.in_use().timed.values()))
    again, kept_by_name = run(form)
    assert kept == kept_by_name
    for got, expected in zip(first, again, strict=True):
        assert torch.equal(got, expected)


def test_long_calls_are_timed_once(monkeypatch):
    calls = []

    def seconds(form, each):
        calls.append(form)
        return each

    timing.faster(partial(seconds, each=0.6), 1.0)
    assert sorted(calls) == ["direct", "gram"]
    calls.clear()
    timing.faster(partial(seconds, each=0.05), 1.0)
    assert len(calls) == 8


def test_timing_continues_until_the_minimum_times_agree():
    """The direct form is faster, but other work slows down most of its calls."""
    times = {"gram": iter([0.025, 0.02] * 9), "direct": iter([0.09, 0.08, 0.07, 0.06, 0.01, 0.05, 0.0101] * 2)}
    assert timing.faster(lambda form: next(times[form]), 1.0) == "direct"
    assert next(times["direct"]) == 0.09


def test_single_times_and_figures_have_equal_weight():
    for gram, estimated, form in ((0.9, 1.2, "direct"), (0.9, 1.1, "gram"), (1.1, 0.8, "gram"), (1.1, 1.0, "direct")):
        assert timing.faster(lambda form, gram=gram: gram if form == "gram" else 1.0, estimated) == form

"""The benchmark of segmentation: what is compared is equal, what is not run is said, and what is written is whole."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import fields

import pytest
import torch

pytest.importorskip("timm", reason="the eager attention that is compared with is timm's")
COMMAND = ["model", "--task", "segment", "--quick", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture
def segment(load, need_backend, monkeypatch):
    need_backend("cpp")
    module = load("segment")
    monkeypatch.setattr(module.backbones, "limit_memory", lambda: None)
    return module


def test_command_writes_files_with_all_columns(segment, load, capsys, tmp_path):
    assert load("__main__").main([*COMMAND, "--halves", "0", "--out", str(tmp_path)]) == 0
    assert "written" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    stem = folder / "model-segment-cpu-float32-quick"
    columns = [field.name for field in fields(segment.Segmentation)]
    result = json.loads(stem.with_suffix(".json").read_text())
    assert {"date", "versions", "commit", "allocator", "machine"} <= set(result) and result["quick"]
    assert set(result["providers"]) == {row["provider"] for row in result["rows"]}
    with stem.with_suffix(".csv").open() as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == columns and len(list(reader)) == len(result["rows"])
    others = [name for name in segment.OTHERS if not segment.segmenters.missing(name)]
    assert [row["provider"] for row in result["rows"]].count("xfa") == 2 and len(result["rows"]) == 6 + 2 * len(others)
    for row in result["rows"]:
        of_ours = row["provider"] not in others
        assert list(row) == columns and row["not_run"] is None and row["parameters"] > 1e6
        assert (row["tokens"], row["map_mb"] is None) == ((512, False) if of_ours else (None, True))
        assert row["ms"] > 0 and row["live_mb"] > 0 and row["fps"] == pytest.approx(1e3 / row["ms"], rel=1e-3)
        assert not of_ours or row["map_mb"] == pytest.approx(2 * 512**2 * 4 / 1e6, rel=1e-4)  # rounded
        unchecked = ("eager", "softmax", *others)
        assert (row["error"] is None) == (row["variant"] == "unfused" and row["provider"] in unchecked)
        assert row["error"] is None or row["error"] < 1e-5


def test_models_of_other_libraries(segment):
    """Their parameters and multiply-adds, attention without maps, logits of the image's size, also fused."""
    pytest.importorskip("torchvision", reason="LR-ASPP is torchvision's")
    pytest.importorskip("transformers", reason="SegFormer is transformers'")
    models = segment.models("xformer_xxs")
    assert models["segformer_b0", "unfused"].model.config._attn_implementation == "sdpa"
    counts = {"lraspp_mobilenet_v3_large": (3.22e6, 0.257), "segformer_b0": (3.72e6, 0.882)}
    for name, (parameters, gmacs) in counts.items():
        model, fused = models[name, "unfused"], models[name, "fused"]
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
        if importlib.util.find_spec("fvcore"):
            assert segment.gmacs(model, 128, 256) == pytest.approx(gmacs, rel=0.05)
        x = torch.randn(1, 3, 65, 97)
        with torch.inference_mode():
            assert model(x).shape == (1, 19, 65, 97)
            assert (fused(x) - model(x)).abs().max() <= segment.backbones.EQUAL * model(x).abs().max()
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())


def test_what_is_not_installed_is_left_out_and_said(segment, monkeypatch, capsys):
    monkeypatch.setitem(segment.segmenters.PACKAGES, "segformer_b0", "no_such_package")
    monkeypatch.setattr(segment, "rows_of", lambda *arguments: [asked.append(arguments[-1])][:0])
    asked = []
    assert segment.main(COMMAND) == 0
    assert "segformer_b0 is left out: no_such_package is not installed" in capsys.readouterr().out
    assert asked and all("segformer_b0" not in others for others in asked)


def test_only_the_math_form_holds_maps(segment, monkeypatch):
    """At 1024 tokens of 2 heads a map is 8.4 MB, and what else the xxs model allocates some 14."""
    monkeypatch.setattr(segment.measure, "interleaved", lambda calls, _: dict.fromkeys(calls, one_second(segment)))
    rows = {
        row.provider: row for row in segment.rows_of("xformer_xxs", 1, 256, 256, 0.0, ()) if row.variant == "unfused"
    }
    ours, softmax, math = (rows[name].live_mb for name in ("xfa", "softmax", "softmax-math"))
    assert math > 1.9 * rows["softmax"].map_mb
    assert softmax < 1.1 * ours


def test_what_would_not_fit_is_not_run(segment, monkeypatch):
    monkeypatch.setattr(segment, "LARGEST_MAP", 4 * 2 * 32**2 - 1)
    rows = {(row.provider, row.variant): row for row in segment.rows_of("xformer_xxs", 1, 64, 32, 0.01)}
    for (provider, _), row in rows.items():
        assert (row.ms is None) == (row.not_run is not None) == (provider == "softmax-math")


def test_only_too_little_memory_of_softmax_is_told(segment, monkeypatch):
    def fails(of, message):
        def run(call):
            if any(type(part).__name__ == of for part in call.func.modules()):
                raise RuntimeError(message)
            return real(call)

        return run

    real = segment.run
    monkeypatch.setattr(segment, "LARGEST_MAP", 0)
    monkeypatch.setattr(segment, "run", fails("SoftmaxHalf", "not enough memory: you tried to allocate 9 bytes.\nmore"))
    *_, softmax, math = segment.rows_of("xformer_xxs", 1, 64, 32, 0.01, ())
    assert (softmax.ms, softmax.not_run) == (None, "not enough memory: you tried to allocate 9 bytes.")
    assert math.not_run.startswith("not tried")
    for of, message in (("SoftmaxHalf", "another mistake"), ("XFAHalf", "not enough memory")):
        monkeypatch.setattr(segment, "run", fails(of, message))
        with pytest.raises(RuntimeError, match=message):
            segment.rows_of("xformer_xxs", 1, 64, 32, 0.01)


def test_unequal_outputs_are_not_timed(segment, monkeypatch):
    outputs = {("softmax", "unfused"): torch.ones(1, 19, 4, 4)}
    outputs["softmax-math", "unfused"] = outputs["softmax", "unfused"] + 1e-4
    with pytest.raises(AssertionError, match=r"softmax-math, unfused: its output is off by 1\.0e-04"):
        segment.check(outputs, ("softmax-math", "unfused"), torch.ones(1))
    outputs.update({("xfa", "unfused"): torch.ones(1, 19) + 1e-4, ("eager", "unfused"): torch.ones(1, 19)})
    with pytest.raises(AssertionError, match=r"relative error 1\.00e-04 of logits"):
        segment.check(outputs, ("xfa", "unfused"), torch.ones(1, 19).double())


def test_tokens_and_map_of_the_paper_size(segment):
    assert segment.tokens_and_map("xformer_s", 1, 1024, 2048) == (32768, 3 * 32768**2 * 4)
    assert segment.tokens_and_map("xformer_xxs", 2, 65, 63) == (9 * 8, 2 * 2 * 72**2 * 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["op", "--task", "segment"], "invalid choice: 'op'"),
        (["op", "--task", "classify"], "only model has tasks, got op"),
        (["model", "--task", "detect"], "invalid choice: 'detect'"),
        (["model", "--task", "segment", "--height", "0"], "--height must be 1 or more, got 0"),
        (["model", "--task", "segment", "--halves", "9"], "--halves must be 0 or more and leave sides"),
    ],
)
def test_options_that_there_are_not(segment, load, arguments, said, capsys):
    with pytest.raises(SystemExit):
        load("__main__").main(arguments)
    assert said in capsys.readouterr().err


def test_files_of_other_sizes_have_other_names(segment):
    def suffix(*more):
        return segment.parse(["model", "--task", "segment", *more]).suffix

    assert suffix() == ""
    assert suffix("--height", "512", "--variant", "xformer_xs", "--batch", "2") == "-xformer_xs-512x2048-2-images"


def test_table(load, monkeypatch, tmp_path):
    table = load("table")
    monkeypatch.setattr("bench.cells.ROOT", tmp_path)
    assert "Not measured yet." in table.render_segmentation(tmp_path)
    rows = [
        dict(
            provider=provider, variant=variant, images=1, height=side, width=side, tokens=side, ms=side * ms, fps=10.0,
            over_ours=ms, live_mb=float(side), live_over_ours=1.0, extra_mb=None, not_run=None,
        )
        for side in (64, 128)
        for provider, ms in (("xfa", 1.0), ("softmax", 3.0))
        for variant in ("unfused", "fused")
    ]  # fmt: skip
    for row in rows[-2:]:
        row.update(ms=None, fps=None, over_ours=None, live_mb=None, live_over_ours=None, not_run="not tried")
    other = dict(rows[0], provider="lraspp", tokens=None, parameters=3_220_000, gmacs=16.44)
    rows += [dict(other, height=side, width=side) for side in (64, 128)]
    run = dict(
        machine="m", threads=2, versions={"torch": "2", "timm": "1"}, date="2026-01-01T", commit="c", rows=rows,
        allocator="default", model="xformer_s", classes=19,
    )  # fmt: skip
    (tmp_path / "model-segment-cpu-float32.json").write_text(json.dumps(run))
    text = table.render_segmentation(tmp_path)
    assert "| 64 x 64 | - | lraspp | 3.22M | 16.4 | 10.0 | 1.00 | - |" in text
    assert "| 64 x 64 | 64 | softmax | - | - | 10.0 | 3.00 | 10.0 | 3.00 | 64 | 1.00 | - |" in text
    assert "| 128 x 128 | 128 | softmax | - | - | - | - | - | - | - | - | - |" in text
    assert "softmax at 128 x 128: not tried; 4 times" in text
    assert "4 times the pixels take xfa 2.00 times the time, 2.00 times the memory" in text
    assert table.replace(f"a\n{table.SEGMENTATION.format('x')}\n1\n{table.END}\n", text) == f"a\n{text}\n"


def one_second(segment):
    return segment.measure.Timing((1.0, 1.0, 1.0))

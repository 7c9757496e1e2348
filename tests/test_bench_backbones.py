"""The benchmark of the backbones: compared models have equal outputs, and files are complete. No times are checked."""

from __future__ import annotations

import csv
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm", reason="the models that are compared with are timm's")
onednn = pytest.importorskip("xformer.fused.onednn")


def deviation(model: nn.Module, like: nn.Module) -> float:
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        y, expected = model(x), like(x)
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", ["mobilevit_xxs", "edgenext_xx_small", "efficientnet_b0"])
def test_fused_baselines_are_equal_to_unfused_ones(name, load):
    baselines = load("baselines")
    torch.manual_seed(0)
    model = timm.create_model(name).to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    model.eval()
    folded = baselines.fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert deviation(folded, model) < 1e-5
    if not onednn.IS_THERE:
        pytest.skip("fused products need a torch with oneDNN")
    fused = baselines.fuse(model)
    left = [type(module).__name__ for module in fused.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert not left
    assert not any(type(module).__name__ in ("SiLU", "GELU") for module in fused.modules())
    assert deviation(fused, model) < 1e-5


def test_unequal_outputs_are_not_timed(load, monkeypatch):
    backbones = load("backbones")
    monkeypatch.setattr(backbones.baselines, "fold", lambda model: nn.Sequential(model, nn.Softmax(-1)))
    with pytest.raises(AssertionError, match="folded edgenext_xx_small: its output is off by"):
        backbones.forward_rows("xformer_xxs", 1, 64, 0.01, False)


def test_eager_has_the_weights_of_ours_and_no_kernel(load):
    from xformer_kernels import dispatch

    models = load("backbones").training_models("xformer_xxs")
    ours, eager = models["xfa"].state_dict(), models["eager"].state_dict()
    assert list(ours) == list(eager) and all(torch.equal(ours[key], eager[key]) for key in ours)
    with dispatch.record() as ran:
        models["eager"](torch.randn(1, 3, 64, 64))
    assert not ran


@pytest.mark.parametrize("what", ["forward", "training"])
def test_files_have_all_columns(what, load, need_backend, monkeypatch, capsys, tmp_path):
    need_backend("cpp")
    backbones, report = load("backbones"), load("report")
    monkeypatch.setattr(backbones, "limit_memory", lambda: None)
    backbones.main([what, "--quick", "--seconds", "0.05", "--runtimes", "", "--out", str(tmp_path)])
    assert "written" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    stem = folder / f"backbones-{what}-cpu-float32-quick"
    columns = [field.name for field in fields(backbones.Forward if what == "forward" else backbones.Training)]
    result = json.loads(stem.with_suffix(".json").read_text())
    assert {"date", "versions", "commit", "allocator", "machine"} <= set(result) and result["quick"]
    with stem.with_suffix(".csv").open() as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == columns
        assert len(list(reader)) == len(result["rows"])
    for row in result["rows"]:
        assert list(row) == columns and row["ms"] > 0 and row["over_ours"] > 0
    if what == "forward":
        assert len(result["rows"]) == 9 and max(row["error"] for row in result["rows"]) < 1e-5
        assert set(result["variants"]) >= {row["variant"] for row in result["rows"]}
    else:
        assert [row["provider"] for row in result["rows"]] == ["xfa", "eager", "softmax"] * 2
        assert all(row["live_mb"] > 0 and row["failure"] is None for row in result["rows"])
        assert all(row["gradient_error"] < 1e-3 for row in result["rows"] if row["provider"] == "xfa")
        assert stem.with_suffix(".png").exists() == report.can_plot()


def test_out_of_memory_is_reported(load, monkeypatch):
    backbones = load("backbones")
    step = backbones.step

    def no_memory(model, x, target):
        if any(type(module).__name__ == "SoftmaxHalf" for module in model.modules()):
            raise RuntimeError("not enough memory: you tried to allocate 9 bytes.\nmore words")
        return step(model, x, target)

    monkeypatch.setattr(backbones, "step", lambda *a: lambda: no_memory(*a)())
    ours, _, softmax = backbones.training_rows("xformer_xxs", 2, 64, 0.01)
    assert ours.ms and ours.failure is None
    assert softmax.ms is None and softmax.failure == "not enough memory: you tried to allocate 9 bytes."


def test_tables(load, monkeypatch, tmp_path):
    table = load("table")
    monkeypatch.setattr("bench.cells.ROOT", tmp_path)
    renderers = (table.render_backbones, table.render_forward, table.render_training)
    assert all("Not measured yet." in render(tmp_path) for render in renderers)
    facts = dict(
        machine="m", threads=2, versions={"torch": "2", "timm": "1"}, date="2026-01-01T", commit="c",
        allocator="default",
    )  # fmt: skip
    rows = [
        dict(model=model, images=images, variant=variant, ms=images * ms * (1 if model in ours else 3))
        for ours in [[ours for ours, _ in table.GOALS]]
        for model in {*ours, *(peer for _, peer in table.GOALS)}
        for images in (1, 8)
        for variant, ms in (("unfused", 3.0), ("fused", 2.0 if model in ours else 3.0), ("compiled", 1.0))
    ]
    write(tmp_path, "forward", {**facts, "rows": [row for row in rows if row["variant"] != "compiled"]})
    assert "| xformer_s | 8 | 3.00 | - | 4.50 | 3.00 | - | 4.50 |" in table.render_backbones(tmp_path)
    assert "| xformer_xs | 1 | mobilevit_xs | 3.00 | - | 4.50 | 4.50 | 2.0 |" in table.render_forward(tmp_path)
    for suffix in ("-raised", "-compile"):
        write(tmp_path, "forward", {**facts, "rows": rows}, suffix)
    assert "| mobilevit_xs | 3.00 | - | 4.50 | 4.50 | 3.00 | 4.50 | 3.00 | 2.0 |" in table.render_forward(tmp_path)
    fits = dict(failure=None, over_ours=2.0, memory_over_ours=1.25)
    rows = [
        dict(size=size, images=8, provider=name, ms_per_image=float(size), live_mb_per_image=size**2 / 10, **fits)
        for size in (64, 128)
        for name in ("xfa", "eager", "softmax")
    ]
    rows[-1].update(failure="no memory", over_ours=None, memory_over_ours=None)
    write(tmp_path, "training", {**facts, "rows": rows})
    text = table.render_training(tmp_path)
    assert "| default | 64 | 8 | 2.00 | 1.25 | 2.00 | 1.25 | 1.00 | 1.00 |" in text
    assert "| default | 128 | 8 | 2.00 | 1.25 | did not fit | did not fit | 0.50 | 1.00 |" in text
    both = f"{table.FORWARD.format('x')}\n1\n{table.END}\n{table.TRAINING.format('x')}\n2\n{table.END}\n"
    assert table.replace(both, text) == f"{table.FORWARD.format('x')}\n1\n{table.END}\n{text}\n"


def write(folder: Path, what: str, result: dict, suffix: str = "") -> None:
    (folder / f"backbones-{what}-cpu-float32{suffix}.json").write_text(json.dumps(result))

"""Other runtimes in the benchmark of the backbones: their outputs equal PyTorch's. No times are checked."""

from __future__ import annotations

import pytest
import torch

timm = pytest.importorskip("timm", reason="the models that are compared with are timm's")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_outputs_are_those_of_pytorch(runtime, load):
    backbones, runtimes = load("backbones"), load("runtimes")
    if missing := runtimes.missing(runtime):
        pytest.skip(f"{runtime} needs {', '.join(missing)}")
    torch.manual_seed(0)
    model = timm.create_model("xformer_xxs", num_classes=5, zero_init_last=False).eval()
    x = torch.randn(1, 3, 64, 64)
    run = runtimes.load(model, "xformer_xxs", tuple(x.shape), [runtime])[runtime]
    with torch.inference_mode():
        expected = model(x)
        assert (run(x) - expected).abs().max() <= backbones.EQUAL * expected.abs().max()


def test_missing_runtimes_are_skipped(load, monkeypatch, capsys):
    backbones, runtimes = load("backbones"), load("runtimes")
    monkeypatch.setattr(runtimes, "missing", lambda runtime: ["openvino"] if runtime == "openvino" else [])
    asked = []
    monkeypatch.setattr(runtimes, "load", lambda model, name, shape, wanted: asked.extend(wanted) or {})
    backbones.main(["forward", "--quick", "--seconds", "0.05"])
    assert "openvino is left out: openvino not installed" in capsys.readouterr().out
    assert set(asked) == {"onnxruntime"}


def test_unequal_outputs_are_skipped(load, monkeypatch, capsys):
    backbones, runtimes = load("backbones"), load("runtimes")
    wrong = {"openvino": lambda images: torch.ones(len(images), 1000)}
    monkeypatch.setattr(runtimes, "load", lambda model, name, shape, wanted: wrong)
    rows = backbones.forward_rows("xformer_xxs", 1, 64, 0.01, False, ["openvino"])
    assert "left out: openvino xformer_xxs: its output is off by" in capsys.readouterr().out
    assert {row.variant for row in rows} == {"unfused", "folded", "fused"}


def test_unknown_runtimes_are_refused(load, capsys):
    with pytest.raises(SystemExit):
        load("backbones").main(["forward", "--runtimes", "onnxruntime,abacus"])
    assert "--runtimes abacus: there are onnxruntime, openvino" in capsys.readouterr().err

"""Sizes and multiply-adds within the budgets, counted by fvcore as other models are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import xformer

pytest.importorskip("fvcore", reason="fvcore counts")
from xformer.counts import count, main, table

BUDGETS = {"xformer_s": (5.5e6, 0.95e9), "xformer_xs": (2.3e6, 0.45e9), "xformer_xxs": (1.3e6, 0.27e9)}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets(name):
    parameters, macs = BUDGETS[name]
    model = getattr(xformer, name)()
    counts = count(model)
    assert abs(counts.parameters - parameters) <= 0.05e6
    assert counts.macs <= macs
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    # what fvcore does not know multiplies no matrices
    assert set(counts.unknown) <= {f"aten::{op}" for op in ("hardswish", "add", "mul", "mean", "unflatten", "softmax")}


def test_forms():
    """Products are those of torch's counter, norms aside; the form that runs by itself is not dearer than both."""
    model = xformer.xformer_xxs().eval()
    counts = {form: count(model, 128, form) for form in ("direct", "gram", "auto")}
    assert "layer_forward" not in counts["direct"].by_op and counts["direct"].by_op["xfa_forward"] > 0
    assert "xfa_forward" not in counts["gram"].by_op and counts["gram"].by_op["layer_forward"] > 0
    assert counts["auto"].macs <= max(counts["direct"].macs, counts["gram"].macs)
    for form, counted in counts.items():
        for module in model.modules():
            if isinstance(module, xformer.attention.XFABlock):
                module.attn.form = form
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(1, 3, 128, 128))
        products = counted.macs - counted.by_op["batch_norm"] - counted.by_op["layer_norm"]
        assert counter.get_total_flops() == 2 * products, form


def test_counting_leaves_the_model_alone():
    model = xformer.xformer_xxs()
    before = [name for name, _ in model.named_modules()]
    count(model, 64, "gram")
    assert model.training and [name for name, _ in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="form must be one of"):
        count(model, 64, "both")


def test_dtypes_and_sizes_count_alike():
    model = xformer.xformer_xxs()
    assert count(model.bfloat16(), 64).macs == count(model.float(), 64).macs
    assert count(model, (64, 64)) == count(model, 64) and count(model, (33, 70)).macs > count(model, 32).macs


def test_attention_that_costs_more():
    macs = {name: count(xformer.xformer_xxs(attention=name), 512).macs for name in ("xfa", "softmax", "none")}
    assert macs["none"] < macs["xfa"] < macs["softmax"]


def test_document_has_these_counts():
    document = (Path(__file__).parents[1] / "docs" / "backbone.md").read_text()
    for line in table(list(xformer.VARIANTS)).splitlines():
        assert line in document


def test_document_has_what_runs(need_backend):
    need_backend("cpp")
    model = xformer.xformer_s()
    assert count(model, form="auto").macs == count(model).macs
    text = " ".join((Path(__file__).parents[1] / "docs/backbone.md").read_text().split())
    direct, runs = (f"{count(model, 512, form).macs / 1e9:.3f}" for form in ("direct", "auto"))
    assert f"for one of 512 x 512 it is {runs} GMACs, and {direct} in the direct form." in text


def test_command(capsys):
    main(["xformer_xxs", "--size", "64"])
    out = capsys.readouterr().out
    assert "| xformer_xxs | 64 | 1.28M |" in out
    pytest.importorskip("timm", reason="others are timm's")
    main(["deit_tiny_patch16_224"])
    assert "| deit_tiny_patch16_224 | 224 | 5.72M | 1.258 |" in capsys.readouterr().out

"""The comparison of what models learn: the same stages for all, files with every run, runs that are not done twice."""

import json

import pytest
import torch

from experiments import learning
from xformer import xformer_xxs
from xformer.recipes.card import Card
from xformer.recipes.weights import build_model


@pytest.mark.parametrize("name", ["mobilevit_xxs", "edgenext_xx_small"])
def test_models_of_others_keep_as_many_pixels_as_ours(name):
    x = torch.zeros(1, 3, 32, 32)
    ours = xformer_xxs(num_classes=10, stem_stride=1).eval().forward_features(x)
    theirs = build_model(Card(f"{name}_half_stride", 10)).eval().forward_features(x)
    assert theirs.shape[2:] == ours.shape[2:] == (2, 2)


@pytest.mark.nightly
def test_runs_are_written_once(tmp_path):
    out = tmp_path / "results"
    arguments = ["--data", "digits", "--models", "xformer_xxs", "--seeds", "3", "--epochs", "1", "--jobs", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(out)]
    learning.main(arguments)
    (path,) = out.glob("*/learning.json")
    run = json.loads(path.read_text())
    (row,) = run["rows"]
    assert (row["data"], row["model"], row["seed"], row["epochs"]) == ("digits", "xformer_xxs", 3, 1)
    assert 0 < row["top1"] <= 100 and row["minutes"] > 0 and run["commit"] and run["recipe"]["lr"] > 0
    assert "digits" in (path.with_suffix(".csv")).read_text()
    (result,) = tmp_path.glob("work/*/result.json")
    result.write_text(json.dumps(row | {"top1": 12.5}))
    learning.main(arguments)
    assert json.loads(path.read_text())["rows"][0]["top1"] == 12.5

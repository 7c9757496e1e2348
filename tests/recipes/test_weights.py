"""Weights are used only for the model of their card, and unusable weights are refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from eval_cases import evaluated, refused, write
from safetensors.torch import save_file
from scene_cases import OPTIONS
from train_cases import make_images

import xformer
from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.card import Card, read_card
from xformer.recipes.files import write_json
from xformer.recipes.weights import build_model, difference, load_weights, save_weights, start_from


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory):
    card = Card("xformer_xxs", 3, image_size=32, classes=["dark", "light", "middle"])
    return write(tmp_path_factory.mktemp("weights") / "w.safetensors", card)


# ---------------------------------------------------------------------------------------- weights of another model


ANCHORS = OPTIONS["detect"]["anchors"]


@pytest.mark.parametrize(("task", "options", "other", "said"), [
    ("classify", {}, {"attention": "softmax"}, "its attention is 'softmax', and the model's 'xfa'"),
    ("classify", {"attention": "xfa"}, {}, ""),
    ("classify", {"stage_strides": [2, 2, 2, 1]}, {}, "its stage_strides is [2, 2, 2, 2], and the model's [2, 2, 2,"),
    ("classify", {"stage_strides": (2, 2, 2, 2)}, {"drop_path_rate": 0.3, "img_size": 64}, ""),
    ("detect", {}, {"anchors": ANCHORS[::-1]}, "its anchors is"),
    ("segment", {"form": "concatenated"}, {"drop_rate": 0.5}, ""),
])  # fmt: skip
def test_cards_are_compared(task, options, other, said, tmp_path):
    """Options that change what a model of the same shapes computes must match; other options may differ."""
    own = Card("xformer_xxs", 5, task, OPTIONS.get(task, {}) | options)
    path = write(tmp_path / "w.safetensors", replace(own, options=OPTIONS.get(task, {}) | other))
    model = build_model(own)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if not said:
        assert start_from(model, own, path) == []
        return
    with pytest.raises(UsageError) as caught:
        start_from(model, own, path)
    assert f"weights: {path} is of another model: {said}" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    told = start_from(model, own, path, partial=True)
    assert f"{path} is of another model: {said}" in told[-1]


def test_cards_of_classifiers_are_compared_with_the_backbones_of_other_tasks(tmp_path):
    own = Card("xformer_xxs", 5, "segment", {"width": 32, "attention": "softmax"})
    assert difference(own, Card("xformer_xxs", 9, options={"attention": "softmax", "global_pool": "avg"})) == ""
    with pytest.raises(UsageError, match="its attention is 'xfa', and the model's 'softmax'"):
        start_from(build_model(own), own, write(tmp_path / "w.safetensors", Card("xformer_xxs", 9)))


def test_options_that_are_not_the_weights_are_refused(weights, images, tmp_path, capsys):
    """eval and export refuse options that differ from those of the weights, and accept equal ones."""
    refused("its attention is 'xfa', and the model's 'softmax'", weights, images, ["attention"], attention="softmax")
    refused("its se is False, and the model's True", weights, images, ["model_options"], model_options={"se": True})
    refused("is of task classify, got detect", weights, images, ["task"], task="detect")
    evaluated(weights, images, ["attention"], attention="xfa")
    call = ["export", "--weights", weights, "--to", str(tmp_path / "m.pt2"), "--model-options", "attention=softmax"]
    assert command.main(call) == 2
    assert "its attention is 'xfa', and the model's 'softmax'" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- weights of no use


@pytest.mark.parametrize("name", ["stem.conv.weight", "stem.bn.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, value, weights, images, tmp_path, capsys):
    state, card = load_weights(weights)
    path = tmp_path / "w.safetensors"
    state[name].flatten()[0] = value
    save_weights(path, state, card)
    message = f"weights: {path} is of no use: {name} is not finite"
    refused(message, path, images)
    with pytest.raises(UsageError, match=message):
        start_from(build_model(card), card, path, partial=True)
    image = str(images / "val/dark/0.png")
    for call in (["predict", image], ["export", "--to", str(tmp_path / "m.onnx")]):
        assert command.main([*call, "--weights", str(path)]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


def test_an_evaluation_without_a_result_is_an_error(weights, images, monkeypatch):
    from xformer.recipes.tasks.classify import Accuracy

    monkeypatch.setattr(Accuracy, "compute", lambda self: {"top1": float("nan")})
    refused("the evaluation gives top1 nan", weights, images)


@pytest.mark.parametrize(("text", "said"), [
    ("{", "is not JSON"),
    ("[]", "must hold fields by name, got list"),
    ("{}", "has no model"),
    ('{"model": "xformer_xxs"}', "has no num_classes"),
    ({"model": 5}, "model must be text, got 5"),
    ({"num_classes": "3"}, "num_classes must be an integer of 1 or more, got '3'"),
    ({"num_classes": True}, "num_classes must be an integer of 1 or more, got True"),
    ({"image_size": 0}, "image_size must be an integer of 1 or more, got 0"),
    ({"image_size": [224, 224]}, "image_size must be an integer of 1 or more, got [224, 224]"),
    ({"crop_pct": -1}, "crop_pct must be a number above 0, got -1"),
    ({"mean": 0.5}, "mean must be a list of finite numbers, got 0.5"),
    ({"std": [0.2, 0, 0.2]}, "std must be a list of numbers above 0"),
    ({"mean": [0.5]}, "mean must be three numbers for three channels, got [0.5]"),
    ({"std": [10**400] * 3}, "std must be a list of numbers above 0"),
    ({"classes": ["a", "b"]}, "there are 2 classes of 3 classes"),
    ({"classes": "abc"}, "classes must be a list of names, got 'abc'"),
    ({"options": []}, "options must be values by name, got []"),
    ({"colours": [[0, 0, 256]] * 3}, "colours must be a list of three bytes each"),
    ({"options": {"colour": "red"}}, "does not take these options"),
])  # fmt: skip
def test_a_card_that_is_none_is_named(text, said, weights, tmp_path, capsys):
    state, card = load_weights(weights)
    if isinstance(text, dict):
        text = json.dumps(json.loads(card.to_json()) | text)
    path = tmp_path / "w.safetensors"
    save_file(state, path, metadata={"xformer": text})
    assert command.main(["predict", "a.png", "--weights", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and (str(path) in line or "model" in said or "options" in said)


def test_a_card_is_what_was_written(tmp_path):
    card = Card("xformer_xxs", 2, classes=["a", "b"], class_ids=[3, 9], colours=[(1, 2, 3), (4, 5, 6)], step=7)
    card.metrics = {"top1": 50.0, "loss": float("nan")}
    text = card.to_json()
    assert "NaN" not in text
    again = read_card(text[:-1] + ', "of_a_later_version": 1}', "x")
    assert json.loads(again.to_json()) == json.loads(text) and again.metrics["loss"] is None


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_files_have_the_mode_of_the_umask(umask, mode, tmp_path):
    """Weights, and what else a run writes, may be read by those who may read other files of the user."""
    card = Card("xformer_xxs", 1, classes=["a"])
    before = os.umask(umask)
    try:
        save_weights(tmp_path / "new.safetensors", {"x": torch.ones(2)}, card)
        write_json("out", tmp_path / "results.json", {})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "new.safetensors": mode,
        "results.json": mode,
    }


def test_pickled_weights_are_told_how_to_become_safetensors(tmp_path, capsys):
    torch.save(xformer.xformer_xxs(num_classes=3).state_dict(), tmp_path / "w.pth")
    assert command.main(["predict", "a.png", "--weights", str(tmp_path / "w.pth")]) == 2
    assert "becomes one by safetensors.torch.save_file" in capsys.readouterr().err

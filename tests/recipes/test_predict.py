"""The output of predict for images, and its error messages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import xformer
from xformer import __main__ as command
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.predict import class_names
from xformer.recipes.weights import save_weights

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")
from xformer.recipes.data.transforms import eval_transform  # noqa: E402

NAMES = ["ant", "bee", "cat", "dog", "[elk]", "fox"]
CARD = Card("xformer_xxs", 6, image_size=64, crop_pct=0.9, classes=NAMES)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = xformer.xformer_xxs(num_classes=6)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
        for _ in range(2):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


@pytest.fixture
def weights(model, tmp_path):
    save_weights(tmp_path / "w.safetensors", model.state_dict(), CARD)
    return tmp_path / "w.safetensors"


def picture(path, mode="RGB", size=(90, 70), seed=0):
    numbers = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(numbers, "RGBA").convert(mode).save(path)
    return str(path)


def expected(model, path, card=CARD):
    with torch.no_grad(), Image.open(path) as image:
        return model(eval_transform(card, card.mean, card.std)(image.convert("RGB"))[None]).softmax(-1)[0]


def test_lines_and_json(model, weights, tmp_path, capsys):
    """Images of different sizes and modes, in several batches, each give the same result as alone."""
    images = [
        picture(tmp_path / f"{i}.png", mode, size, i)
        for i, (mode, size) in enumerate([("RGB", (90, 70)), ("L", (64, 200)), ("RGBA", (30, 40)), ("RGB", (64, 64))])
    ]
    found = tmp_path / "out.json"
    call = ["predict", *images, "--weights", str(weights), "--top", "3", "--batch-size", "3", "--json", str(found)]
    assert command.main(call) == 0
    used, *lines = capsys.readouterr().out.splitlines()
    assert used == (
        f"{weights}: xformer_xxs, images of 64 pixels by bicubic, crop_pct 0.9, less mean 0.485 0.456 0.406, by std "
        "0.229 0.224 0.225"
    )
    results = json.loads(found.read_text())
    assert lines[::4] == images and [result["image"] for result in results] == images
    for i, (image, result) in enumerate(zip(images, results, strict=True)):
        best = expected(model, image).topk(3)
        assert [guess["index"] for guess in result["top"]] == best.indices.tolist()
        assert [guess["name"] for guess in result["top"]] == [NAMES[j] for j in best.indices.tolist()]
        got = torch.tensor([guess["probability"] for guess in result["top"]])
        torch.testing.assert_close(got, best.values, rtol=1e-4, atol=1e-5)
        for guess, line in zip(result["top"], lines[4 * i + 1 :], strict=False):
            assert line.split() == [f"{guess['probability']:.2%}", guess["name"]]


def test_table_on_a_terminal(weights, tmp_path, capsys, monkeypatch):
    pytest.importorskip("rich")
    image = picture(tmp_path / "a.png")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert command.main(["predict", image, "--weights", str(weights), "--top", "9"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES) and "probability" in printed


def test_images_that_would_be_too_large_once_they_are_resized(weights, tmp_path, capsys):
    """A strip of 60000 x 1 pixels, in a file of 94 bytes, gives one error, and other images are predicted."""
    thin, good = tmp_path / "thin.png", picture(tmp_path / "good.png")
    Image.new("RGB", (60000, 1)).save(thin)
    assert command.main(["predict", str(thin), good, "--weights", str(weights)]) == 1
    out, err = capsys.readouterr()
    assert "good.png" in out
    assert f"error: image: {thin} cannot be read: resized it would have" in err


def test_images_that_cannot_be_read(weights, tmp_path, capsys):
    good, bad, cut = picture(tmp_path / "a.png"), tmp_path / "bad.jpg", tmp_path / "cut.jpg"
    bad.write_bytes(b"no image")
    picture(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    found = tmp_path / "out.json"
    call = ["predict", "gone.png", str(bad), good, str(cut), "--weights", str(weights), "--json", str(found)]
    assert command.main(call) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == good and len(out.splitlines()) == 7
    missing, corrupt, truncated = err.splitlines()
    assert missing == "error: image: there is no file gone.png"
    assert corrupt.startswith(f"error: image: {bad} cannot be read: ")
    assert truncated.startswith(f"error: image: {cut} cannot be read: ")
    assert [bool(result["error"]) for result in json.loads(found.read_text())] == [True, True, False, True]


def test_labels(tmp_path):
    labels = tmp_path / "l.txt"
    labels.write_text("a\nb b\n\nd\n\n\n", encoding="utf-8")
    card = replace(CARD, num_classes=4, classes=[])
    assert class_names(card, labels) == ["a", "b b", "", "d"] and class_names(card) == ["0", "1", "2", "3"]
    assert class_names(CARD) == NAMES
    with pytest.raises(UsageError, match=r"l\.txt has 4 names, the model has 6 classes"):
        class_names(CARD, labels)
    with pytest.raises(UsageError, match="the card has 6 names, the model has 4 classes"):
        class_names(replace(CARD, num_classes=4))
    labels.write_bytes(b"\xff\xfe\x00")
    for path in (labels, tmp_path / "gone.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            class_names(card, path)


def test_weights_without_a_card(model, tmp_path, capsys):
    """Without a card, images are prepared by the model's default configuration: 256 pixels, crop_pct 0.9."""
    from safetensors.torch import save_file

    weights, image, found = tmp_path / "w.safetensors", picture(tmp_path / "a.png"), tmp_path / "out.json"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    assert command.main(["predict", image, "--weights", str(weights)]) == 2
    assert "does not say what it is of: name the model with --model" in capsys.readouterr().err
    assert command.main(["predict", image, "--weights", str(weights), "--model", "xformer_s"]) == 2
    assert "is not of this model" in capsys.readouterr().err
    call = ["predict", image, "--weights", str(weights), "--model", "xformer_xxs", "--json", str(found)]
    assert command.main(call) == 0
    best = expected(model, image, replace(CARD, image_size=256)).max(0)
    ((guess, *_),) = (result["top"] for result in json.loads(found.read_text()))
    assert guess["name"] == str(best.indices.item()) and abs(guess["probability"] - best.values.item()) < 1e-4


def test_mistakes(weights, model, tmp_path, capsys):
    def said(*arguments, weights=weights):
        assert command.main(["predict", image, "--weights", str(weights), *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    image = picture(tmp_path / "a.png")
    assert said(weights="gone") == "error: weights: there is no file gone"
    assert "is not a safetensors file" in said(weights=image)
    assert said("--top", "0") == "error: top must be 1 or more, got 0"
    assert "cannot be written" in said("--json", str(tmp_path / "no" / "out.json"))
    assert said("--json", image) == f"error: json: it would replace {image}: name another file"
    assert said("--json", str(weights)) == f"error: json: it would replace {weights}: name another file"
    assert said("--score", "0.5") == "error: score means nothing to task classify, got 0.5"
    assert said("--out", "x") == "error: out means nothing to task classify, got 'x'"
    other = tmp_path / "other.safetensors"
    save_weights(other, model.state_dict(), replace(CARD, task="juggle"))
    assert re.fullmatch("error: task must be one of classify, detect, segment.*, got 'juggle'", said(weights=other))


def test_command(weights, tmp_path):
    image = picture(tmp_path / "a.png")
    call = [sys.executable, "-m", "xformer", "predict", image, "--weights", str(weights), "--labels", image]
    ran = subprocess.run(call, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"error: labels: {image} cannot be read")


@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.nightly), "ascii"])
def test_names_that_are_no_text_are_printed(weights, tmp_path, encoding):
    """File names that are not valid UTF-8 (here Latin-1) are printed, for existing and for missing images."""
    path = os.fsencode(picture(tmp_path / "a.png"))
    name = path.replace(b"a.png", b"caf\xe9 \xe4.png")
    os.rename(path, name)
    images = [name, name + b"x"]
    call = [sys.executable, "-m", "xformer", "predict", *images, "--weights", str(weights), "--json", "found.json"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.getcwd()}
    ran = subprocess.run(call, capture_output=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 1 and b"Traceback" not in ran.stderr, ran.stderr
    assert b"caf" in ran.stdout and b"caf" in ran.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [bool(image["error"]) for image in found] == [False, True]


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["export", "--help"]], ids=" ".join)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "predict" in printed if len(arguments) == 1 else "--weights" in printed


def test_a_package_that_is_not_there(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert command.main(["predict", picture(tmp_path / "a.png"), "--weights", str(weights)]) == 2
    assert "error: images need timm" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    call = ["export", "--model", "xformer_xxs", "--model-options", "attention=none", "--size", "64"]
    assert command.main([*call, "--to", str(tmp_path / "m.onnx")]) == 2
    assert "error: export needs the package onnx" in capsys.readouterr().err

"""The commands train, evaluate, use and export a task that is defined in one file outside the package."""

import json

import brightness
import pytest
import torch
from PIL import Image

from xformer import __main__ as command
from xformer.recipes import predict, tasks
from xformer.recipes.card import Card
from xformer.recipes.tasks import Option, find_task, register
from xformer.recipes.weights import load_weights


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for part, count in (("train", 12), ("val", 4)):
        (folder / part).mkdir()
        for i in range(count):
            value = (i + 0.5) / count
            Image.new("RGB", (16, 16), (round(255 * value),) * 3).save(folder / part / f"{i}-{value:.3f}.png")
    return folder


def test_commands(photos, tmp_path, capsys):
    out, settings = tmp_path / "run", ["--workers", "0", "--data", str(photos)]
    train = ["train", "--task", "brightness", "--model", "tiny", "--out", str(out), *settings, "--threads", "1"]
    train += ["--epochs", "40", "--batch-size", "4", "--lr", "0.05", "--warmup-epochs", "0", "--eval-every", "40"]
    assert command.main([*train, "--model-options", "width=6", "--no-tensorboard"]) == 0
    trained = dict(pair.split(" ") for pair in capsys.readouterr().out.strip().split("  "))
    assert float(trained["closeness"]) > 0.8
    weights = str(out / "last.safetensors")
    _, card = load_weights(weights)
    assert (card.task, card.model, card.options, card.classes) == ("brightness", "tiny", {"width": 6}, ["brightness"])

    assert command.main(["eval", "--weights", weights, *settings]) == 0
    said, images, metrics = capsys.readouterr().out.splitlines()
    assert said.startswith(f"{weights}: tiny, images of any size, less mean") and images == "4 images"
    assert metrics == f"closeness {trained['closeness']}"

    light, dark = (str(sorted((photos / "val").iterdir())[i]) for i in (3, 0))
    found = tmp_path / "found.json"
    assert command.main(["predict", light, dark, "--weights", weights, "--json", str(found), "--percent"]) == 0
    assert "%" in capsys.readouterr().out
    results = json.loads(found.read_text())
    assert [result["image"] for result in results] == [light, dark]
    assert results[0]["brightness"] > results[1]["brightness"] + 0.3
    assert command.main(["predict", light, "--weights", weights, "--top", "3"]) == 2
    assert capsys.readouterr().err == "error: top means nothing to task brightness, got 3\n"

    file = tmp_path / "m.pt2"
    assert (
        command.main(["export", "--weights", weights, "--to", str(file), "--size", "dynamic", "--with-preprocessing"])
        == 0
    )
    exported = torch.export.load(file).module()(torch.full((1, 20, 20, 3), 200, dtype=torch.uint8))
    assert exported.shape == (1, 1)


def test_settings_that_it_does_not_use_are_refused(photos, tmp_path, capsys):
    call = ["train", "--task", "brightness", "--data", str(photos), "--out", str(tmp_path / "run"), "--mixup", "0.2"]
    assert command.main(call) == 2
    assert capsys.readouterr().err == "error: mixup means nothing to task brightness, got 0.2\n"


def test_registry(monkeypatch):
    assert find_task("brightness") is brightness.BrightnessTask and find_task("brightness").name == "brightness"
    assert {"brightness", "classify", "detect", "segment"} <= tasks.all_tasks().keys()
    with pytest.raises(ValueError, match=r"task detect is registered by xformer\.recipes\.tasks\.detect, got another"):
        register("detect")(type("Other", (brightness.BrightnessTask,), {"__module__": "elsewhere"}))
    monkeypatch.setattr(brightness.BrightnessTask, "options", {"top": Option("", "a name")})
    with pytest.raises(ValueError, match="option top must be parsed alike by the tasks brightness and classify"):
        predict.task_options()


def test_options_of_the_model_are_checked():
    with pytest.raises(ValueError, match=r"model tiny of task brightness does not take these options: .*'depth'"):
        find_task("brightness").create(Card("tiny", 1, task="brightness", options={"depth": 3}))

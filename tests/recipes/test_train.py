"""Training runs on a few small images: results, resuming, and messages."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_cases import (
    CLASSES,
    HARD,
    ROOT,
    assert_equal_steps,
    assert_same_run,
    command,
    curves,
    environment,
    make_images,
    recipe,
    run,
    same_tensors,
)

from xformer.__main__ import main
from xformer.errors import UsageError
from xformer.recipes.checkpoint import Checkpoints
from xformer.recipes.eval import eval_weights
from xformer.recipes.settings import load_recipe
from xformer.recipes.train import train
from xformer.recipes.weights import load_model, load_weights
from xformer_kernels.layer.calibration import ENVIRONMENT


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train(recipe(images, out, **HARD))


def test_learns_and_writes(images, tmp_path):
    result = train(recipe(images, tmp_path, epochs=10, lr=2e-3, tensorboard=True))
    assert result["top1"] >= 90  # three levels of brightness
    assert result["best"] >= result["top1"]
    losses, evaluations = curves(tmp_path)
    assert [int(row["step"]) for row in losses] == list(range(2, 61, 2))
    assert [int(row["epoch"]) for row in evaluations] == list(range(10))
    assert float(losses[-1]["loss"]) < float(losses[0]["loss"])
    assert float(evaluations[-1]["top1"]) == pytest.approx(result["top1"])
    assert list((tmp_path / "tensorboard").glob("events*"))
    model, card = load_model(tmp_path / "best.safetensors")
    assert not model.training
    assert (card.model, card.classes, card.options) == ("xformer_xxs", list(CLASSES), {"stem_stride": 1})
    assert card.metrics["top1"] == pytest.approx(result["best"])
    again = eval_weights(recipe(images, tmp_path / "unused", weights=str(tmp_path / "last.safetensors")))
    assert again["top1"] == pytest.approx(result["top1"])
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_a_run_is_a_function_of_its_recipe(images, whole, tmp_path):
    out, result = whole
    before = torch.random.get_rng_state()
    assert train(recipe(images, tmp_path, **HARD, workers=2)) == result
    assert_same_run(out, tmp_path)
    assert not same_tensors(
        load_weights(out / "last.safetensors")[0],
        load_weights(out / "checkpoints" / "step-00000012" / "model.safetensors")[0],
    )  # last.safetensors has the averaged weights
    torch.random.set_rng_state(before)


@pytest.fixture(scope="module")
def logged(images, tmp_path_factory):
    """A run that logs at other steps than it saves checkpoints."""
    out = tmp_path_factory.mktemp("logged")
    train(recipe(images, out, **HARD | {"log_every": 3}))
    return out


@pytest.mark.parametrize("stopped_at", [4, 6, 8])
def test_resumes_to_the_same_bits(images, logged, tmp_path, monkeypatch, stopped_at):
    """A run stopped within an epoch, at its end or between rows of the log resumes bitwise equal."""

    class Stopped(Exception):
        pass

    save = Checkpoints.save

    def save_and_stop(self, step, *rest):
        save(self, step, *rest)
        if step == stopped_at:
            raise Stopped

    changes = HARD | {"log_every": 3}
    monkeypatch.setattr(Checkpoints, "save", save_and_stop)
    with pytest.raises(Stopped):
        train(recipe(images, tmp_path / "stopped", **changes))
    monkeypatch.setattr(Checkpoints, "save", save)
    train(recipe(images, tmp_path / "stopped", **changes), resume=True)
    assert_same_run(tmp_path / "stopped", logged)


def test_killed_runs_lose_at_most_one_interval(images, whole, tmp_path):
    """After kill -9 at any time, all checkpoints can be loaded, and the resumed run ends with the same result."""
    out = tmp_path / "run"
    arguments = command(images, out, "--resume", **HARD)
    reached = 0
    for pause in (0.0, 0.15):  # the second run resumes from the checkpoint of the first
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        checkpoints = Checkpoints(out)
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.poll() is None:
            if checkpoints.all() and int(checkpoints.all()[-1].name[5:]) > reached:
                break
            time.sleep(0.02)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for checkpoint in checkpoints.all():
            checkpoints.load(checkpoint)
        reached = int(checkpoints.all()[-1].name[5:])
        assert reached >= 4
    train(recipe(images, out, **HARD), resume=True)
    assert_same_run(out, whole[0])


def test_what_killed_runs_leave_is_cleared(images, tmp_path):
    left = tmp_path / "checkpoints" / ".part-3"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    train(recipe(images, tmp_path, epochs=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_two_processes_equal_one(images, tmp_path):
    """Two data-parallel processes with gloo equal one process that accumulates the same two parts of a batch.

    Both compute batch norm over eight images. The optimiser is SGD, because Adam divides rounding errors by themselves
    where gradients vanish.
    """
    changes = {"opt": "sgd", "lr": 0.05, "log_every": 1, "eval_every": 2}
    train(recipe(images, tmp_path / "one", accumulate=2, **changes))
    done = run(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *command(images, tmp_path / "two", **changes),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert len(curves(tmp_path / "one")[0]) == 6
    assert_equal_steps(tmp_path / "one", tmp_path / "two")
    # every image is evaluated once, by one of the processes
    assert float(curves(tmp_path / "two")[1][-1]["top1"]) % (100 / 12) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision": "bf16"}, marks=pytest.mark.nightly),
        {"grad_checkpointing": True, "channels_last": False},
        {"attention": "softmax"},
        {"model": "mobilevit_xxs", "model_options": {}, "image_size": 64},
        {"cutmix": 1.0, "clip_grad": 1.0, "opt": "lamb", "layer_decay": 0.8},
    ],
    ids=["bf16", "checkpointing", "softmax", "timm", "options"],
)
def test_settings_run(images, tmp_path, changes):
    if "precision" in changes:  # accelerate allows one precision per process
        arguments = command(images, tmp_path, epochs=1, **changes)
        done = run(arguments)
        assert done.returncode == 0, done.stderr
    else:
        train(recipe(images, tmp_path, epochs=1, **changes))
    assert all(float(row["loss"]) < 3 for row in curves(tmp_path)[0])
    _, card = load_model(tmp_path / "last.safetensors")
    assert card.options.get("attention") == changes.get("attention")


def test_starts_from_weights(images, tmp_path):
    train(recipe(images, tmp_path / "first", epochs=3))
    weights = str(tmp_path / "first" / "last.safetensors")
    train(recipe(images, tmp_path / "second", epochs=1, weights=weights, lr=1e-7, min_lr=1e-8))
    last, first = curves(tmp_path / "first")[0][-1], curves(tmp_path / "second")[0][0]
    assert float(first["loss"]) < 1.3 * float(last["loss"])
    with pytest.raises(
        UsageError, match=r"of another model: its attention is 'xfa', and the model's 'softmax'; --partial"
    ):
        train(recipe(images, tmp_path / "third", weights=weights, attention="softmax"))


def test_corrupt_images_are_skipped_and_counted(images, tmp_path, capfd, caplog):
    broken = tmp_path / "images"
    shutil.copytree(images, broken)
    (broken / "train" / "dark" / "3.png").write_bytes(b"this is not an image")
    result = train(recipe(broken, tmp_path / "run", epochs=1))
    assert 0 <= result["top1"] <= 100
    assert [record.getMessage() for record in caplog.records if "dark/3.png" in record.getMessage()]
    assert "1 unreadable images skipped" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------- what is refused


def test_says_what_is_wrong(images, whole, tmp_path):
    out, _ = whole
    for changes, message in (
        ({}, "holds the checkpoint step-00000012: go on with --resume"),
        ({"data": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe(images, out, **{**HARD, **changes}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="out: there can be no folder"):
        train(recipe(images, tmp_path / "file" / "out"))
    for changes, message in (
        ({"lr": 1.0}, "was made with lr=0.001, and this run has 1.0"),
        ({"model": "xformer_xs", "seed": 1}, "seed=0.*model differ too"),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe(images, out, **{**HARD, **changes}), resume=True)
    for changes, message in (
        ({"model": "xformer_l"}, "model must be one of xformer_s"),
        ({"task": "juggle"}, "task must be one of classify"),
        ({"attention": "linear"}, "attention must be one of 'xfa'"),
        ({"batch_size": 64}, "batch"),
        ({"accumulate": 100}, "make no step"),
        ({"image_size": 16}, "leaves one token"),
        ({"sync_bn": True}, "sync_bn must be off on cpu"),
        ({"opt": "adamm"}, "opt must be an optimiser of timm's, got 'adamm'"),
        ({"lr": 1e30, "clip_grad": 0.0, "opt": "sgd", "smoothing": 0.0}, "lr: the loss is"),
    ):
        with pytest.raises(UsageError, match=message):
            train(recipe(images, tmp_path / message[:5], **changes))


def test_a_damaged_checkpoint_is_named(images, whole, tmp_path):
    train(recipe(images, tmp_path, epochs=1))
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    (checkpoint / "optimizer.pt").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"step-00000006 cannot be read.*remove it"):
        train(recipe(images, tmp_path, epochs=1), resume=True)


def test_errors_are_one_sentence_without_a_traceback(images, tmp_path):
    done = run(command(tmp_path / "nowhere", tmp_path / "out"))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and "nowhere" in line


def test_weights_of_other_classes(images, whole, tmp_path):
    weights = str(whole[0] / "last.safetensors")
    with pytest.raises(UsageError, match=r"has 3 classes, and digits has 10"):
        eval_weights(load_recipe("small", {"data": "digits", "weights": weights}))


# ------------------------------------------------------------------------------------------------------- settings


def test_recipes_and_changes(tmp_path):
    for name in ("xformer_s", "xformer_xs", "xformer_xxs"):
        loaded = load_recipe(name)
        assert loaded.model == name and loaded.epochs == 300 and loaded.sizes
    (tmp_path / "r.yaml").write_text(
        "model: xformer_xs\nlr: 1\nmin_lr: 2e-3\nsizes: [128, 160]\noptimisation:\n  epochs: 3\n"
    )
    loaded = load_recipe(tmp_path / "r.yaml", {"seed": 7})
    assert (loaded.model, loaded.lr, loaded.sizes, loaded.epochs, loaded.seed) == ("xformer_xs", 1.0, [128, 160], 3, 7)
    assert loaded.min_lr == 0.002
    (tmp_path / "r.toml").write_text("lear = 1\n")
    for path, changes, message in (
        (tmp_path / "r.toml", {}, "there is no setting lear"),
        (tmp_path / "no.toml", {}, "there is no recipe"),
        ("small", {"lr": "fast"}, "lr must be a number, got 'fast'"),
        ("small", {"epochs": 0}, "epochs must be 1 or more, got 0"),
        ("small", {"ema": 1.0}, "ema must be from 0 to below 1, got 1.0"),
        ("small", {"hflip": 1.5}, "hflip must be from 0 to 1, got 1.5"),
        ("small", {"lr": 0.0}, "lr must be finite and above 0, got 0.0"),
        ("small", {"weight_decay": float("nan")}, "weight_decay must be finite, 0 or more, got nan"),
        ("small", {"checkpoint_every": -1}, "checkpoint_every must be finite, 0 or more, got -1"),
        ("small", {"sizes": [32, 0]}, "sizes must be 1 or more each, got"),
        ("small", {"precision": "fp8"}, "precision must be one of no, bf16, fp16"),
    ):
        with pytest.raises(UsageError, match=message):
            load_recipe(path, changes)


def test_a_setting_twice_and_marks_of_byte_order(tmp_path):
    (tmp_path / "r.toml").write_text("lr = 1e-3\n[a]\nepochs = 3\n[b]\nlr = 2e-3\n")
    with pytest.raises(UsageError, match="two settings lr, in different tables"):
        load_recipe(tmp_path / "r.toml")
    for name, text in (("r.toml", "epochs = 3\n"), ("r.yaml", "epochs: 3\n")):
        (tmp_path / name).write_bytes(f"\ufeff{text}".encode())
        assert load_recipe(tmp_path / name).epochs == 3


def test_the_command_line_changes_a_recipe(capsys):
    more = ["--show", "--attention", "softmax", "--sizes", "32", "48", "--no-tensorboard"]
    done = run(["-m", "xformer", "train", "--config", "small", *more, "--model-options", "se=True", "mlp_ratio=3.0"])
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert (shown["attention"], shown["sizes"], shown["tensorboard"]) == ("softmax", [32, 48], False)
    assert shown["model_options"] == {"stem_stride": 1, "se": True, "mlp_ratio": 3.0}
    assert main(["train", "--config", "small", "--show", "--model-options"]) == 0
    assert json.loads(capsys.readouterr().out)["model_options"] == {}


def test_forms_of_layers_do_not_depend_on_times(monkeypatch):
    """Training does not choose layer forms by timing unless asked, so that a resumed run uses the same forms."""
    asked = []
    monkeypatch.setattr("xformer.recipes.train.train", lambda *_: asked.append(os.environ.get(ENVIRONMENT)) or {})
    for given, expected in ((None, "off"), ("figures.json", "figures.json")):
        monkeypatch.setenv(ENVIRONMENT, given or "")  # undoes changes that the run makes
        if given is None:
            monkeypatch.delenv(ENVIRONMENT)
        assert main(["train", "--config", "small"]) == 0
        assert asked.pop() == expected

"""Runs that cannot succeed end early with one sentence, and keep the checkpoints of completed training."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
from train_cases import ROOT, assert_same_run, command, curves, environment, make_images, recipe, run

from xformer.errors import UsageError
from xformer.recipes.checkpoint import Checkpoints
from xformer.recipes.files import held, write_json
from xformer.recipes.tasks.classify import Accuracy
from xformer.recipes.train import train
from xformer.recipes.weights import load_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def refused(message, *run, **more):
    with pytest.raises(UsageError, match=message) as caught:
        train(recipe(*run), **more)
    assert "\n" not in str(caught.value)


def not_trained(out):
    """Whether no training step was made."""
    return not (out / "checkpoints").exists() and not (out / "train.csv").read_text()


# -------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("changes", [
    {"opt": "sgd", "lr": 1e30}, {"opt": "adamw", "lr": 1e30}, {"opt": "sgd", "lr": 3e38, "ema": 0.5},
], ids=["sgd", "adamw", "ema"])  # fmt: skip
def test_weights_that_are_not_finite_are_never_written(images, tmp_path, changes):
    """Non-finite weights are never written. With one step per epoch, the loss is that of the finite weights before."""
    more = {"batch_size": 48, "epochs": 3, "log_every": 100, "clip_grad": 0.0, **changes}
    with pytest.raises(UsageError, match=r"not finite|the loss is|gives loss"):
        train(recipe(images, tmp_path, **more))
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_weights(path)[0].values()), path
    assert not (tmp_path / "last.safetensors").exists()


def test_an_evaluation_without_a_result_is_an_error(images, tmp_path, monkeypatch):
    """A metric of NaN is an error, and the checkpoint of the training is kept."""
    monkeypatch.setattr(Accuracy, "compute", lambda self: {"top1": math.nan, "loss": 1.0})
    with pytest.raises(UsageError, match="the evaluation at step 6 gives top1 nan"):
        train(recipe(images, tmp_path, epochs=2))
    assert not (tmp_path / "best.safetensors").exists()
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000006"]


def test_json_has_no_nan(tmp_path):
    content = {"a": math.nan, "b": [1.0, -math.inf], "c": {"d": (math.inf, 2)}}
    write_json("json", tmp_path / "x.json", content)

    def strict(text):
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))

    assert strict((tmp_path / "x.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": [None, 2]}}


# ------------------------------------------------------------------------------------------------ one run, one folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """The folder of a run of one epoch."""
    out = tmp_path_factory.mktemp("trained")
    train(recipe(images, out, epochs=1))
    return out


@pytest.mark.parametrize("change, message", [
    (lambda root: [(root / split / "dark").rename(root / split / "black") for split in ("train", "val")],
     r"number 0 was 'dark' and is 'black'"),
    (lambda root: [shutil.copytree(root / split / "dark", root / split / "more") for split in ("train", "val")],
     r"has 3 classes and \S+ has 4, of which number 3 was None and is 'more'"),
    (lambda root: (root / "train" / "dark" / "3.png").unlink(), "other training samples"),
    (lambda root: (root / "train" / "dark" / "3.png").rename(root / "train" / "dark" / "33.png"), "other training"),
    (lambda root: (root / "train" / "dark" / "3.png").rename(root / "train" / "light" / "33.png"), "other training"),
    (lambda root: (root / "val" / "dark" / "3.png").unlink(), "other evaluation samples"),
], ids=["renamed", "more classes", "fewer", "other name", "other class", "evaluation"])  # fmt: skip
def test_classes_and_samples_belong_to_a_run(images, trained, tmp_path, change, message):
    shutil.copytree(images, tmp_path / "set")
    shutil.copytree(trained, tmp_path / "out")
    change(tmp_path / "set")
    with pytest.raises(UsageError, match=message):
        train(recipe(tmp_path / "set", tmp_path / "out", epochs=1), resume=True)


def test_a_run_goes_on_where_its_data_has_moved_to(images, trained, tmp_path):
    shutil.copytree(images, tmp_path / "moved")
    shutil.copytree(trained, tmp_path / "out")
    assert train(recipe(tmp_path / "moved", tmp_path / "out", epochs=1), resume=True)["best"] >= 0


def test_a_folder_has_one_run_at_a_time(images, tmp_path):
    code = "import sys\nfrom xformer.recipes.files import held\n"
    code += f"with held('out', {str(tmp_path)!r}):\n print()\n sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-uc", code], cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(UsageError, match=r"^out: another run is writing in"):
            train(recipe(images, tmp_path, epochs=1))
        other.kill()
    with held("out", tmp_path):  # the lock of a killed run is released
        pass


@pytest.mark.parametrize("content, message", [
    ("{}", "state.json has no step"),
    ("[]", "state.json has no step"),
    ('{"step": "6"}', "state.json has no step"),
    ("", "cannot be read"),
])  # fmt: skip
def test_a_state_that_is_none_is_named(images, trained, tmp_path, content, message):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "step-00000006" / "state.json").write_text(content)
    with pytest.raises(UsageError, match=rf"resume: \S+step-00000006.*{message}.*remove"):
        train(recipe(images, tmp_path / "out", epochs=1), resume=True)


@pytest.mark.parametrize("text", ["step,loss\nsix,1.0\n", "step,loss\n,1.0\n", "loss\n1.0\n", "step,loss\n2,1.0,5\n"])
def test_an_edited_log_is_named(images, trained, tmp_path, text):
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "train.csv").write_text(text)
    with pytest.raises(UsageError, match=r"resume: line 2 of \S+train.csv"):
        train(recipe(images, tmp_path / "out", epochs=1), resume=True)


def test_other_folders_beside_checkpoints_are_none(tmp_path):
    for name in ("step-00000008", "step-8.bak", "step-", "step-00000009 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000010").write_text("")
    assert [path.name for path in Checkpoints(tmp_path).all()] == ["step-00000008"]


# -------------------------------------------------------------------------------------- evaluations are tried first


def unreadable(root):
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"none")


def one_class(root):
    for split in ("train", "val"):
        for name in ("light", "middle"):
            shutil.rmtree(root / split / name)


@pytest.mark.parametrize("change, settings, message", [
    (unreadable, {}, "none of the first 12 evaluation images can be read"),
    (one_class, {}, "must have two classes or more, got 1: dark"),
    (None, {"model_options": {"features_only": True}}, "model_options must not have features_only"),
    (None, {"model_options": {"num_classes": 3, "global_pool": ""}}, "must not have num_classes, global_pool=''"),
    (None, {"model_options": {"mlp_ratio": -1}}, "these options: mlp_ratio must be a finite number above"),
    (None, {"model_options": {"attention": "none"}, "attention": "xfa"}, "attention must be given once, got attention"),
    (None, {"crop_pct": 100.0}, "crop_pct must be above 0 and at most 1, got 100"),
    (None, {"model": "vit_tiny_patch16_224", "model_options": {}, "image_size": 64}, "does not take images of 64 x 64"),
    (None, {"model": "vit_tiny_patch16_224", "model_options": {"img_size": 32}, "sizes": [32, 48]},
     "does not take images of 48 x 48"),
    (None, {"opt": "adahessian"}, "'adahessian', which needs create_graph"),
    (None, {"opt": "fusedsgd"}, "opt must be an optimiser of timm's, got 'fusedsgd'"),
    (None, {"sizes": [8, 32]}, "img_size=8 leaves one token"),
    (None, {"batch_size": 1, "model": "resnet18", "model_options": {}}, "batch_size must leave batch norms"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_an_evaluation_needs_is_tried_before_an_epoch(images, tmp_path, change, settings, message):
    root = images
    if change:
        root = tmp_path / "set"
        shutil.copytree(images, root)
        change(root)
    with pytest.raises(UsageError, match=message):
        train(recipe(root, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists() or not_trained(tmp_path / "out")


def test_what_was_learned_is_written_before_it_is_evaluated(images, tmp_path, monkeypatch):
    """A failed evaluation does not lose an epoch: the resumed run repeats it, with bitwise equal results."""
    train(recipe(images, tmp_path / "whole", epochs=3, eval_every=2))
    real, calls = Accuracy.compute, []

    def fail(self):
        calls.append(self)
        raise RuntimeError("no memory left")

    monkeypatch.setattr(Accuracy, "compute", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        train(recipe(images, tmp_path / "out", epochs=3, eval_every=2))
    assert Checkpoints(tmp_path / "out").all()[-1].name == "step-00000012"
    monkeypatch.setattr(Accuracy, "compute", real)
    train(recipe(images, tmp_path / "out", epochs=3, eval_every=2), resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    best = [load_weights(tmp_path / name / "best.safetensors")[1] for name in ("out", "whole")]
    assert best[0] == best[1]


FULL = """
import resource, sys
from xformer.__main__ import main
kilobytes, *words = sys.argv[1:]
for limit in kilobytes.split(","):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * int(limit), resource.RLIM_INFINITY))
    print(main(words))
"""


@pytest.mark.nightly
def test_a_full_disk_is_one_sentence(images, tmp_path):
    """If the weights or the optimiser of a checkpoint cannot be written (file size limit), there is one error."""
    _, _, *words = command(images, tmp_path, epochs=1)
    done = run(["-c", FULL, "64,6000", *words])
    assert done.stdout.split()[-2:] == ["2", "2"], done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2
    assert all(line.startswith("error: out: ") and "cannot be written" in line for line in lines)
    assert "Traceback" not in done.stderr and not Checkpoints(tmp_path).all()


# -------------------------------------------------------------------------------------------------- interrupts


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param([], id="alone"),
        pytest.param(
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
            id="two processes",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_an_interrupt_leaves_a_checkpoint_and_a_sentence(images, tmp_path, launch):
    """An interrupt writes a checkpoint of the last complete step, and a message with its number."""
    changes = {"epochs": 6000, "log_every": 1, "eval_every": 6000}  # more than it can run before the interrupt
    arguments = [*launch, *command(images, tmp_path, **changes)]
    with subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # is ignored if tests run in the background
    ) as process:  # fmt: skip
        for line in process.stderr:
            if line.startswith("train  step 2 "):
                break
        os.killpg(process.pid, signal.SIGINT) if not launch else process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    (sentence,) = [line for line in said.splitlines() if line.startswith("stopped")]
    (kept, *_) = reversed(Checkpoints(tmp_path).all())
    step = int(kept.name[5:])
    assert f"stopped at step {step} of" in sentence and "--resume" in sentence
    if not launch:
        assert process.returncode == 130 and "Traceback" not in said
    assert int(curves(tmp_path)[0][-1]["step"]) >= step > 1


def test_a_batch_that_leaves_batch_norm_one_value(images, tmp_path):
    """One image that is reduced to one pixel gives an error."""
    message = r"batch_size must leave batch norms of mobilenetv3_small_050 more than one value a channel, got 1"
    with pytest.raises(UsageError, match=message):
        train(
            recipe(
                images,
                tmp_path,
                batch_size=1,
                image_size=16,
                model="mobilenetv3_small_050",
                model_options={},
                mixup=0.0,
                cutmix=0.0,
            )
        )


@pytest.mark.nightly
def test_many_processes_say_an_error_once(images, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*launch, *command(tmp_path / "nowhere", tmp_path)])
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "nowhere" in line

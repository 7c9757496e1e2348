"""Segmentation and detection resume, run on several processes and start from weights, like classification."""

import json

import pytest
import torch
from safetensors.torch import save_file
from scene_cases import ANCHORS, LAYOUTS, OPTIONS, make_scenes, recipe
from train_cases import assert_equal_steps, assert_same_run, curves, run

pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")

import xformer
from xformer.errors import UsageError
from xformer.recipes.card import Card
from xformer.recipes.eval import eval_weights
from xformer.recipes.settings import load_recipe
from xformer.recipes.train import train
from xformer.recipes.weights import build_model, load_model, save_weights, start_from

TASKS = tuple(LAYOUTS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made")


def files(recipes, folder):
    folder.mkdir()
    paths = [folder / f"{number}.json" for number in range(len(recipes))]
    for path, of_it in zip(paths, recipes, strict=True):
        path.write_text(json.dumps(of_it.to_dict()))
    return map(str, paths)


@pytest.mark.parametrize("task", TASKS)
def test_runs_resumes_and_loads(task, scenes, tmp_path):
    """A run resumed within an epoch is bitwise equal, and its saved weights evaluate to the reported metrics."""
    changes = {"checkpoint_every": 1, "ema": 0.9, "keep": 9, "drop_path": 0.2}
    result = train(recipe(task, scenes, tmp_path / "whole", **changes))
    assert all(0 <= value <= 100 for value in result.values())
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) == 4
    part = tmp_path / "part"
    (part / "checkpoints").mkdir(parents=True)
    checkpoints[0].rename(part / "checkpoints" / checkpoints[0].name)
    for name in ("train.csv", "eval.csv"):  # resuming drops the later rows
        (part / name).write_text((tmp_path / "whole" / name).read_text())
    assert train(recipe(task, scenes, part, **changes), resume=True) == result
    assert_same_run(part, tmp_path / "whole")
    model, card = load_model(part / "last.safetensors")
    assert card.task == task and card.classes[0] == {"detect": "disc", "segment": "road"}[task]
    if task == "detect":
        assert card.options["anchors"] == ANCHORS and model.anchors == tuple(map(tuple, ANCHORS))
    data = {"data": str(scenes / LAYOUTS[task]), "workers": 0}
    again = eval_weights(load_recipe("", data | {"weights": str(part / "last.safetensors")}))
    assert again == pytest.approx({name: result[name] for name in again}, rel=1e-3)
    best = eval_weights(load_recipe("", data | {"weights": str(part / "best.safetensors")}))
    _, card = load_model(part / "best.safetensors")
    assert best == pytest.approx(card.metrics, rel=1e-3)
    assert max(best.values()) > 0


@pytest.mark.nightly
def test_two_processes_equal_one(scenes, tmp_path):
    """Two processes with gloo equal one process that accumulates the same two parts of a batch.

    There is no dropout, because its random numbers differ between processes.
    """

    def runs(name, **more):
        changes = {"opt": "sgd", "lr": 0.01, "eval_every": 2, "batch_size": 2, "color_jitter": 0.0, **more}
        options = {"detect": OPTIONS["detect"], "segment": {**OPTIONS["segment"], "drop_rate": 0.0}}
        return [recipe(t, scenes, tmp_path / name / t, model_options=options[t], **changes) for t in TASKS]

    for one in runs("one", accumulate=2):
        train(one)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/recipes/train_recipes.py"]
    done = run([*launch, *files(runs("two"), tmp_path / "files")])
    assert done.returncode == 0, done.stderr
    for task in TASKS:
        one, two = (tmp_path / name / task for name in ("one", "two"))
        assert len(curves(one)[0]) == 4
        assert_equal_steps(one, two)


@pytest.mark.nightly
def test_mixed_precision(scenes, tmp_path):
    """The losses of bf16 and float32 agree up to rounding. accelerate allows one precision per process."""
    recipes = [recipe(task, scenes, tmp_path / "bf16" / task, epochs=1, precision="bf16") for task in TASKS]
    done = run(["tests/recipes/train_recipes.py", *files(recipes, tmp_path / "files")])
    assert done.returncode == 0, done.stderr
    for task in TASKS:
        train(recipe(task, scenes, tmp_path / "fp32" / task, epochs=1))
        rounded, exact = (curves(tmp_path / name / task)[0] for name in ("bf16", "fp32"))
        assert len(rounded) == 2 and rounded != exact
        for row, other in zip(rounded, exact, strict=True):
            assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=0.05)


# ------------------------------------------------------------------------------------------------------ weights


def card(task, model="xformer_xxs"):
    return Card(model, 5, task, {"widths": [16, 16, 16]} if task == "detect" else {})


def write(path, card, prefix=""):
    torch.manual_seed(1)
    state = build_model(card).state_dict()
    save_weights(path, {name.removeprefix(prefix): value for name, value in state.items()}, card)
    return state


@pytest.mark.parametrize("bare", [False, True], ids=["card", "bare"])
@pytest.mark.parametrize("task", TASKS)
def test_a_classifier_is_a_backbone(task, bare, tmp_path):
    """A classifier without its head, with or without a card, initialises the backbone and nothing else."""
    path = tmp_path / "w.safetensors"
    state = write(path, card("classify"))
    if bare:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    model = build_model(card(task)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (left_out,) = start_from(model, card(task), path)
    own = {name.removeprefix("backbone."): value for name, value in model.state_dict().items()}
    head = [name for name in state if name not in own]
    assert head and all(name.startswith(("classifier.", "head_conv.")) for name in head)
    assert left_out == f"{len(head)} tensors there are not of the model, such as {min(head)}"
    for name, value in own.items():
        assert torch.equal(value, state[name] if name in state else before[name]), name
    assert any(not torch.equal(before[f"backbone.{name}"], state[name]) for name in own.keys() & state.keys())


def test_weights_of_other_models_and_tasks(tmp_path):
    path = tmp_path / "w.safetensors"
    segmenter = write(path, card("segment"))
    other = build_model(card("segment"))
    assert start_from(other, card("segment"), path) == []
    assert all(torch.equal(value, segmenter[name]) for name, value in other.state_dict().items())

    detector = build_model(card("detect"))
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    with pytest.raises(UsageError, match=r"is of task segment, and must be of classify or detect; --partial takes"):
        start_from(detector, card("detect"), path)
    with pytest.raises(UsageError, match=r"is of task segment, and must be of classify; --partial"):
        start_from(build_model(card("classify")), card("classify"), path)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    said = start_from(detector, card("detect"), path, partial=True)
    assert len(said) == 2 and "such as laterals.0" in said[0] and "such as decoder.bn.bias" in said[1]
    assert torch.equal(detector.state_dict()["backbone.stem.conv.weight"], segmenter["backbone.stem.conv.weight"])

    state = write(path, card("classify", "xformer_xs"))
    with pytest.raises(UsageError, match=r"of another model: it is of xformer_xs, and the model is xformer_xxs; --par"):
        start_from(detector, card("detect"), path)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    with pytest.raises(UsageError, match=r"must have the \d+ tensors of the backbone, got \d+ of them, without st"):
        start_from(detector, card("detect"), path)
    said = start_from(detector, card("detect"), path, partial=True)
    assert any(" here and " in what for what in said)


def test_training_starts_from_a_classifier(scenes, tmp_path, capfd):
    torch.manual_seed(1)
    classifier = xformer.xformer_xxs(num_classes=7)
    path = tmp_path / "w.safetensors"
    save_weights(path, classifier.state_dict(), Card("xformer_xxs", 7))
    for task in TASKS:
        changes = {"weights": str(path), "epochs": 1, "lr": 1e-9, "min_lr": 1e-9, "warmup_lr": 1e-9}
        train(recipe(task, scenes, tmp_path / task, **changes))
        assert "weights: left out: " in capfd.readouterr().err
        model, _ = load_model(tmp_path / task / "last.safetensors")
        wanted = dict(classifier.named_parameters())
        for name, parameter in model.get_submodule("backbone").named_parameters():
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-6)

"""The comparison on made scenes: torchvision's models by our recipes, files with every run."""

import json

import pytest
import torch

pytest.importorskip("torchvision", reason="torchvision is not installed")

from experiments import ablation, runs, scenes, ssdlite
from experiments.shapes import make_shapes
from xformer.recipes.settings import load_recipe
from xformer.recipes.tasks import find_task


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    make_shapes(folder / "shapes", images=8, held_out=4, size=(64, 64))
    return folder


@pytest.fixture
def task_and_net(work):
    data = str(work / "shapes" / "coco")
    recipe = load_recipe("detect_shapes", {"data": data, "image_size": 64, "sizes": [], "batch_size": 8, "workers": 0})
    torch.manual_seed(0)
    task = ssdlite.SsdLite(recipe)
    return task, task.build()


def test_losses_are_what_torchvision_makes_of_the_same_targets(task_and_net):
    task, net = task_and_net
    images, targets = next(iter(task.data.train(0)))
    targets[0]["iscrowd"][:] = True
    targets[1] = targets[1] | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets[1]["iscrowd"] = torch.zeros(0, dtype=torch.bool)
    counted = [{"boxes": t["boxes"][~t["iscrowd"]], "labels": t["labels"][~t["iscrowd"]] + 1} for t in targets]
    ssd = net.train().ssd
    ssd.transform.fixed_size, ssd.transform.image_mean, ssd.transform.image_std = (64, 64), [0.0] * 3, [1.0] * 3
    loss = task.loss(net(images), targets)
    expected = sum(ssd(list(images), counted).values())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_anchors_keep_their_pixels(task_and_net):
    """In crops of other sizes than the recipe's images, whose shares they are otherwise."""
    _, net = task_and_net
    with torch.no_grad():
        whole, crop = (net.eval()(torch.zeros(1, 3, side, side))[1][0] for side in (64, 32))
    shapes = [{tuple(box) for box in (a[:, 2:] - a[:, :2]).mul(100).round().int().tolist()} for a in (whole, crop)]
    assert shapes[0] == shapes[1]


def test_detections_are_counted_by_our_categories(task_and_net):
    """Outputs that say where the boxes are have the metric's best value; class 0 is background."""
    task, _ = task_and_net
    metrics = task.metrics("cpu")
    for _, targets in task.data.evaluate():
        anchors = [torch.cat((t["boxes"], torch.tensor([[0.0, 0.0, 64.0, 64.0]]))) for t in targets]
        for i, target in enumerate(targets):
            logits = torch.full((1, len(anchors[i]), len(task.data.classes) + 1), -20.0)
            logits[0, range(len(target["labels"])), target["labels"] + 1] = 20.0
            logits[0, -1, 0] = 20.0
            head = {"bbox_regression": torch.zeros(1, len(anchors[i]), 4), "cls_logits": logits}
            metrics.update((head, [anchors[i]]), [target])
    assert metrics.compute()["map"] > 99.9


@pytest.mark.nightly
@pytest.mark.parametrize("task, metric", [("detect", "map50"), ("segment", "miou")])
def test_runs_of_all_models_are_written(work, task, metric):
    out = work / "results"
    arguments = ["--tasks", task, "--seeds", "3", "--epochs", "1", "--jobs", "1"]
    scenes.main([*arguments, "--work", str(work), "--out", str(out)])
    (path,) = out.glob(f"*/scenes-{task}.json")
    run = json.loads(path.read_text())
    assert [row["model"] for row in run["rows"]] == list(scenes.MODELS[task])
    for row in run["rows"]:
        assert (row["task"], row["seed"], row["epochs"], row["images"]) == (task, 3, 1, 8)
        assert 0 <= row[metric] <= 100 and row["minutes"] > 0 and row["parameters"] > 1e6
    assert run["commit"] and run["recipe"]["lr"] > 0
    assert run["rows"][0]["model"] in path.with_suffix(".csv").read_text()


def test_table_of_a_run(load, tmp_path, monkeypatch):
    """Seeds as mean, least and most; minutes of runs that were not stopped."""
    table = load("table")
    monkeypatch.setattr("bench.cells.ROOT", tmp_path)
    assert "Not measured yet" in table.render_scenes("detect", tmp_path)
    rows = [
        {"model": "ours", "seed": seed, "epochs": 12, "images": 400, "parameters": 1_234_000, "map50": 80.0 + seed,
         "map": 50.0, "minutes": None if seed else 4.0, "commit": "abc"}
        for seed in (0, 1)
    ]  # fmt: skip
    facts = {
        "machine": "M", "threads": 1, "allocator": "default", "date": "2026-01-02T03", "commit": "def",
        "versions": {"torch": "2", "torchvision": "0", "timm": "1"},
    }  # fmt: skip
    runs.save(tmp_path / "scenes-detect", facts, rows)
    text = table.render_scenes("detect", tmp_path)
    assert "| ours | 1.23M | 0, 1 | 80.50 (80.00 to 81.00) | 50.00 (50.00 to 50.00) | 4.0 |" in text
    assert "commit abc" in text and "12 epochs of 400 scenes" in text
    assert table.replace(f"before\n{text}\nafter", text) == f"before\n{text}\nafter"


def test_rules_of_the_ablation(work):
    """Each changes what its name says of the recipe's rules, and the last one all of them."""
    found = {}
    for name, (_, options) in ablation.CHANGES.items():
        recipe = load_recipe("detect_shapes", {"task": f"detect-{name}", "data": str(work / "shapes" / "coco")})
        recipe.model_options |= options
        loss = find_task(recipe.task)(recipe).criterion
        found[name] = (loss.objectness, loss.anchor_iou, loss.centre_scale)
    assert found == {
        "recipe": ("iou", 0.5, 2.0), "without-iou-objectness": ("one", 0.5, 2.0),
        "without-several-anchors": ("iou", 1.0, 2.0), "without-several-cells": ("iou", 0.5, 1.0),
        "yolov3": ("one", 1.0, 1.0),
    }  # fmt: skip

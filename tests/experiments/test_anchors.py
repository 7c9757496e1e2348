"""Anchors for a data set: k-means of the sizes of its boxes."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("torchvision", reason="detection needs torchvision")

from experiments.anchors import kmeans, main, mean_iou
from xformer.detection import ANCHORS, Detector
from xformer.errors import UsageError


def test_kmeans():
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randn(2000, 2, generator=generator, dtype=torch.float64) * 0.8 + 4).exp()
    anchors, history = kmeans(sizes)
    assert anchors.shape == (9, 2)
    assert (anchors.prod(1).diff() > 0).all()
    assert len(history) > 3 and all(a <= b + 1e-12 for a, b in pairwise(history))
    assert mean_iou(sizes, anchors) == pytest.approx(history[-1]) and history[-1] > 0.6
    assert mean_iou(sizes, torch.tensor(ANCHORS).double()) < history[-1]
    assert torch.equal(kmeans(sizes)[0], anchors) and not torch.equal(kmeans(sizes, seed=1)[0], anchors)
    Detector("xformer_xxs", anchors=anchors.tolist())


def test_kmeans_finds_clusters():
    """Three sizes, many times each: three anchors are these, and all boxes fit."""
    three = torch.tensor([[10.0, 10.0], [20.0, 60.0], [100.0, 90.0]])
    anchors, history = kmeans(three.repeat(5, 1).flip(0), k=3)
    torch.testing.assert_close(anchors, three.double())
    assert history[-1] == pytest.approx(1)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (torch.rand(8, 2) + 1, "sizes must be of k=9 different boxes or more, got 8"),
        (torch.ones(20, 2), "sizes must be of k=9 different boxes or more, got 1"),
        (torch.rand(20, 2) - 2, "sizes must be positive and finite"),
        (torch.full((20, 2), math.inf), "sizes must be positive and finite"),
        (torch.ones(20, 4), r"sizes must be of shape \(n, 2\), got \(20, 4\)"),
    ],
)
def test_kmeans_refuses(sizes, message):
    with pytest.raises(UsageError, match=message):
        kmeans(sizes)


def test_anchors_command(tmp_path, capsys):
    """Images of 832 are halved, and a crowd is no box."""
    boxes = [{"image_id": 1, "bbox": [0, 0, 4 * i, 8 * i]} for i in range(1, 10)]
    boxes += [{"image_id": 1, "bbox": [0, 0, 500, 1], "iscrowd": 1}, {"image_id": 1, "bbox": [0, 0, 0, 1]}]
    path = tmp_path / "instances.json"
    boxes = [{"id": i, "category_id": 3, **box} for i, box in enumerate(boxes)]
    image = {"id": 1, "file_name": "a.jpg", "width": 832, "height": 400}
    content = {"images": [image], "categories": [{"id": 3, "name": "box"}], "annotations": boxes}
    path.write_text(json.dumps(content))
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("anchors = ((2.00, 4.00), (4.00, 8.00), ") and "mean IoU 1.0000 of 9 boxes at 416" in out
    assert main([str(path), "-k", "10"]) == 2
    assert "error: sizes must be of k=10" in capsys.readouterr().err
    path.write_text("[]")
    assert main([str(path)]) == 2 and "as COCO's files of instances do" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json")]) == 2 and "cannot read" in capsys.readouterr().err

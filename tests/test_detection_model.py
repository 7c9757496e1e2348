"""The detector: budgets, shapes, gradients; coding of boxes, detections."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("torchvision", reason="detection needs torchvision")
from torchvision.ops import box_iou

import xformer
from xformer.detection import ANCHORS, DetectionLoss, Detector, detect
from xformer.detection import boxes as coding
from xformer.errors import UsageError
from xformer_kernels.testing import assert_bitwise


def small(num_classes=3, **options):
    return Detector("xformer_xxs", num_classes, widths=(16, 24, 32), zero_init_last=False, **options)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def empty_maps(batch=1, size=32, num_classes=2, dtype=torch.float32):
    """Raw maps of which nothing is an object."""
    maps = [torch.zeros(batch, 3 * (5 + num_classes), size // s, size // s, dtype=dtype) for s in coding.STRIDES]
    for m in maps:
        m.unflatten(1, (3, -1))[:, :, 4] = -20
    return maps


def test_budget():
    pytest.importorskip("fvcore", reason="fvcore counts")
    from xformer.counts import count

    counts = count(Detector(), 416)
    assert abs(counts.parameters - 6.3e6) <= 0.1e6
    assert counts.macs <= 3.8e9
    assert set(counts.unknown) <= {f"aten::{op}" for op in ("hardswish", "add", "mul", "unflatten", "softmax")}


@pytest.mark.parametrize("name", xformer.VARIANTS)
def test_shapes(name):
    model = Detector(name, num_classes=4, in_chans=1).eval()
    with torch.no_grad():
        maps = model(images(2, 1, 64, 96))
        assert [m.shape for m in maps] == [(2, 27, 8, 12), (2, 27, 4, 6), (2, 27, 2, 3)]
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
        for m in model(images(2, 1, 64, 96)):
            assert m.isfinite().all()


def test_images_of_odd_sizes_are_padded():
    """On the right and below: maps are those of the image in a larger one of zeros."""
    model = small().eval()
    x = images(1, 3, 70, 33)
    padded = torch.zeros(1, 3, 96, 64)
    padded[..., :70, :33] = x
    with torch.no_grad():
        for got, expected in zip(model(x), model(padded), strict=True):
            assert_bitwise(got, expected, "map")


def test_priors():
    """Before training scores are near 0.01 / classes, and boxes near the middle of cells, as large as anchors."""
    torch.manual_seed(5)  # weights are random: of some seeds a few predictions are further off
    model = small(num_classes=5).eval()
    with torch.no_grad():
        maps = model(images(1, 3, 128, 128))
    rows = coding.flatten(maps)
    assert rows.shape == (1, 3 * (256 + 64 + 16), 10)
    assert (rows[..., :4].abs() < 1).all()
    assert rows[..., 4].sigmoid().mean() == pytest.approx(0.01, rel=0.2)
    assert rows[..., 5:].sigmoid().mean() == pytest.approx(0.2, rel=0.2)
    assert small(num_classes=1).scales[0].predict.bias.view(3, 6)[:, 5].tolist() == [0, 0, 0]


@pytest.mark.parametrize("box", ["ciou", "yolov3"])
def test_every_parameter_gets_a_gradient(box):
    model = small()
    sizes = torch.tensor(ANCHORS)[:, None].float() / 4
    model.anchors = coding.check_anchors(sizes[:, 0].tolist())
    boxes = coding.to_xyxy(torch.cat((torch.rand(9, 2) * 64 + 16, sizes[:, 0]), 1))
    targets = [{"boxes": boxes, "labels": torch.arange(9) % 3}, {"boxes": boxes[:0], "labels": torch.arange(0)}]
    sum(DetectionLoss(model.anchors, box)(model(images(2, 3, 96, 96)), targets).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_learns_two_images():
    """Sixty steps on two images: their loss is a fraction, and their boxes are found."""
    torch.manual_seed(0)
    model = small()
    x = images(2, 3, 64, 64)
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 40.0, 30.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[30.0, 20.0, 45.0, 50.0]]), "labels": torch.tensor([2])},
    ]
    loss, optimizer = DetectionLoss(), torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        value = sum(loss(model(x), targets).values())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] / 5
    for found, target in zip(detect(model(x)), targets, strict=True):
        assert found["labels"][0] == target["labels"][0]
        assert box_iou(found["boxes"][:1], target["boxes"]) > 0.5


def test_fused_for_inference():
    model = small().eval()
    with torch.no_grad():
        model.train()(images(4, 3, 64, 64))
        model.eval()
        x = images(1, 3, 64, 64)
        fused = xformer.fuse_for_inference(model)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
        for got, expected in zip(fused(x), model(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, channels", [("mobilenetv2_050", [16, 48, 160]), ("resnet18", [128, 256, 512])])
def test_backbones_of_timm(name, channels):
    """The last maps of strides 8, 16 and 32; MobileNetV2 also has one of stride 2."""
    pytest.importorskip("timm", reason="timm is not installed")
    model = Detector(f"timm:{name}", 3, widths=(16, 16, 16), in_chans=4)
    assert model.feature_info.channels() == channels and model.no_weight_decay() == set()
    maps = model(images(1, 4, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, 24, 8, 12), (1, 24, 4, 6), (1, 24, 2, 3)]
    model.set_grad_checkpointing()
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    x = images(2, 4, 64, 64)
    with torch.no_grad():
        for got, expected in zip(xformer.fuse_for_inference(model)(x), model(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_detections_of_a_model_are_in_its_coding():
    model = small(anchors=[(10, 10)] * 9, centre_scale=2.0).eval()
    with torch.no_grad():
        maps = model(images(1, 3, 64, 64))
    (found,) = model.detect(maps, score=0.0, limit=20)
    (expected,) = detect(maps, model.anchors, centre_scale=2.0, score=0.0, limit=20)
    (other,) = detect(maps, model.anchors, score=0.0, limit=20)
    assert torch.equal(found["boxes"], expected["boxes"]) and not torch.equal(found["boxes"], other["boxes"])


def test_conveniences():
    model = small()
    assert model.no_weight_decay() and model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    model.set_grad_checkpointing()
    assert model.backbone.grad_checkpointing


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backbone_name": "resnet"}, r"backbone_name must be one of xformer_s, .*, or timm:MODEL .*, got 'resnet'"),
        ({"backbone_name": "timm:resnet"}, "or timm:MODEL for a model of timm, if it is installed, got 'timm:resnet'"),
        ({"backbone_name": "timm:vit_tiny_patch16_224"}, r"must have maps of the strides \(8, 16, 32\), got"),
        ({"backbone_name": "timm:crossvit_tiny_240"}, r"must have maps of the strides \(8, 16, 32\), got \[\]"),
        ({"centre_scale": 0}, "centre_scale must be a number from 1 to 4, got 0"),
        ({"centre_scale": "2"}, "centre_scale must be a number from 1 to 4, got '2'"),
        ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"anchors": ANCHORS[:8]}, r"anchors must be 9 pairs \(w, h\) of positive numbers"),
        ({"anchors": ((0, 1),) * 9}, "anchors must be 9 pairs"),
        ({"widths": (8, 8)}, r"widths must be 3 positive numbers, got \(8, 8\)"),
        ({"stem_stride": 1}, r"must have maps of the strides \(8, 16, 32\), got \[4, 8, 16\]"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        Detector(**options)


@pytest.mark.parametrize("centre_scale", [1.0, 2.0])
def test_coding_round_trip(centre_scale):
    """Boxes to numbers and back in float64, of every stride and anchor, up to the clamp."""
    where = coding.grid(empty_maps(size=96), ANCHORS, torch.float64, centre_scale)
    assert len(where.cells) == 3 * (144 + 36 + 9)
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(len(where.cells), 4, generator=generator, dtype=torch.float64) * 8 - 4
    boxes = coding.decode(raw, where)
    torch.testing.assert_close(coding.encode(boxes, where), raw, rtol=0, atol=1e-11)
    torch.testing.assert_close(coding.to_cxcywh(coding.to_xyxy(boxes)), boxes, rtol=1e-12, atol=1e-12)
    apart = boxes[:, :2] / where.strides - where.cells - 0.5
    assert (apart.abs() < centre_scale / 2).all() and apart.abs().max() > 0.4 * centre_scale
    wild = coding.decode(torch.full_like(raw, 1e4), where)
    torch.testing.assert_close(wild[:, 2:], where.anchors * 62.5)
    assert coding.encode(torch.cat((where.cells * where.strides, where.anchors), 1), where).isfinite().all()


def test_coding_by_hand():
    """Row 1, column 2 of stride 16, second anchor of that scale (62, 45).

    Predictions before it: 3 * 8 * 8 of stride 8, then 3 * (1 * 4 + 2) + 1. cx = 16 (2 + 1/2), cy = 16 (1 + 3/4) for
    sigmoid(ln 3) = 3/4, w = 62 * 2, h = 45 / 2.
    """
    maps = empty_maps(size=64, num_classes=2)
    at = 3 * 64 + 3 * (1 * 4 + 2) + 1
    values = torch.tensor([0.0, math.log(3), math.log(2), -math.log(2)])
    maps[1][0, 7 : 7 + 4, 1, 2] = values
    rows = coding.flatten(maps)[0]
    assert torch.equal(rows[at, :4], values) and rows[:, :4].any(1).sum() == 1
    box = coding.decode(rows[:, :4], coding.grid(maps, ANCHORS))[at]
    torch.testing.assert_close(box, torch.tensor([40.0, 28.0, 124.0, 22.5]))
    # with centre scale 2: cx = 16 (2 + 2/2 - 1/2), cy = 16 (1 + 6/4 - 1/2)
    box = coding.decode(rows[:, :4], coding.grid(maps, ANCHORS, centre_scale=2.0))[at]
    torch.testing.assert_close(box, torch.tensor([40.0, 32.0, 124.0, 22.5]))


def test_coverage():
    """Half of a 2 x 4 box in a region, a box inside one, a box outside."""
    boxes = torch.tensor([[0.0, 0.0, 2.0, 4.0], [1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 10.0, 10.0]])
    got = coding.coverage(boxes, torch.tensor([[1.0, 0.0, 5.0, 5.0], [0.0, 0.0, 0.5, 0.5]]))
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.25 / 8], [1.0, 0.0], [0.0, 0.0]]))


def put(maps, image, scale, anchor, row, column, values):
    maps[scale].unflatten(1, (3, -1))[image, anchor, :, row, column] = torch.tensor(values, dtype=maps[scale].dtype)


def test_detections():
    """Two near boxes of one class become one, of two classes stay; a limit keeps the best; no box is no box."""
    maps = empty_maps(batch=3)
    put(maps, 1, 0, 0, 2, 1, [0, 0, 0, 0, 20, 20, -20])
    put(maps, 1, 0, 1, 2, 1, [0, 0, math.log(10 / 16), math.log(13 / 30), 1, 20, 20])
    nothing, some, _ = detect(maps)
    assert nothing["boxes"].shape == (0, 4) and nothing["scores"].shape == nothing["labels"].shape == (0,)
    assert nothing["labels"].dtype is torch.int64
    expected = torch.tensor([[7.0, 13.5, 17.0, 26.5]]).expand(2, 4)
    torch.testing.assert_close(some["boxes"], expected)
    assert some["labels"].tolist() == [0, 1]
    torch.testing.assert_close(some["scores"], torch.tensor([1, 1 / (1 + math.exp(-1))]))
    assert len(detect(maps, limit=1)[1]["boxes"]) == 1
    assert detect(maps, candidates=2, limit=5)[1]["labels"].tolist() == [0]
    assert len(detect(maps, iou=1.0)[1]["boxes"]) == 3
    cut = detect(maps, sizes=[(32, 32), (20, 16), (32, 32)])[1]["boxes"]
    torch.testing.assert_close(cut, torch.tensor([[7.0, 13.5, 16.0, 20.0]]).expand(2, 4))
    assert len(detect(maps, sizes=[(32, 32), (10, 32), (32, 32)])[1]["boxes"]) == 0
    assert detect([m[:0] for m in maps]) == []
    half = detect([m.bfloat16() for m in maps])[1]
    assert half["boxes"].dtype is torch.float32 and len(half["boxes"]) == 2


def test_bad_maps():
    maps = empty_maps()
    for wrong in (maps[:2], [m[:, :20] for m in maps], [m[:, :15] for m in maps], [], [m[0] for m in maps]):
        with pytest.raises(ValueError, match=r"maps must be 3 of shape \(B, 3 \(5 \+ classes\), H, W\)"):
            detect(wrong)
    with pytest.raises(ValueError, match=r"sizes must be one \(H, W\) per image, got 2 for 1 images"):
        detect(maps, sizes=[(1, 1)] * 2)


def test_shape_iou():
    """(10, 20) and (20, 10) have 100 in common of 300; (10, 10) is half of (10, 20)."""
    got = coding.shape_iou(torch.tensor([[10.0, 20.0]]), torch.tensor([[20.0, 10.0], [10.0, 10.0], [10.0, 20.0]]))
    torch.testing.assert_close(got, torch.tensor([[1 / 3, 1 / 2, 1.0]]))

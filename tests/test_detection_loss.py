"""YOLOv3's assignment and losses, beside numbers worked by hand.

Most cases are images of 32 x 32 with two classes: maps of 4 x 4, 2 x 2 and 1 x 1, 3 (16 + 4 + 1) = 63 predictions. With
zeros everywhere a prediction is in the middle of its cell, as large as its anchor, and every BCE is ln 2.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

pytest.importorskip("torchvision", reason="detection needs torchvision")
from xformer.detection import ANCHORS, DetectionLoss, detect
from xformer.detection import boxes as coding
from xformer.detection.loss import BOX, OBJECTNESS, assign
from xformer.errors import UsageError

LN2 = math.log(2)
PLAIN = {"weights": (1.0, 1.0, 1.0)}


def zeros(batch=1, size=32, num_classes=2, dtype=torch.float64):
    return [torch.zeros(batch, 3 * (5 + num_classes), size // s, size // s, dtype=dtype) for s in coding.STRIDES]


def noise(*args, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(m.shape, generator=generator, dtype=m.dtype) for m in zeros(*args, **options)]


def prediction(maps, scale, anchor, row, column, image=0):
    """Its (5 + classes) numbers: a view."""
    return maps[scale].unflatten(1, (3, -1))[image, anchor, :, row, column]


def target(*centred, labels=None, crowd=None):
    boxes = coding.to_xyxy(torch.tensor(centred, dtype=torch.float64).view(-1, 4))
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return {"boxes": boxes, "labels": labels} | ({} if crowd is None else {"iscrowd": torch.tensor(crowd)})


def losses(maps, targets, **options):
    found = DetectionLoss(**{**PLAIN, **options})(maps, targets)
    assert list(found) == ["box", "objectness", "class"]
    return [float(value) for value in found.values()]


SEVERAL = {"centre_scale": 2.0, "anchor_iou": 0.5}
"""The assignment of the recipes: several predictions a box."""


def assigned(sizes, *centred, **options):
    at, number = assign(sizes, torch.tensor(centred), torch.tensor(ANCHORS).float(), **options)
    return list(zip(at.tolist(), number.tolist(), strict=True))


FOUR = [(4, 4), (2, 2), (1, 1)]
MIDDLE = (12.0, 20.0, 10.0, 13.0)
"""Of cell (row 2, column 1) of stride 8, and the first anchor: prediction 3 (2 * 4 + 1) = 27."""


def test_assignment():
    """Shapes choose the anchor: (60, 50) is (62, 45)'s, 60 45 / (60 50 + 62 45 - 60 45) = 0.874, of stride 16.

    Its cell there is floor(20 / 16) = 1, floor(9 / 16) = 0; 48 predictions of stride 8 come before, then
    3 (0 * 2 + 1) + 1. (400, 300) is (373, 326)'s, the last of all.
    """
    assert assigned(FOUR, MIDDLE) == [(27, 0)]
    assert assigned(FOUR, (20.0, 9.0, 60.0, 50.0)) == [(48 + 3 + 1, 0)]
    assert assigned(FOUR, (9.0, 9.0, 400.0, 300.0)) == [(62, 0)]
    at, number = assign(FOUR, torch.zeros(0, 4), torch.tensor(ANCHORS).float())
    assert at.shape == number.shape == (0,)


def test_boxes_in_one_cell():
    """Of two anchors both stay; of one anchor the one whose shape is nearer, and the last of equal ones."""
    other = (13.0, 21.0, 16.0, 30.0)
    assert assigned(FOUR, MIDDLE, other) == [(27, 0), (28, 1)]
    near = (13.0, 21.0, 9.0, 13.0)
    assert assigned(FOUR, MIDDLE, near, other) == [(27, 0), (28, 2)]
    assert assigned(FOUR, near, MIDDLE) == [(27, 1)]
    assert assigned(FOUR, MIDDLE, (13.0, 21.0, 10.0, 13.0)) == [(27, 1)]


def test_assignment_to_several_anchors():
    """(12.8, 19) has IoU 130 / 243.2 with (10, 13), 243.2 / 480 with (16, 30), and less than a half with the others."""
    box = (12.0, 20.0, 12.8, 19.0)
    assert assigned(FOUR, box, anchor_iou=0.5) == [(27, 0), (28, 0)]
    assert assigned(FOUR, box, anchor_iou=0.51) == [(27, 0)]
    assert assigned(FOUR, box, anchor_iou=0.99) == [(27, 0)], "the best anchor, however small its IoU"


def test_assignment_to_several_cells():
    """Centres from half a cell before a cell to half a cell behind it: (13, 21) is in (row 2, column 1) and nearer to
    the next row and column, (12, 20) in the middle of it. Cells beyond the border are none."""
    size = (10.0, 13.0)
    assert assigned(FOUR, MIDDLE, centre_scale=2.0) == [(27, 0)]
    four = [(3 * (4 * row + column), 0) for row in (2, 3) for column in (1, 2)]
    assert assigned(FOUR, (13.0, 21.0, *size), centre_scale=2.0) == four
    assert assigned(FOUR, (13.0, 20.0, *size), centre_scale=2.0) == four[:2]
    assert assigned(FOUR, (13.0, 21.0, *size), centre_scale=1.2) == four[:1]
    assert assigned(FOUR, (1.0, 31.0, *size), centre_scale=2.0) == [(3 * 12, 0)]
    assert assigned(FOUR, (-9.0, 40.0, *size), centre_scale=2.0) == [(3 * 12, 0)]


def test_boxes_that_want_the_same_predictions():
    """A box whose centre is in the cell has its prediction, although another one's shape is nearer to the anchor's."""
    own, near = (12.0, 20.0, 9.0, 13.0), (17.0, 20.0, 10.0, 13.0)
    for boxes, expected in (((own, near), [(27, 0), (30, 1)]), ((near, own), [(27, 1), (30, 0)])):
        assert assigned(FOUR, *boxes, centre_scale=2.0) == expected
    assert assigned(FOUR, near, centre_scale=2.0) == [(27, 0), (30, 0)]


def test_boxes_on_borders():
    """Edges of cells are of the cell that begins there; borders, and centres beyond, of the last cell inside."""
    small = (10.0, 13.0)
    assert assigned(FOUR, (8.0, 16.0, *small)) == [(27, 0)]
    assert assigned(FOUR, (32.0, 32.0, *small)) == [(3 * 15, 0)]
    assert assigned(FOUR, (0.0, 40.0, *small)) == [(3 * 12, 0)]
    assert assigned(FOUR, (-3.0, 0.0, *small)) == [(0, 0)]
    assert assigned([(2, 6), (1, 3), (1, 2)], (47.9, 15.9, *small)) == [(3 * 11, 0)]
    for box in BOX:
        maps = [m.requires_grad_() for m in zeros()]
        loss = sum(DetectionLoss(box=box)(maps, [target((32.0, 0.0, *small))]).values())
        loss.backward()
        assert loss.isfinite() and all(m.grad.isfinite().all() for m in maps)


@pytest.mark.parametrize("box", BOX)
def test_zeros_by_hand(box):
    """The box is what the prediction says: box loss 0; 63 of objectness ln 2, and two classes ln 2.

    No other prediction is near: (16, 30) has IoU 130/480 with it, the next cell's 26/234.
    """
    assert losses(zeros(), [target(MIDDLE)], box=box) == pytest.approx([0, 63 * LN2, 2 * LN2], abs=1e-8)


def test_two_boxes_by_hand():
    """Sums are divided by the boxes of the image, two, and then by the images, two; the other image has none.

    The cells above and below have the larger box's shape 8 pixels away: IoU 16 22 / (2 480 - 16 22) = 0.579, ignored.
    Left and right it is 8 30 / (2 480 - 8 30) = 1/3. 61 predictions of 63 count.
    """
    maps = zeros(2)
    prediction(maps, 0, 0, 2, 1)[5:] = torch.tensor([20.0, -20.0])
    other = (12.0, 20.0, 16.0, 30.0)
    found = losses(maps, [target(MIDDLE, other, labels=[0, 1]), target()])
    assert found == pytest.approx([0, (61 / 2 + 63) / 2 * LN2, 2 * LN2 / 2 / 2], abs=1e-8)


def test_ignored_by_hand():
    """The third anchor (33, 23) of the cell says the same box: IoU 1, and it is no background. 62 are left."""
    maps = zeros()
    values = torch.tensor([math.log(10 / 33), math.log(13 / 23)])
    prediction(maps, 0, 2, 2, 1)[2:4] = values
    assert losses(maps, [target(MIDDLE)])[1] == pytest.approx(62 * LN2)
    prediction(maps, 0, 2, 2, 1)[4] = math.inf
    assert losses(maps, [target(MIDDLE)])[1] == pytest.approx(62 * LN2)
    prediction(maps, 0, 2, 2, 1)[4] = 0
    assert losses(maps, [target(MIDDLE)], ignore=1.0)[1] == pytest.approx(63 * LN2)
    # as wide as 20: IoU 130/260, which is not above a half
    prediction(maps, 0, 2, 2, 1)[2] = math.log(20 / 33) + 1e-9
    assert losses(maps, [target(MIDDLE)])[1] == pytest.approx(63 * LN2)


def test_crowds_by_hand():
    """A crowd of (10, 14) around the first anchor (10, 13) of a cell: it is in it, no other prediction is by half.

    Those above and below are by 5.5 of 13, left and right by 2 of 10, larger anchors by 140/480 at most. With a box
    there too its prediction counts, and the crowd's label does not.
    """
    crowd = (12.0, 20.0, 10.0, 14.0)
    assert losses(zeros(), [target(crowd, crowd=[True])]) == pytest.approx([0, 62 * LN2, 0])
    found = losses(zeros(), [target(crowd, MIDDLE, labels=[1, 0], crowd=[True, False])])
    assert found == pytest.approx([0, 63 * LN2, 2 * LN2], abs=1e-8)


def test_box_losses_by_hand():
    """sigmoid(ln 3) = 3/4 is 2 pixels to the right of the box's centre.

    ciou: 8 13 = 104 in common of 156, and 2^2 of the diagonal 12^2 + 13^2: 1/3 + 4/313 (shapes agree).
    yolov3: BCE of 3/4 beside 1/2 is -(ln 3/4 + ln 1/4) / 2, less ln 2; twice the width adds (ln 2)^2 / 2; both times
    2 - 130/1024.
    """
    maps = zeros()
    prediction(maps, 0, 0, 2, 1)[0] = math.log(3)
    assert losses(maps, [target(MIDDLE)])[0] == pytest.approx(1 / 3 + 4 / 313)
    assert losses(maps, [target(MIDDLE)], weights=(5, 1, 1))[0] == pytest.approx(5 * (1 / 3 + 4 / 313))
    prediction(maps, 0, 0, 2, 1)[2] = LN2
    centre = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - LN2
    expected = (centre + LN2**2 / 2) * (2 - 130 / 1024)
    assert losses(maps, [target(MIDDLE)], box="yolov3")[0] == pytest.approx(expected)


def test_objectness_that_is_the_iou_by_hand():
    """As above, IoU 104/156 = 2/3: BCE of the logit 1 is softplus(1) - 2/3. It is a target, without gradients."""
    maps = zeros()
    prediction(maps, 0, 0, 2, 1)[0] = math.log(3)
    prediction(maps, 0, 0, 2, 1)[4] = 1.0
    one, iou = (losses(maps, [target(MIDDLE)], objectness=objectness)[1] for objectness in OBJECTNESS)
    assert one == pytest.approx(62 * LN2 + math.log1p(math.e) - 1)
    assert iou == pytest.approx(62 * LN2 + math.log1p(math.e) - 2 / 3)
    maps = [m.requires_grad_() for m in maps]
    DetectionLoss(objectness="iou")(maps, [target(MIDDLE)])["objectness"].backward()
    assert coding.flatten([m.grad for m in maps])[..., :4].eq(0).all()


MANY = [
    target(MIDDLE, (40.3, 50.1, 30.0, 70.0), (81.0, 30.5, 90.0, 50.0), (33.0, 70.7, 12.0, 12.0), labels=[0, 1, 2, 1]),
    target(),
    target((48.2, 47.9, 90.0, 95.0), (3.5, 90.5, 7.0, 11.0), labels=[2, 0]),
]


def perfect(targets, size=96, num_classes=3, **rules):
    """Maps that say exactly the targets, by assignment and coding."""
    maps = zeros(len(targets), size, num_classes)
    for m in maps:
        m.unflatten(1, (3, -1))[:, :, 4:] = -25
    where = coding.grid(maps, ANCHORS, torch.float64, rules.get("centre_scale", 1.0))
    flat = coding.flatten(maps)
    sizes = [tuple(m.shape[2:]) for m in maps]
    for rows, one in zip(flat, targets, strict=True):
        centred = coding.to_cxcywh(one["boxes"])
        at, number = assign(sizes, centred, torch.tensor(ANCHORS).double(), **rules)
        rows[at, :4] = coding.encode(centred[number], where.take(at))
        rows[at, 4] = 25
        rows[at, 5 + one["labels"][number]] = 25
    counts = [3 * h * w for h, w in sizes]
    return [
        part.reshape(len(targets), h, w, -1).permute(0, 3, 1, 2).contiguous()
        for part, (h, w) in zip(flat.split(counts, 1), sizes, strict=True)
    ]


@pytest.mark.parametrize("objectness", OBJECTNESS)
@pytest.mark.parametrize("rules", [{}, SEVERAL], ids=["yolov3", "several"])
@pytest.mark.parametrize("box", BOX)
def test_perfect_predictions(box, rules, objectness):
    maps = perfect(MANY, **rules)
    assert losses(maps, MANY, box=box, objectness=objectness, **rules) == pytest.approx([0, 0, 0], abs=1e-6)
    for found, expected in zip(detect(maps, centre_scale=rules.get("centre_scale", 1.0)), MANY, strict=True):
        assert len(found["boxes"]) == len(expected["boxes"])
        order, other = (one["boxes"][:, 0].argsort() for one in (found, expected))
        torch.testing.assert_close(found["boxes"][order], expected["boxes"][other], rtol=1e-9, atol=1e-9)
        assert torch.equal(found["labels"][order], expected["labels"][other])


@pytest.mark.parametrize("box", BOX)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("by", [-0.5, 0.5])
def test_shifted_predictions(box, number, by):
    """The further a prediction's centre or size is from the box, the larger the loss."""
    values = []
    for times in range(4):
        maps = perfect(MANY)
        for m in maps:
            m.unflatten(1, (3, -1))[:, :, number] += times * by
        values.append(losses(maps, MANY, box=box)[0])
    assert all(a < b for a, b in pairwise(values))


@pytest.mark.parametrize("box", BOX)
def test_batches_do_not_matter(box):
    """The loss of a batch is the mean of its images'."""
    maps = noise(3, 96, 3)
    each = [losses([m[i : i + 1] for m in maps], MANY[i : i + 1], box=box) for i in range(3)]
    together = losses(maps, MANY, box=box)
    assert together == pytest.approx([sum(column) / 3 for column in zip(*each, strict=True)])
    assert losses([m.repeat(2, 1, 1, 1) for m in maps], MANY * 2, box=box) == pytest.approx(together)


def test_images_without_boxes_and_batches_without_images():
    maps = [m.requires_grad_() for m in noise(2)]
    found = DetectionLoss(**PLAIN)(maps, [target(), target()])
    assert found["box"] == 0 and found["class"] == 0 and found["objectness"] > 0
    sum(found.values()).backward()
    grads = coding.flatten([m.grad for m in maps])
    assert (grads[..., 4] > 0).all() and (grads[..., :4] == 0).all() and (grads[..., 5:] == 0).all()

    maps = [m.requires_grad_() for m in zeros(0)]
    found = DetectionLoss()(maps, [])
    assert [v.item() for v in found.values()] == [0, 0, 0]
    sum(found.values()).backward()


def test_gradients_are_those_of_differences():
    """CIoU by definition takes one of its factors as constant: its gradient is checked by direction alone, above."""
    maps = [m.requires_grad_() for m in noise(3, 96, 3)]
    loss = DetectionLoss(box="yolov3")
    assert torch.autograd.gradcheck(lambda *m: tuple(loss(m, MANY).values()), maps, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("box", BOX)
def test_autocast(dtype, box):
    """The loss of half precision maps is that of the same numbers in float32."""
    maps = [m.to(dtype).requires_grad_() for m in noise(3, 96, 3)]
    loss = DetectionLoss(box=box)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(maps, MANY)
    expected = loss([m.detach().float() for m in maps], MANY)
    for name, value in found.items():
        assert value.dtype is torch.float32
        assert torch.equal(value, expected[name]), name
    sum(found.values()).backward()
    assert all(m.grad.dtype is dtype and m.grad.isfinite().all() for m in maps)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"boxes": torch.zeros(1, 5)}, r"boxes of target 0 must be \(n, 4\) floating point, got \(1, 5\)"),
        ({"boxes": torch.ones(1, 4).long()}, "boxes of target 0 must be .* floating point"),
        ({"boxes": torch.tensor([[4.0, 4.0, 4.0, 8.0]])}, r"boxes must be finite, x0 < x1 and y0 < y1, got \[4.0"),
        ({"boxes": torch.tensor([[0.0, 0.0, math.nan, 8.0]])}, "boxes must be finite"),
        ({"labels": torch.tensor([2])}, "labels must be from 0 to 1, got 2"),
        ({"labels": torch.tensor([-1])}, "labels must be from 0 to 1, got -1"),
        ({"labels": torch.tensor([0, 1])}, r"labels of target 0 must be of shape \(1,\), as its boxes, got \(2,\)"),
        ({"labels": torch.tensor([0.0])}, "labels of target 0 must be int64, got torch.float32"),
        ({"iscrowd": torch.tensor([])}, "iscrowd of target 0 must be of shape"),
    ],
)
def test_bad_targets(changes, message):
    with pytest.raises(ValueError, match=message):
        DetectionLoss()(zeros(), [target(MIDDLE) | changes])


def test_bad_arguments():
    with pytest.raises(ValueError, match="targets must be one dict per image, got 0 for 1 images"):
        DetectionLoss()(zeros(), [])
    for options, message in (
        ({"box": "giou"}, "box must be one of ciou, yolov3, got 'giou'"),
        ({"objectness": "giou"}, "objectness must be one of one, iou, got 'giou'"),
        ({"anchor_iou": -1}, r"anchor_iou must be in \[0, 1\], got -1"),
        ({"centre_scale": 0.5}, "centre_scale must be a number from 1 to 4, got 0.5"),
        ({"ignore": 2}, r"ignore must be in \[0, 1\], got 2"),
        ({"weights": (1, 1)}, "weights must be three numbers, 0 or more"),
        ({"anchors": ANCHORS[:3]}, "anchors must be 9 pairs"),
    ):
        with pytest.raises(UsageError, match=message):
            DetectionLoss(**options)

"""torchvision's LR-ASPP as a task: its own logits, and a run by the recipe of ours."""

import math

import pytest
import torch

from experiments.lraspp import MODEL, AtStride
from experiments.shapes import make_shapes
from xformer.errors import UsageError
from xformer.recipes.settings import load_recipe
from xformer.recipes.train import train
from xformer.recipes.weights import load_weights
from xformer.segmentation import upsample


def test_logits_are_torchvisions():
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    theirs = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    ours = AtStride(5).eval()
    assert ours.load_state_dict(theirs.state_dict())
    for height, width in ((64, 96), (97, 70)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad():
            logits = theirs.classifier(theirs.backbone(x))
            got = ours(x)
        assert got.shape == (2, 5, math.ceil(height / 4), math.ceil(width / 4))
        torch.testing.assert_close(got, upsample(logits, 2, got.shape[2:]))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, images=4, held_out=2, size=(64, 64))
    return str(folder / "cityscapes")


def recipe(data, tmp_path, **changes):
    settings = {
        "task": "lraspp", "model": MODEL, "model_options": {}, "data": data, "out": str(tmp_path / "run"),
        "image_size": 64, "epochs": 1, "batch_size": 2, "workers": 0, "threads": 1, "tensorboard": False,
    }  # fmt: skip
    return load_recipe("segment_shapes", settings | changes)


def test_it_is_trained_by_our_recipe(data, tmp_path):
    result = train(recipe(data, tmp_path))
    assert all(0 <= result[name] <= 100 for name in ("miou", "pixels"))
    state, card = load_weights(tmp_path / "run" / "last.safetensors")
    assert (card.task, card.model, card.num_classes) == ("lraspp", MODEL, 19)
    AtStride(19).load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "xformer_xxs"}, f"model must be {MODEL} without options, got 'xformer_xxs'"),
        ({"model_options": {"width": 128}}, "model_options means nothing to task lraspp, got {'width': 128}"),
        ({"drop_path": 0.1}, "drop_path means nothing to task lraspp, got 0.1"),
        ({"attention": "xfa"}, "attention means nothing to task lraspp, got 'xfa'"),
    ],
)
def test_what_is_refused(data, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        train(recipe(data, tmp_path, **changes))

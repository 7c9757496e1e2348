"""The models as timm's users expect them; and without timm."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import xformer
from xformer.recipes.card import Card
from xformer.recipes.weights import build_model

NAMES = tuple(xformer.VARIANTS)


@pytest.fixture
def timm():
    timm = pytest.importorskip("timm", reason="these are timm's conventions")
    pytest.importorskip("timm.optim", reason="these are timm's conventions")
    return timm


def test_registered(timm):
    assert set(timm.list_models("xformer_*")) == set(NAMES)
    assert not timm.list_models("xformer_*", pretrained=True)
    model = timm.create_model(
        "xformer_xxs", num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.1, attention="softmax", img_size=None
    )
    assert isinstance(model, xformer.XFormer) and model.num_classes == 7
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    with pytest.raises(ValueError, match="no pretrained weights"):
        timm.create_model("xformer_xxs", pretrained=True)


def test_same_model_with_and_without_timm(timm):
    torch.manual_seed(0)
    one = timm.create_model("xformer_xs").state_dict()
    torch.manual_seed(0)
    same(one, xformer.xformer_xs().state_dict())


def test_features_only(timm):
    model = timm.create_model("xformer_s", features_only=True, out_indices=(1, 3), num_classes=10)
    assert model.feature_info.channels() == [64, 256] and model.feature_info.reduction() == [8, 32]
    assert model.feature_info.channels(0) == 64 and model.feature_info.get_dicts(["module"])[1] == {
        "module": "stages.3"
    }
    assert [m.shape for m in model.eval()(torch.randn(1, 3, 64, 64))] == [(1, 64, 8, 8), (1, 256, 2, 2)]


def test_data_config(timm):
    config = timm.data.resolve_model_data_config(timm.create_model("xformer_xxs"))
    assert config["input_size"] == (3, 256, 256) and config["crop_pct"] == 0.9
    overlay = timm.create_model("xformer_xxs", pretrained_cfg_overlay={"crop_pct": 1.0})
    assert timm.data.resolve_model_data_config(overlay)["crop_pct"] == 1.0
    assert timm.create_model("xformer_xxs").pretrained_cfg["crop_pct"] == 0.9


def test_classifier():
    model = xformer.xformer_xxs(num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(4)
    assert model(x).shape == (2, 4) and model.num_classes == 4
    model.reset_classifier(4, global_pool="")
    assert model(x).shape == (2, 4, 2, 2)
    model.reset_classifier(0, global_pool="avg")
    assert model(x).shape == (2, model.num_features)
    model.double().reset_classifier(3)
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pooling(timm, pool):
    """The same as timm's layer of that name."""
    model = xformer.xformer_xxs(num_classes=10, global_pool=pool).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = model.forward_features(x)
        pooled = timm.layers.SelectAdaptivePool2d(pool_type=pool, flatten=True)(features)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        torch.testing.assert_close(model(x), model.get_classifier()(pooled))
        model.reset_classifier(4, "avg")
        assert model(x).shape == (2, 4)


def test_intermediates_as_tokens():
    model, x = xformer.xformer_xxs().eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        images = model.forward_intermediates(x, (1, 3), intermediates_only=True)
        final, tokens = model.forward_intermediates(x, (1, 3), output_fmt="NLC")
    assert final.dim() == 4
    for image, token in zip(images, tokens, strict=True):
        assert torch.equal(token, image.flatten(2).transpose(1, 2))


def test_pruned():
    """As timm prunes: the features of the last stage that is kept, without the classifier."""
    x = torch.randn(2, 3, 64, 64)
    model = xformer.xformer_xxs(num_classes=10).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(x, (0, 2), intermediates_only=True)
    assert model.prune_intermediate_layers((0, 2)) == [0, 2] and len(model.stages) == 3
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), expected[1]) and torch.equal(model(x), expected[1])
    model.reset_classifier(4, "avg")
    assert model(x).shape == (2, 4)
    whole = xformer.xformer_xxs(num_classes=10).eval()
    with torch.no_grad():
        y = whole(x)
        for indices, prune_norm in (((0, 1), False), (1, True)):
            with pytest.raises(ValueError, match="prune_head must be True"):
                whole.prune_intermediate_layers(indices, prune_norm, prune_head=False)
        assert whole.prune_intermediate_layers(2, prune_head=False) == [2, 3]
        assert torch.equal(whole(x), y)


def test_temperature_is_not_decayed(timm):
    model = xformer.xformer_xxs()
    kept = model.no_weight_decay()
    assert len(kept) == 7 and kept <= set(dict(model.named_parameters()))
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.05)
    temperatures = {id(p) for name, p in model.named_parameters() if name in kept}
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed and not temperatures & decayed


@pytest.mark.parametrize("coarse", [False, True])
def test_groups_are_in_order_of_depth(timm, coarse):
    from timm.models import group_parameters

    model = xformer.xformer_xxs()
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    order = [groups[name] for name, _ in model.named_parameters()]
    assert order == sorted(order) and groups["stem.conv.weight"] == 0
    blocks = sum(len(stage) for stage in model.stages)
    assert max(order) == (len(model.stages) if coarse else blocks) + 1
    timm.optim.create_optimizer_v2(model, "adamw", weight_decay=0.05, layer_decay=0.7)


def test_without_timm_and_fvcore():
    code = (
        "import sys; sys.modules['timm'] = sys.modules['fvcore'] = None; import torch, xformer, xformer.counts;"
        "print(xformer.xformer_xxs(num_classes=3)(torch.randn(2, 3, 64, 64)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "[2, 3]" in result.stdout, result.stderr


def test_saved_for_the_hub(timm, tmp_path):
    """Files of timm's own function, in both formats, are a model of timm again."""
    pytest.importorskip("huggingface_hub")
    torch.manual_seed(0)
    model = timm.create_model("xformer_xxs", num_classes=5)
    timm.models.save_for_hf(model, tmp_path, safe_serialization="both")
    for file in ("model.safetensors", "pytorch_model.bin"):
        other = timm.create_model("xformer_xxs", num_classes=5, checkpoint_path=str(tmp_path / file))
        same(model.state_dict(), other.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "xformer_xxs"


def same(one, other):
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


MODELS = {
    "classify": xformer.XFormer,
    "features": xformer.XFormerFeatures,
    "se": lambda variant: xformer.XFormer(variant, se=True),
    "fused": lambda variant: xformer.fuse_for_inference(xformer.XFormer(variant)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [*MODELS, "segment", "detect"])
def test_state_dicts_are_contiguous(kind, name, tmp_path):
    """So that safetensors' own function saves them."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = MODELS[kind](xformer.VARIANTS[name]) if kind in MODELS else build_model(Card(name, 3, task=kind))
    assert all(value.is_contiguous() for value in model.state_dict().values())
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors")
    read = safetensors.load_file(tmp_path / "m.safetensors")
    same(model.state_dict(), {key: read[key] for key in model.state_dict()})

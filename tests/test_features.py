"""Detectors and segmenters on backbones of timm: which are accepted, and timm's methods."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm", reason="the backbones are timm's")
pytest.importorskip("torchvision", reason="detection needs torchvision")
import timm

import xformer
from xformer.detection import Detector
from xformer.errors import UsageError
from xformer.segmentation import Segmenter
from xformer_kernels.testing import assert_bitwise

MODELS = [Detector, Segmenter]


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmenter(name, **options):
    """Weights have the scale of trained ones, so that logits are not all near zero."""
    torch.manual_seed(0)
    model = Segmenter(f"timm:{name}", 5, 32, drop_rate=0.0, **options)
    torch.nn.init.normal_(model.decoder.classifier.weight)
    return model


@pytest.mark.parametrize("name, channels", [("mobilenetv2_050", [16, 16, 48, 160]), ("convnext_atto", None)])
def test_segmenters(name, channels):
    """MobileNetV2 also has a map of stride 2; ConvNeXt's stages round sizes down, ours and MobileNetV2's up."""
    model = segmenter(name, in_chans=4)
    assert channels is None or model.feature_info.channels() == channels
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    model.set_grad_checkpointing()
    logits = model(images(2, 4, 97, 70))
    assert logits.shape == (2, 5, 25, 18)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    x = images(1, 4, 97, 70)
    with torch.no_grad():
        expected = model(x)
        assert model.predict(x).shape == (1, 5, 97, 70)
        fused = xformer.fuse_for_inference(model)
        assert (fused(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert isinstance(fused.decoder.bn, torch.nn.Identity)


def test_images_of_odd_sizes_are_padded():
    """On the right and below: logits are those of the image in a larger one of zeros."""
    model = segmenter("convnext_atto").eval()
    x = images(1, 3, 97, 70)
    larger = torch.zeros(1, 3, 128, 96)
    larger[..., :97, :70] = x
    with torch.no_grad():
        assert_bitwise(model(x), model(larger)[..., :25, :18].contiguous(), "padded")


@pytest.mark.parametrize("model", MODELS)
def test_methods_of_timm(model):
    """Those of the models with our backbones are tested with each of them."""
    of_timm = model("timm:mobilenetv2_050")
    assert of_timm.no_weight_decay() == set()
    with pytest.raises(UsageError, match="layer_decay must be 0: the backbone has no group_matcher"):
        of_timm.group_matcher()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet", "backbone_name must be one of xformer_s, .*, or timm:MODEL .*, got 'timm:resnet'"),
        ("vit_tiny_patch16_224", r"must have maps of the strides \(.*8, 16, 32\), got \[16\]"),
        ("swin_tiny_patch4_window7_224", "must have maps of the layout NCHW, got NHWC: try the option feature_cls"),
    ],
)
def test_other_models_are_refused(model, name, message):
    with pytest.raises(UsageError, match=message):
        model(f"timm:{name}")


def test_options_are_those_of_timm():
    """Swin's maps are NHWC, unless timm is told otherwise, and it takes images of one size."""
    model = Segmenter(
        "timm:swin_tiny_patch4_window7_224",
        5,
        32,
        feature_cls="getter",
        img_size=64,
        window_size=2,
        depths=(1, 1, 1, 1),
    )
    with torch.no_grad():
        assert model.eval()(images(1, 3, 64, 64)).shape == (1, 5, 16, 16)
    with pytest.raises(TypeError, match="no_option_of_timm"):
        Segmenter("timm:mobilenetv2_050", no_option_of_timm=1)


@pytest.mark.parametrize("model", MODELS)
def test_models_of_which_timm_makes_no_features(model, monkeypatch):
    """All that timm 1.0 has support it; those of other packages, and of earlier versions, may not."""

    def whole(pretrained=False, features_only=False, **options):
        if features_only:
            raise RuntimeError("features_only is not implemented")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "whole", whole)
    message = "timm:whole cannot be made as a feature extractor by timm: features_only is not implemented"
    with pytest.raises(UsageError, match=message):
        model("timm:whole")

"""The model of segmentation: its decoder in both forms, odd sizes, windows, weights, exported and in bf16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_cases import as_trained, kernels_called, operations
from torch import nn

import xformer
from xformer import fuse_for_inference
from xformer.recipes.card import Card
from xformer.recipes.weights import load_state, load_weights, save_weights
from xformer.segmentation import FORMS, Decoder, Segmenter, upsample
from xformer.segmentation.model import starts
from xformer_kernels.testing import assert_bitwise

CLASSES = 5


def small(**options):
    return Segmenter("xformer_xxs", CLASSES, 32, zero_init_last=False, **options)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 96), (97, 70), (65, 33), (33, 127)], ids=str)
def test_shapes(size):
    model = small(in_chans=4).eval()
    x = images(2, 4, *size)
    with torch.no_grad():
        logits = model(x)
        assert logits.shape == (2, CLASSES, -(-size[0] // 4), -(-size[1] // 4))
        assert model.predict(x).shape == (2, CLASSES, *size)
        assert_bitwise(model.predict(x), upsample(logits, 4, size), "predicted")


@pytest.mark.parametrize("name", xformer.VARIANTS)
def test_every_backbone(name):
    model = Segmenter(name)
    assert model.num_classes == 19 and model.decoder.width == 256
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert len(model.no_weight_decay()) >= 7


def test_upsampling_has_one_scale_at_every_size():
    x = images(2, 3, 5, 7)
    whole = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
    for height, width in ((20, 28), (17, 25), (3, 1)):
        assert_bitwise(upsample(x, 4, (height, width)), whole[:, :, :height, :width], "cut")
    assert upsample(x, 1, (5, 7)).data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match=r"size must be at most 4 times the map's \(5, 7\), got \(21, 28\)"):
        upsample(x, 4, (21, 28))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_forms_are_one_function(dtype, tolerance, training):
    """Of the decoder alone: what a rounding becomes in the backbone's backward is not its matter."""
    channels, sizes = [16, 32, 64, 112], [(25, 18), (13, 9), (7, 5), (4, 3)]
    results = {}
    for form in FORMS:
        torch.manual_seed(0)
        decoder = Decoder(channels, [4, 8, 16, 32], CLASSES, 32, 0.0, form).to(dtype).train(training)
        maps = [images(2, c, *s, seed=c).to(dtype).requires_grad_() for c, s in zip(channels, sizes, strict=True)]
        logits = decoder(maps)
        (logits * images(*logits.shape, seed=1).to(dtype)).sum().backward()
        results[form] = [logits.detach(), decoder.bn.running_mean, decoder.bn.running_var]
        results[form] += [x.grad for x in maps] + [p.grad for p in decoder.parameters()]
    for got, expected in zip(*results.values(), strict=True):
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_forms_have_one_state_dict():
    commuted, concatenated = (small(form=form) for form in FORMS)
    concatenated.load_state_dict(commuted.state_dict())
    x = images(2, 3, 97, 70)
    with torch.no_grad():
        torch.testing.assert_close(commuted.eval()(x), concatenated.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_parameter_gets_a_gradient(form, batch):
    model = small(form=form)
    labels = torch.randint(CLASSES, (batch, 97, 70))
    F.cross_entropy(model.predict(images(batch, 3, 97, 70)), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_grad_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = small(drop_rate=0.0)
        model.set_grad_checkpointing(enable)
        model(images(2, 3, 64, 64)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_training_and_eval():
    model = small(drop_rate=0.5)
    x = images(2, 3, 64, 64)
    before = model.decoder.bn.running_mean.clone()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        assert not torch.equal(model.decoder.bn.running_mean, before)
        model.eval()
        assert_bitwise(model(x), model(x), "eval")
        alone = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(alone, model(x), rtol=1e-4, atol=1e-5)


def test_it_learns():
    """Where the image is bright."""
    model = Segmenter("xformer_xxs", 2, 32, drop_rate=0.0)
    x = F.interpolate(images(4, 3, 8, 8), scale_factor=8)
    labels = (x.mean(1) > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model.predict(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_starts_of_windows():
    assert starts(5, 3, 2) == [0, 2]
    assert starts(6, 3, 2) == [0, 2, 3]
    assert starts(3, 3, 2) == starts(2, 3, 2) == [0]
    assert starts(2048, 1024, 768) == [0, 768, 1024]
    for length in range(1, 20):
        for window in range(1, 20):
            for stride in range(1, window + 1):
                begun = starts(length, window, stride)
                assert len(set(begun)) == len(begun)
                assert {i for s in begun for i in range(s, min(s + window, length))} == set(range(length))
                assert all(s + min(window, length) <= length for s in begun)


@pytest.mark.parametrize("window", [(97, 70), (128, 1024)], ids=str)
def test_one_window_is_the_whole_image(window):
    model = small().eval()
    x = images(2, 3, 97, 70)
    whole = model.whole_image(x)
    assert not whole.requires_grad
    assert_bitwise(model.sliding_window(x, window, (64, 64)), whole, "one window")
    with torch.no_grad():
        assert_bitwise(model.predict(x), whole, "predict")


def test_windows_are_averaged(monkeypatch):
    model = small()
    x = images(2, CLASSES, 37, 53)
    monkeypatch.setattr(model, "predict", lambda images: images)
    torch.testing.assert_close(model.sliding_window(x, (16, 20), (12, 7)), x, rtol=1e-6, atol=1e-6)

    seen = []

    def number(images):
        seen.append(images.shape[2:])
        return torch.full_like(images, len(seen))

    monkeypatch.setattr(model, "predict", number)
    mean = model.sliding_window(x[:1, :1, :3, :5], (3, 3), (1, 2))
    assert seen == [(3, 3), (3, 3)]
    assert mean[0, 0].tolist() == [[1, 1, 1.5, 2, 2]] * 3


def test_windows_of_a_model():
    """Each window is predicted alone."""
    model = small().eval()
    x = images(1, 3, 65, 97)
    mean = model.sliding_window(x, (64, 64), (64, 64))
    assert mean.shape == (1, CLASSES, 65, 97) and mean.isfinite().all()
    first, last = model.whole_image(x[:, :, :64, :64]), model.whole_image(x[:, :, 1:, 33:])
    assert_bitwise(mean[:, :, :1, :33], first[:, :, :1, :33], "first window alone")
    assert_bitwise(mean[:, :, 64:, 64:], last[:, :, 63:, 31:], "last window alone")


def test_state_dict_round_trip(tmp_path):
    model = small()
    model(images(2, 3, 64, 64))
    save_weights(tmp_path / "w.safetensors", model.state_dict(), Card("xformer_xxs", CLASSES, "segment"))
    state, card = load_weights(tmp_path / "w.safetensors")
    assert card.task == "segment"
    other = small()
    assert load_state(other, state, "w.safetensors") == []
    x = images(1, 3, 65, 64)
    assert_bitwise(other.eval()(x), model.eval()(x), "loaded")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Segmenter("resnet"), r"backbone_name must be one of xformer_s, .*, or timm:MODEL .*, got 'resnet'"),
        (lambda: small(stem_stride=1), r"must have maps of the strides \(4, 8, 16, 32\), got \[2, 4, 8, 16\]"),
        (lambda: Segmenter(num_classes=0), "num_classes and width must be 1 or more, got 0 and 256"),
        (lambda: small(form="merged"), r"form must be one of \('commuted', 'concatenated'\), got 'merged'"),
        (lambda: Decoder([8, 8], [4, 6], 2), r"reductions must be 2 multiples of the first of them, got \(4, 6\)"),
        (lambda: Decoder([8, 8], [4], 2), r"reductions must be 2 multiples of the first of them, got \(4,\)"),
        (lambda: Decoder([8], [4], 2)([images(1, 8, 2, 2)] * 2), "features must be 1 maps, got 2"),
        (lambda: small().sliding_window(images(1, 3, 64, 64), (32, 32), (33, 32)), r"got stride=\(33, 32\) for window"),
        (
            lambda: small().sliding_window(images(1, 3, 64, 64), (32, 32), (0, 32)),
            "stride must be from 1 to the window",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_fused_for_inference(form, kernels):
    model = as_trained(small(form=form)).eval()
    fused = fuse_for_inference(model, kernels)
    assert norms(model) and not norms(fused)
    again = fuse_for_inference(fused, kernels)
    for size in ((64, 96), (97, 70)):
        x = images(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
            assert (fused(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
            assert_bitwise(again(x), fused(x), "twice")
    assert model.decoder.form == form


def test_fused_decoder_has_fewer_products():
    """One for each scale, and the classifier's: those of weights with weights are done."""
    decoder = as_trained(small()).decoder
    features = [images(1, c, s, s) for c, s in ((16, 16), (32, 8), (64, 4), (112, 2))]
    for kernels in (False, True):
        seen = operations(fuse_for_inference(decoder, kernels), features)
        assert sum(name in ("aten.addmm", "aten.mm") for name in seen) == len(features) + 1
        assert "aten.native_batch_norm" not in seen


def test_decoder_without_kernels_has_none(monkeypatch):
    """Where it cannot be folded, too."""
    decoder = as_trained(small()).decoder
    decoder.fuse.register_forward_hook(lambda module, args, out: None)
    features = [images(1, c, s, s) for c, s in ((16, 16), (32, 8), (64, 4), (112, 2))]
    assert kernels_called(monkeypatch, fuse_for_inference(decoder, kernels=False), features) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["project.1", "fuse", "bn", "classifier"])
def test_fused_with_hooks(part, form):
    """They are part of the fused model too."""
    model = as_trained(small(form=form)).eval()
    model.decoder.get_submodule(part).register_forward_hook(lambda module, args, out: 1.1 * out)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert (fuse_for_inference(model)(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


def test_autocast():
    model = small().eval()
    x = images(1, 3, 97, 70)
    expected = model(x).detach()
    for form in FORMS:
        model.decoder.form = form
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
            predicted = model.predict(x)
        assert logits.dtype is torch.bfloat16 and predicted.dtype is torch.float32
        assert (logits - expected).abs().max() <= 0.05 * expected.abs().max()
        predicted.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_budget():
    pytest.importorskip("fvcore", reason="fvcore counts")
    from xformer.counts import count

    counts = count(Segmenter("xformer_s", 19), (1024, 2048))
    assert abs(counts.parameters - 4.84e6) <= 0.1e6
    assert counts.macs <= 41e9
    known = ("hardswish", "add", "mul", "unflatten", "feature_dropout")
    assert set(counts.unknown) <= {f"aten::{op}" for op in known}


def test_what_a_training_image_keeps_for_the_backward_pass():
    """In docs/segmentation.md: 16 images of 768 x 768 fit a GPU of 24 GB."""
    model, kept = Segmenter("xformer_s").train(), {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logits = upsample(model(torch.randn(1, 3, 768, 768)), 4, (768, 768))
        rows = logits.movedim(1, -1).flatten(0, 2)
        loss = F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss > 0
    assert 0.3 * 2**30 < sum(size for address, size in kept.items() if address not in weights) <= 0.75 * 2**30

"""The models: shapes, layout, gradients, modes, precision; compiled and exported."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import xformer
from xformer.attention import ATTENTION
from xformer.layers import ConvNorm, MBConv, XFBlock, to_image, to_tokens
from xformer_kernels import XFABlock, inference
from xformer_kernels.testing import assert_bitwise

NAMES = tuple(xformer.VARIANTS)
CHANNELS = {
    "xformer_s": [32, 64, 128, 256],
    "xformer_xs": [24, 48, 80, 128],
    "xformer_xxs": [16, 32, 64, 112],
}


def small(**options):
    """No branch is zero: outputs and gradients depend on all weights."""
    return xformer.xformer_xxs(num_classes=10, zero_init_last=False, **options)


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (97, 70)], ids=str)
def test_shapes(name, size):
    model = getattr(xformer, name)(num_classes=10, in_chans=4).eval()
    x = images(2, 4, *size)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, -(-size[0] // 32), -(-size[1] // 32))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert_bitwise(model.forward_head(features), model(x), "head after features")
        assert model(x).shape == (2, 10)


@pytest.mark.parametrize("name", NAMES)
def test_features(name):
    make = getattr(xformer, name)
    model = make(features_only=True).eval()
    assert model.feature_info.channels() == CHANNELS[name]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(images(1, 3, 65, 96))
    sizes = [(17, 24), (9, 12), (5, 6), (3, 3)]
    assert [m.shape[1:] for m in maps] == [(c, *s) for c, s in zip(CHANNELS[name], sizes, strict=True)]


def test_chosen_features_are_the_classifiers():
    whole, part = small().eval(), small(features_only=True, out_indices=(-2, 1)).eval()
    assert part.out_indices == part.feature_info.out_indices == (1, 2)
    assert part.feature_info.module_name() == ["stages.1", "stages.2"] and len(part.stages) == 3
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing and all(name.startswith(("stages.3", "head", "classifier")) for name in unexpected)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        last, maps = whole.forward_intermediates(x, indices=[1, 2])
        assert_bitwise(last, whole.forward_features(x), "features")
        only = whole.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True)
        for got, also, expected in zip(part(x), only, maps, strict=True):
            assert_bitwise(got, expected, "stage")
            assert_bitwise(also, expected, "stage")


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_views(in_chans, batch):
    """Every convolution gets and gives channels_last memory, whatever the image comes in."""
    model = small(in_chans=in_chans)
    seen = []

    def look(module, args, y):
        seen.append(type(module))
        assert y.is_contiguous(memory_format=torch.channels_last), module
        assert to_tokens(y).data_ptr() == y.data_ptr() and to_tokens(y).is_contiguous()

    for module in model.modules():
        if isinstance(module, (ConvNorm, XFBlock)) and module is not model.stem:
            module.register_forward_hook(look)
    model(images(batch, in_chans, 64, 64))
    assert seen.count(XFBlock) == 4
    tokens = images(2, 12, 8)
    assert to_image(tokens, 3, 4).data_ptr() == tokens.data_ptr()
    assert to_image(tokens, 3, 4).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("attention", [name for name in ATTENTION if name != "none"])
def test_every_parameter_gets_a_gradient(attention):
    model = small(attention=attention, se=True)
    F.cross_entropy(model(images(4, 3, 96, 96)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_residual_blocks_start_as_identities():
    model = xformer.xformer_xxs(num_classes=10)
    residual = [m for m in model.modules() if isinstance(m, XFBlock) or (isinstance(m, MBConv) and m.skip)]
    assert len(residual) == 7
    for block in residual:
        channels = block.expand.conv.in_features if isinstance(block, MBConv) else block.local.conv.in_channels
        x = images(2, channels, 8, 8)
        assert torch.equal(block(x), x)
    weights = xformer.xformer_xxs(num_classes=10, zero_init_last=False).state_dict()
    assert all(value.abs().max() > 0 for name, value in weights.items() if name.endswith("bn.weight"))


def test_blocks_of_attention_are_fused(ran_auto):
    """Layer norm, attention and residual are one call: of the Gram form where tokens are many."""
    model = small().eval()
    assert sum(isinstance(m, XFABlock) for m in model.modules()) == 7
    for size, op in ((512, "layer_forward"), (64, "xfa_forward")):
        with ran_auto(op), torch.no_grad():
            model(images(1, 3, size, size))


def test_attention_by_name_or_factory():
    outputs = {}
    x = images(2, 3, 96, 96)
    for name in ATTENTION:
        torch.manual_seed(0)
        with torch.no_grad():
            outputs[name] = small(attention=name).eval()(x)
    values = list(outputs.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])

    seen = []

    def own(dim, num_heads, **drops):
        seen.append((dim, num_heads, drops["drop_path"]))
        return torch.nn.Identity()

    small(attention=own, drop_path_rate=0.1)
    assert [(dim, heads) for dim, heads, _ in seen] == [(64, 2), *[(96, 3)] * 4, *[(160, 5)] * 2]
    assert seen[-1][2] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"attention must be one of 'xfa', .*, got 'linear'"):
        small(attention="linear")


def test_batch_of_one_in_training_and_eval():
    model = small()
    x = images(1, 3, 64, 64)
    model(x).sum().backward()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), model(torch.cat((x, images(1, 3, 64, 64, seed=1))))[:1])


def test_modes():
    model = small(drop_path_rate=0.5, drop_rate=0.5)
    x = images(4, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert_bitwise(model(x), model(x), "eval")
    graph = model(x)
    torch.testing.assert_close(graph.detach(), model(x).detach(), rtol=0, atol=0)


def test_what_gradients_change(monkeypatch):
    """Without gradients activations overwrite their inputs, and kernels multiply: the same bits, or to rounding."""
    model = small().eval()
    x = images(2, 3, 64, 64)
    before, expected = x.clone(), model(x).detach()
    with torch.no_grad():
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert_bitwise(x, before, "the image")
        monkeypatch.setattr(inference, "KERNELS", None)
        with torch.backends.mkldnn.flags(enabled=False):
            y = model(x)
    assert_bitwise(x, before, "the image")
    with torch.backends.mkldnn.flags(enabled=False):
        assert_bitwise(y, model(x).detach(), "output")


def test_checkpointing_gives_the_same_gradients():
    plain = small()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = images(2, 3, 64, 64)
    for model in (plain, saving):
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    model = small()
    x = images(2, 3, 64, 64)
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), torch.arange(2))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    model.eval()
    with torch.no_grad():
        full = model(x)
        with torch.autocast("cpu", dtype):
            half = model(x)
    assert half.dtype == dtype
    assert (half - full).abs().max() < 0.05 * full.abs().max().clamp_min(1)


def test_state_dict_round_trip(tmp_path):
    torch.manual_seed(1)
    model = small(se=True)
    model(images(4, 3, 64, 64))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = small(se=True)
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        assert_bitwise(again.eval()(x), model.eval()(x), "loaded")


def test_init_is_deterministic():
    def state(seed):
        torch.manual_seed(seed)
        return small().state_dict()

    one, same, other = state(3), state(3), state(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["stem.conv.weight"], other["stem.conv.weight"])


def test_signal_neither_dies_nor_explodes_at_init():
    model = xformer.xformer_s()
    with torch.no_grad():
        maps = model.forward_intermediates(images(4, 3, 96, 96), intermediates_only=True)
    assert all(0.3 < m.std() < 10 for m in maps)


def test_compiles_as_one_graph():
    model = small().eval()
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_exports():
    """By torch.export, for any batch, without a custom op where attention is the reference's."""
    model = small().eval()
    for module in model.modules():
        if isinstance(module, XFABlock):
            module.attn.backend = "reference"
    x = images(2, 3, 64, 64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert "xformer_kernels" not in str(program.graph)
    y = images(3, 3, 64, 64, seed=1)
    torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-5)


def test_small_images():
    model = small(stem_stride=1, stage_strides=(1, 2, 2, 2), img_size=32).eval()
    assert [info["reduction"] for info in model.feature_info] == [1, 2, 4, 8]
    with torch.no_grad():
        assert model.forward_features(images(1, 3, 32, 32)).shape[-2:] == (4, 4)
    with pytest.raises(ValueError, match="img_size=32 leaves one token at stride 32"):
        small(img_size=32)
    small(img_size=(33, 32))


def test_bad_arguments():
    with pytest.raises(ValueError, match="stem_stride must be 1 or 2 and stage_strides 4 of them"):
        small(stem_stride=4)
    with pytest.raises(ValueError, match="stem_stride must be 1 or 2"):
        small(stage_strides=(2, 2, 2))
    with pytest.raises(ValueError, match="global_pool must be '' or one of 'avg', 'max', 'avgmax', 'catavgmax', got"):
        small(global_pool="median")
    with pytest.raises(ValueError, match="output_stride is not supported: choose stem_stride and stage_strides"):
        small(output_stride=16)
    with pytest.raises(ValueError, match="out_indices needs features_only"):
        small(out_indices=(1,))
    for indices in ((4,), (-5,), (), 0, -1, 5):
        with pytest.raises(ValueError, match="out_indices must name some of 4 stages"):
            small(features_only=True, out_indices=indices)
        with pytest.raises(ValueError, match=r"^indices must name some of 4 stages"):
            small().forward_intermediates(images(1, 3, 64, 64), indices)
    for x in (images(1, 4, 64, 64), images(3, 64, 64), images(1, 3, 1, 64, 64)):
        with pytest.raises(ValueError, match=r"x must have shape \(B, 3, H, W\), got"):
            small()(x)
    with pytest.raises(ValueError, match="in_chans must be an integer of 1 or more, got 0"):
        small(in_chans=0)
    wrong = {
        "in_chans": 2.5, "num_classes": "10", "stem_stride": True, "stage_strides": 2, "se": "False", "img_size": "64",
        "zero_init_last": 1, "mlp_ratio": -1, "drop_path_rate": "x",
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.* got .*{value}"):
            xformer.xformer_xxs(**{name: value})
    with pytest.raises(ValueError, match=r"mlp_ratio must be at least 1 / 64 for 64 features, got 0\.001"):
        small(mlp_ratio=0.001)
    with pytest.raises(ValueError, match="num_classes must be an integer of 0 or more, got -1"):
        xformer.xformer_xxs(num_classes=-1)
    with pytest.raises(ValueError, match=r"attention must be one of .*, got \['xfa'\]"):
        small(attention=["xfa"])
    with pytest.raises(ValueError, match="no pretrained weights of xformer_xxs"):
        small(pretrained=True)
    with pytest.raises(ValueError, match="drop_path_rate must be in"):
        small(drop_path_rate=1.0)
    with pytest.raises(ValueError, match="output_fmt"):
        small().forward_intermediates(images(1, 3, 64, 64), output_fmt="NLHC")

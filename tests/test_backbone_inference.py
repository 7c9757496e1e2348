"""fuse_for_inference: the same outputs by fewer operations, and which of them are kernels."""

from __future__ import annotations

import pytest
import torch
from model_cases import as_trained, kernels_called, operations
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import xformer
from xformer import fuse_for_inference
from xformer.attention import XFAHalf
from xformer.fused import onednn
from xformer.layers import ConvNorm, HardSwish, MBConv, Mlp, Pointwise, XFBlock
from xformer_kernels import XFA, XFABlock, dispatch, inference
from xformer_kernels.layer import cost

needs_onednn = pytest.mark.skipif(not onednn.IS_THERE, reason="needs a torch with oneDNN on x86")


@pytest.fixture
def called(need_backend, monkeypatch):
    """Which kernels a call takes."""
    need_backend("cpp")
    if inference.KERNELS is None:
        pytest.skip(f"the kernels serve at the instruction levels {inference.LEVELS}")
    return lambda function, *inputs: kernels_called(monkeypatch, function, *inputs)


def images(*size):
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


def trained(name="xformer_xxs", **options):
    torch.manual_seed(0)
    return as_trained(getattr(xformer, name)(zero_init_last=False, **options))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", xformer.VARIANTS)
def test_same_outputs(name, kernels):
    model = trained(name)
    fused = fuse_for_inference(model, kernels)
    assert model.training and not fused.training
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model.eval()
    for size in ((128, 128), (71, 90)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
            assert (fused(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
        assert (fused(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize("options", [{"se": True}, {"attention": "softmax"}, {"attention": "none"}], ids=str)
def test_options(options):
    model = trained(**options)
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_feature_extractor():
    model = trained(features_only=True)
    fused, x = fuse_for_inference(model), torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        for got, expected in zip(fused(x), model.eval()(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def gelu(model):
    for module in model.modules():
        if isinstance(module, (ConvNorm, Mlp)):
            module.act = nn.GELU()
    return model


def hooks(kind):
    def add(model):
        for module in model.modules():
            if type(module) is kind:
                module.register_forward_hook(lambda module, args, out: 1.1 * out)
        return model

    return add


def normed_weights(model):
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not isinstance(module, XFA):
            nn.utils.parametrizations.weight_norm(module)
    return model


def no_affine(model):
    for module in model.modules():
        if isinstance(module, ConvNorm):
            mean, var = module.bn.running_mean, module.bn.running_var
            module.bn = nn.BatchNorm2d(len(mean), affine=False)
            module.bn.running_mean, module.bn.running_var = mean, var
    return model


CHANGES = {
    "SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "other activations": gelu,
    **{f"hooks of {kind.__name__}": hooks(kind) for kind in (ConvNorm, nn.BatchNorm2d, nn.Conv2d, Pointwise)},
    **{f"hooks of {kind.__name__}": hooks(kind) for kind in (HardSwish, Mlp, nn.Linear, nn.Dropout, XFA)},
    "computed weights": normed_weights,
    "no affine numbers": no_affine,
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_not_as_made(change, kernels):
    """They are part of the fused model too."""
    model = CHANGES[change](trained())
    fused, x = fuse_for_inference(model, kernels), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        assert (fused(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    if change in ("SyncBatchNorm", "no affine numbers"):
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())


def test_models_that_are_not_fused_take_no_kernels(called):
    assert called(trained().eval(), torch.randn(1, 3, 64, 64)) == []


def test_layers_are_single_passes(called):
    x = images(1, 16, 24, 32)
    for layer in (ConvNorm(16, 24), ConvNorm(16, 24, act=False), Pointwise(16, 8)):
        assert called(fuse_for_inference(layer), x) == ["linear"]
        assert called(fuse_for_inference(layer).train(), x) == []
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        assert called(fuse_for_inference(ConvNorm(16, 16, kernel, stride, groups=16)), x) == ["depthwise"]
    assert called(fuse_for_inference(Mlp(16)), torch.randn(2, 40, 16)) == ["linear", "linear"]
    assert called(fuse_for_inference(MBConv(16, 16, 3, 5)), x) == ["linear", "depthwise", "linear"]
    assert called(fuse_for_inference(nn.Linear(16, 3)), torch.randn(1, 16)) == ["linear"]


def test_large_maps_are_convolved_by_torch(called):
    """Depthwise ones, except with AVX2 and stride 1: oneDNN is faster there."""
    always = ["depthwise"] if inference.KERNELS.LEVEL == "x86_64_v3" else []
    for stride, large in ((1, always), (2, [])):
        layer = fuse_for_inference(ConvNorm(64, 64, 3, stride, groups=64))
        assert called(layer, images(1, 64, 79 * stride, 79 * stride)) == ["depthwise"]
        assert called(layer, images(1, 64, 80 * stride, 80 * stride)) == large


@needs_onednn
def test_what_onednn_convolves():
    conv, x = fuse_for_inference(ConvNorm(3, 16, 3, 2)), torch.randn(1, 3, 64, 64)

    def seen():
        with torch.no_grad(), torch.autograd.profiler.profile() as profile:
            y = conv(x)
        torch.testing.assert_close(y, conv(x).detach(), rtol=1e-5, atol=1e-5)
        return [event.name for event in profile.function_events]

    assert "mkldnn::_convolution_pointwise" in seen()
    with torch.backends.mkldnn.flags(enabled=False):
        assert "mkldnn::_convolution_pointwise" not in seen()


@pytest.mark.parametrize("side", [1, 3])
def test_kernels_do_not_serve_where_torch_has_to_see_its_operations(side, called):
    layer = ConvNorm(64, 64, side, groups=64 if side > 1 else 1)
    conv, plain = fuse_for_inference(layer), fuse_for_inference(layer, kernels=False)
    x, t = images(2, 64, 30, 30), images(2, 64, 30, 30)
    assert called(conv, x) and not called(plain, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(conv)(x[:, None]), plain(x)[:, None])
        for got, expected in zip(torch.func.jvp(conv, (x,), (t,)), torch.func.jvp(plain, (x,), (t,)), strict=True):
            torch.testing.assert_close(got, expected)
        with torch.autograd.forward_ad.dual_level():
            y = torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, t)))
        torch.testing.assert_close(y.tangent, torch.func.jvp(plain, (x,), (t,))[1])
        traced = str(torch.jit.trace(conv, x).inlined_graph)
    assert "mkldnn" not in traced and "hardswish" in traced
    assert not called(lambda: operations(conv, x)) and not called(lambda: torch.func.vmap(conv)(x[:, None]))
    assert not called(torch.enable_grad()(conv), x)
    assert not called(conv.double(), x.double())


def test_flops_are_those_of_the_layers():
    model, x = trained().eval(), torch.randn(1, 3, 128, 128)
    for module in model.modules():
        if isinstance(module, XFA):
            module.form = "direct"
    flops = []
    for each in (model, fuse_for_inference(model), fuse_for_inference(model, kernels=False)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            each(x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == flops[2]


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (1, 3, 1, 1), (2, 3, 33, 70)])
def test_any_size(shape):
    model, x = trained().eval(), torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_twice_is_once():
    fused, x = fuse_for_inference(trained()), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fuse_for_inference(fused)(x), fused(x), rtol=0, atol=0)


def test_a_folded_model_can_be_fused_later(called):
    x, model = torch.randn(1, 3, 64, 64), trained("xformer_s")
    folded = fuse_for_inference(model, kernels=False)
    assert called(folded, x) == []
    assert called(fuse_for_inference(folded), x) == called(fuse_for_inference(model), x) != []


def test_fewer_operations(called):
    model, x = trained("xformer_s").eval(), torch.randn(1, 3, 64, 64)
    folded = operations(fuse_for_inference(model, kernels=False), x)
    assert "aten.native_batch_norm" in operations(model, x)
    assert "aten.native_batch_norm" not in folded and "aten.hardswish" in folded
    passes = called(fuse_for_inference(model), x)
    layers = [type(m) for m in model.modules()]
    # the stem is oneDNN's; layer norms and sums are of the products beside them, and the classifier is one
    depthwise = sum(m.groups > 1 for m in model.modules() if isinstance(m, nn.Conv2d))
    linear = layers.count(Pointwise) + 2 * layers.count(Mlp) + 2 * layers.count(XFAHalf) + layers.count(XFBlock) + 1
    assert passes.count("depthwise") == depthwise and passes.count("linear") == linear
    assert len(passes) == depthwise + linear


def test_faster_projections_move_the_choice_of_form():
    shape, machine = cost.Shape(1, 1024, 192, 6, 192, 192, itemsize=4, training=False), cost.built_in("cpu")
    assert cost.cheaper(shape, machine) == "gram" and cost.cheaper(shape._replace(kernels=True), machine) == "direct"
    assert cost.cheaper(shape._replace(N=16384, kernels=True), machine) == "gram"


@pytest.mark.parametrize("kind", [XFABlock, XFAHalf], ids=lambda kind: kind.__name__)
def test_auto_knows_who_projects(kind, called):
    """By the kernels the direct form is the cheaper one for these tokens, by torch's products it is the other."""
    torch.manual_seed(0)
    plain = fuse_for_inference(nn.Sequential(kind(192, 6)), kernels=False)
    fused, x = fuse_for_inference(plain), torch.randn(1, 1024, 192)
    assert called(fused, x) == ["linear", "linear"] and called(plain, x) == []
    with torch.no_grad(), dispatch.record() as ran:
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
        long = torch.randn(1, 16384, 192)
        torch.testing.assert_close(fused(long), plain(long), rtol=1e-5, atol=1e-5)
    assert ran == [("cpp", f"{form}_forward") for form in ("xfa", "layer", "layer", "layer")]
    assert called(fused, long) == []


def test_a_masked_half_block_is_computed_plainly(called):
    x, mask = torch.randn(2, 40, 64), torch.rand(2, 40) < 0.5
    plain = XFABlock(64, 2).eval()
    fused = fuse_for_inference(plain)
    assert called(fused, x, mask) == []
    with torch.no_grad():
        torch.testing.assert_close(fused(x, mask), plain(x, mask), rtol=1e-5, atol=1e-5)


def test_what_kernels_cannot_take_is_computed_plainly():
    model = trained()
    fused, plain = fuse_for_inference(model), model.eval()
    x = torch.randn(2, 3, 64, 64)
    fused(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(fused.double()(x.double()), plain.double()(x.double()))
        fused, plain = fused.float(), plain.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert (fused(x) - plain(x)).abs().max() < 0.05
        program = torch.export.export(fused, (x,))
    assert "mkldnn" not in str(program.graph)


def test_without_kernels(monkeypatch):
    """As where no extension was built, or another backend was asked for."""
    model, x = trained().eval(), torch.randn(1, 3, 64, 64)
    fused = fuse_for_inference(model)
    with torch.no_grad():
        expected = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(inference, "KERNELS", None)
            for each in (fused, fuse_for_inference(model)):
                torch.testing.assert_close(each(x), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "reference")
    assert kernels_called(monkeypatch, fused, x) == []


def test_what_hooks_keep_is_not_overwritten():
    """Without gradients too, where an activation in place would change what the layer before it gave the hook."""
    model = xformer.xformer_xxs(num_classes=10).eval()
    x, kept = torch.randn(1, 3, 64, 64), {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _, args, y, name=name: kept.__setitem__(name, y))
    with torch.enable_grad():
        model(x)
    right = {name: y.detach().clone() for name, y in kept.items()}
    with torch.no_grad():
        model(x)
    for name, y in kept.items():
        torch.testing.assert_close(y, right[name], rtol=1e-3, atol=1e-3, msg=name)

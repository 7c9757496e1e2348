"""Inference: what layers do by themselves, and fuse_for_inference. Same outputs, fewer operations."""

from __future__ import annotations

import pytest
import torch
from model_cases import as_trained, operations
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import xformer
from xformer import fuse, fuse_for_inference, products
from xformer.attention import XFAHalf
from xformer.layers import ConvNorm, HardSwish, Mlp, Pointwise
from xformer_kernels import XFA, XFABlock
from xformer_kernels.layer import cost

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="needs a torch with oneDNN on x86")


def trained(name="xformer_xxs", **options):
    torch.manual_seed(0)
    return as_trained(getattr(xformer, name)(**options))


@pytest.mark.parametrize("onednn", [False, None])
@pytest.mark.parametrize("name", xformer.VARIANTS)
def test_same_outputs(name, onednn):
    model = trained(name)
    fused = fuse_for_inference(model, onednn)
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


@pytest.mark.parametrize("onednn", [False, None])
@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_are_not_as_made(change, onednn):
    """They are part of the fused model too."""
    model = CHANGES[change](trained())
    fused, x = fuse_for_inference(model, onednn), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        assert (fused(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())
    if change in ("SyncBatchNorm", "no affine numbers"):
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_layers_by_themselves(change):
    """Without gradients the outputs are those with them."""
    model = CHANGES.get(change, lambda model: model)(trained()).eval()
    for shape in ((2, 3, 96, 96), (1, 3, 161, 90)):
        x = torch.randn(shape)
        expected = model(x).detach()
        with torch.no_grad():
            assert (model(x) - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max())


@needs_onednn
def test_layers_fold_by_themselves():
    """The first stages, whose maps are larger than their weights, have no pass of batch norm."""
    conv, x = ConvNorm(16, 24).eval(), torch.randn(1, 16, 96, 96)
    assert operations(conv, x)[-2:] == ["mkldnn._linear_pointwise", "aten.permute"]
    assert "aten.native_batch_norm" in operations(conv, x[:, :, :3, :5])
    conv = ConvNorm(16, 16, 3, groups=16).eval()
    assert operations(conv, x)[-1] == "mkldnn._convolution_pointwise"


@pytest.mark.parametrize("side", [1, 3])
def test_what_layers_fold_is_never_out_of_date(side):
    conv, x = ConvNorm(8, 64, side).eval(), torch.randn(1, 8, 90, 60)
    for change in (conv.conv.weight, conv.bn.weight, conv.bn.bias, conv.bn.running_mean, conv.bn.running_var):
        with torch.no_grad():
            conv(x)
        change.data.add_(0.5)  # no version counter knows of it
        expected = conv(x).detach()
        with torch.no_grad():
            torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)
            before = conv.bn.running_mean.clone()
            torch.testing.assert_close(conv.train()(x).mean((0, 2, 3)), conv.act(conv.bn(conv.conv(x))).mean((0, 2, 3)))
        assert not torch.equal(conv.bn.running_mean, before)
        conv.eval()


@needs_onednn
def test_private_operations_are_not_seen_where_torch_would_not_know_them():
    conv, x, t = ConvNorm(8, 64).eval(), torch.randn(2, 8, 60, 60), torch.randn(2, 8, 60, 60)
    plain = ConvNorm(8, 64).eval()
    plain.load_state_dict(conv.state_dict())
    plain.onednn = plain.conv.onednn = False
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(conv)(x[:, None]), plain(x)[:, None])
        for got, expected in zip(torch.func.jvp(conv, (x,), (t,)), torch.func.jvp(plain, (x,), (t,)), strict=True):
            torch.testing.assert_close(got, expected)
        with torch.autograd.forward_ad.dual_level():
            y = torch.autograd.forward_ad.unpack_dual(conv(torch.autograd.forward_ad.make_dual(x, t)))
        torch.testing.assert_close(y.tangent, torch.func.jvp(plain, (x,), (t,))[1])
        assert "mkldnn" not in str(torch.jit.trace(conv, x).inlined_graph)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not [op for op in operations(conv, x) if "mkldnn" in op]


def test_flops_are_those_of_the_layers():
    model, x = trained().eval(), torch.randn(1, 3, 128, 128)
    for module in model.modules():
        if isinstance(module, XFA):
            module.form = "direct"
    flops = []
    for each in (model, fuse_for_inference(model), fuse_for_inference(model, onednn=False)):
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


@needs_onednn
def test_a_folded_model_can_be_fused_later():
    x = torch.randn(1, 3, 256, 256)
    model = trained("xformer_s")
    later = fuse_for_inference(fuse_for_inference(model, onednn=False), onednn=True)
    assert operations(later, x) == operations(fuse_for_inference(model), x)


def test_fewer_operations():
    model = trained("xformer_s").eval()
    x = torch.randn(1, 3, 256, 256)
    folded = operations(fuse_for_inference(model, onednn=False), x)
    assert "aten.native_batch_norm" in operations(model, x)
    assert "aten.native_batch_norm" not in folded and "aten.hardswish_" in folded
    if products.HAS_ONEDNN:
        fused = operations(fuse_for_inference(model), x)
        assert "mkldnn._linear_pointwise" in fused and "mkldnn._convolution_pointwise" in fused
        assert not [name for name in fused if "hardswish" in name]
        # few tokens: attention in its direct form projects by oneDNN too; torch has the classifier of one image
        assert "aten.mm" in folded and "aten.mm" not in fused and fused.count("aten.addmm") == 1


def test_faster_projections_move_the_choice_of_form():
    shape = cost.Shape(B=1, N=1024, C=192, H=6, inner=192, out=192, itemsize=4, training=False)
    assert cost.cheaper(shape, "cpu") == "gram" and cost.cheaper(shape, "onednn") == "direct"
    assert cost.cheaper(shape._replace(N=16384), "onednn") == "gram"


@needs_onednn
@pytest.mark.parametrize("kind", [XFA, XFABlock, XFAHalf], ids=lambda kind: kind.__name__)
def test_auto_knows_who_projects(kind, need_backend, monkeypatch):
    """By oneDNN the direct form is the cheaper one for these tokens, by torch's products it is the other."""
    need_backend("cpp")
    machines, cheaper = [], cost.cheaper
    monkeypatch.setattr(cost, "cached", lambda shape, machine: (machines.append(machine), cheaper(shape, machine))[1])
    torch.manual_seed(0)
    plain = fuse_for_inference(nn.Sequential(kind(192, 6)), onednn=False)
    fused, x = fuse_for_inference(plain), torch.randn(1, 1024, 192)
    by_onednn, by_torch = operations(fused, x), operations(plain, x)
    assert by_onednn.count("mkldnn._linear_pointwise") == 2 and "xformer_kernels.xfa_forward" in by_onednn
    assert "xformer_kernels.layer_forward" in by_torch and "mkldnn._linear_pointwise" not in by_torch
    assert machines == ["onednn", "cpu"]
    if kind is XFAHalf:
        assert operations(nn.Sequential(kind(192, 6)).eval(), x) == by_onednn
        machines.pop()
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            fused(x)
        machines.clear()
        fused.double()(x.double())
    fused.float()(x)
    assert machines == ["cpu", "cpu"]


def test_what_onednn_cannot_take_is_computed_plainly():
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


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(fuse, "has_onednn", lambda: False)
    fused = fuse_for_inference(trained())
    assert not any(isinstance(m, fuse.FusedLinear) for m in fused.modules())
    with pytest.raises(RuntimeError, match="built without oneDNN"):
        fuse_for_inference(fused, onednn=True)

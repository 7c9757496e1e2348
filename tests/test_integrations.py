"""replace_attention and restoring the attention, in models of other packages."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import randn
from test_nn import randomize, run
from torch import nn

from xformer_kernels.integrations import is_replaced, replace_attention, restore_attention
from xformer_kernels.testing import assert_close

timm = pytest.importorskip("timm", reason="timm, whose models are converted, is not installed")
from timm.models.edgenext import CrossCovarianceAttn  # noqa: E402
from timm.models.xcit import XCA  # noqa: E402


class MDTA(nn.Module):
    """Multi-Dconv head transposed attention, from section 3.1 of the Restormer paper (arXiv 2111.09881)."""

    def __init__(self, dim, num_heads, bias):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, kernel_size=3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = (
            part.reshape(b, self.num_heads, c // self.num_heads, h * w)
            for part in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        )
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.project_out((attention @ v).reshape(b, c, h, w))


class Holder(nn.Module):
    """A model with one attention module as child, since children are replaced."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def replaced(model, **choices):
    model = copy.deepcopy(model)
    count = replace_attention(model, **choices)
    return model, count


def check_replaced(model, x, ran_auto, count, calls=None):
    """Checks the output and all gradients, with the usual tolerance of the model's dtype."""
    dy = randn(*model(x).shape, seed=3, dtype=x.dtype)
    new, n = replaced(model)
    assert n == count
    with ran_auto("xfa_forward", "xfa_backward"):
        result = run(new, x, dy)
    eager = run(model, x, dy)
    assert result.keys() == eager.keys()
    oracle = run(copy.deepcopy(model).double(), x.double(), dy.double())
    for name, got in result.items():
        assert got.stride() == eager[name].stride() or name == "y"
        assert_close(got, eager[name], oracle[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("qkv_bias", [False, True], ids=["", "qkv_bias"])
@pytest.mark.parametrize("kind", [XCA, CrossCovarianceAttn], ids=lambda kind: kind.__name__)
def test_timm_layers(kind, qkv_bias, dtype, ran_auto):
    model = Holder(randomize(kind(48, num_heads=4, qkv_bias=qkv_bias))).to(dtype)
    check_replaced(model, randn(2, 100, 48, seed=1, dtype=dtype), ran_auto, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_mdta(bias, memory_format, dtype, ran_auto):
    """Both memory formats are supported without conversion to the other."""
    model = Holder(randomize(MDTA(48, 4, bias))).to(dtype).to(memory_format=memory_format)
    x = randn(2, 48, 9, 13, seed=1, dtype=dtype).to(memory_format=memory_format)
    check_replaced(model, x, ran_auto, 1)
    with torch.no_grad():
        assert replaced(model)[0](x).is_contiguous(memory_format=memory_format)


# ------------------------------------------------------------------------------------------------------- whole models

MODELS = {
    # name: (image size, number of attention layers, ops of layers with many tokens for their features, or with few)
    "xcit_nano_12_p8_224": (224, 12, "layer"),
    "xcit_nano_12_p8_384": (384, 12, "layer"),
    "edgenext_xx_small": (256, 3, "xfa"),
    "edgenext_small": (256, 3, "xfa"),
}


def make_model(name):
    """A model with layer scales of about 1; with their initial 1e-6 the output would hardly depend on the attention."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "gamma" in key:
                parameter.uniform_(0.5, 1.0)
            elif "temperature" in key:
                parameter.uniform_(0.5, 3.0)
    return model


def differences(got, exact):
    """The largest error of each tensor, relative to its largest element.

    Gradients that are zero up to rounding (of the bias of keys under a softmax over tokens) are excluded: they must be
    negligible relative to the largest gradient.
    """
    largest = max(x.abs().max().item() for x in exact.values())
    zero = {name for name, x in exact.items() if x.abs().max() < 1e-12 * largest}
    assert len(zero) <= len(exact) // 20
    for name in zero:
        assert got[name].abs().max() < 10 * torch.finfo(got[name].dtype).eps * largest, name
    units = {name: x.abs().max() for name, x in exact.items() if name not in zero}
    return {name: ((got[name].double() - exact[name]).abs().max() / unit).item() for name, unit in units.items()}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name, ran_auto):
    """The output and the gradients of all parameters are the same: in float64 closely, in float32 within a tolerance.

    The errors of a deep model come from all of its layers, so the tolerance applies to the model as a whole: the worst
    relative error of any gradient may be twice that of the original model.
    """
    size, layers, op = MODELS[name]
    ops = (f"{op}_forward", f"{op}_backward")
    model = make_model(name)
    x, dy = randn(1, 3, size, size, seed=1), randn(1, 10, seed=2)
    new, count = replaced(model)
    assert count == layers
    oracle = run(copy.deepcopy(model).double(), x.double(), dy.double())
    with ran_auto(*ops):
        exact = run(copy.deepcopy(new).double(), x.double(), dy.double())
    worst = differences(exact, oracle)
    assert max(worst.values()) < 1e-9, worst
    assert oracle.keys() == {"y", "dx", *(f"d{key}" for key, _ in model.named_parameters())}
    with ran_auto(*ops):
        ours = differences(run(new, x, dy), oracle)
    eager = differences(run(model, x, dy), oracle)
    ulp = 4 * torch.finfo(torch.float32).eps
    assert ours["y"] <= 2 * eager["y"] + ulp
    assert max(ours.values()) <= 2 * max(eager.values()) + ulp


def test_output_depends_on_the_attention():
    """Another temperature must change the output, otherwise the comparisons above would prove nothing."""
    for name in ("xcit_nano_12_p8_224", "edgenext_xx_small"):
        model = make_model(name)
        x = randn(1, 3, 224, 224, seed=1)
        with torch.no_grad():
            before = model(x)
            for key, parameter in model.named_parameters():
                if "temperature" in key:
                    parameter.mul_(1.5)
            assert (model(x) - before).abs().max() > 1e-3 * before.abs().max()


# ------------------------------------------------------------------------------------------- what replacement preserves


def modules():
    yield "XCA", Holder(XCA(48, 4, True, 0.1, 0.1)), (2, 20, 48)
    yield "CrossCovarianceAttn", Holder(CrossCovarianceAttn(48, 4, True, 0.1, 0.1)), (2, 20, 48)
    yield "MDTA", Holder(MDTA(48, 4, True)), (2, 48, 5, 4)


@pytest.mark.parametrize(
    "kind, model, shape", list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_replace_and_restore(kind, model, shape):
    """In place: parameters (as an optimiser holds them), names, dtype, mode and requires_grad stay the same."""
    model = copy.deepcopy(model).double().eval()
    model.inner.temperature.requires_grad_(False)
    before = dict(model.named_parameters())
    original = type(model.inner)
    assert replace_attention(model) == 1
    assert is_replaced(model.inner) and not is_replaced(model) and type(model.inner) is original
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is before[name], f"{name} is another parameter"
    assert not model.inner.temperature.requires_grad and model.inner.qkv.weight.requires_grad
    assert all(not module.training for module in model.modules())
    assert model.train().inner.training
    assert replace_attention(model) == 0, "what is replaced is not replaced again"
    with torch.no_grad():
        model.inner.temperature.fill_(2.5)
    x = randn(*shape, seed=1, dtype=torch.float64)
    model.eval()
    ours = model(x)
    restore_attention(model)
    assert not is_replaced(model.inner) and "forward" not in model.inner.__dict__
    assert dict(model.named_parameters()).keys() == before.keys()
    assert (model.inner.temperature == 2.5).all(), "weights trained in between are kept"
    torch.testing.assert_close(model(x), ours, rtol=1e-10, atol=1e-10)
    assert replace_attention(model) == 1, "and again"


@pytest.mark.parametrize(
    "kind, model, shape", list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_state_dicts_are_interchangeable(kind, model, shape):
    other = copy.deepcopy(randomize(copy.deepcopy(model), seed=1))
    new, _ = replaced(model)
    new.load_state_dict(other.state_dict(), strict=True)
    x = randn(*shape, seed=1)
    torch.testing.assert_close(new.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-5)
    model = copy.deepcopy(model)
    model.load_state_dict(new.state_dict(), strict=True)
    torch.testing.assert_close(model.eval()(x), new(x), rtol=1e-4, atol=1e-5)


def test_dropout_rates_are_kept():
    for kind in (XCA, CrossCovarianceAttn):
        model, _ = replaced(Holder(kind(48, 4, True, attn_drop=0.9, proj_drop=0.0)))
        x = randn(2, 20, 48, seed=1)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


def test_shared_and_nested_modules():
    """A module used twice is replaced once."""
    shared = XCA(24, 2)
    model = nn.Sequential(shared, nn.Sequential(shared, XCA(24, 2)))
    expected = model(randn(1, 9, 24, seed=1))
    assert replace_attention(model) == 2
    assert model[0] is model[1][0]
    torch.testing.assert_close(model(randn(1, 9, 24, seed=1)), expected, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_itself_an_attention_layer():
    layer = randomize(XCA(24, 2))
    x = randn(1, 9, 24, seed=1)
    expected = layer(x)
    assert replace_attention(layer) == 1
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-6)
    assert restore_attention(layer) == 1 and not is_replaced(layer)


def test_models_without_known_attention_are_not_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Conv2d(3, 3, 1))
    before = [id(module) for module in model.modules()]
    assert replace_attention(model) == 0
    assert restore_attention(model) in (0, None)
    assert [id(module) for module in model.modules()] == before


def test_subclasses_with_another_forward_are_not_replaced():
    """A class derived from XCA that computes something else must not be replaced as XCA."""

    class Other(XCA):
        def forward(self, x):
            return super().forward(x) * 2

    model = Holder(randomize(Other(24, 2)))
    x = randn(1, 9, 24, seed=1)
    expected = model(x)
    replace_attention(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)


def test_module_similar_to_mdta_is_not_replaced():
    """Names of the parts are not sufficient: here the channels of the heads are not split evenly into q, k and v."""

    class Almost(MDTA):
        def forward(self, x):
            return super().forward(x) + x

    model = Holder(randomize(Almost(24, 2, False)))
    x = randn(1, 24, 5, 4, seed=1)
    expected = model(x)
    replace_attention(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-6)


def test_argument_must_be_a_module():
    for bad in (None, "xcit", [nn.Identity()]):
        with pytest.raises(TypeError, match="model"):
            replace_attention(bad)

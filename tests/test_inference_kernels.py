"""Fused linear layers and depthwise convolutions, compared with float64: shapes, optional parts, numbers of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from xformer_kernels import inference
from xformer_kernels.inference import BatchNorm, LayerNorm, depthwise, linear
from xformer_kernels.testing import assert_bitwise, assert_close


@pytest.fixture(autouse=True)
def kernels(need_backend):
    need_backend("cpp")
    if inference.KERNELS is None:
        pytest.skip(f"the kernels serve at the instruction levels {inference.LEVELS}")
    with torch.no_grad():
        yield


def batch_norm(features, affine=True):
    mean, variance = torch.randn(features), torch.rand(features) + 0.1
    weight, bias = (torch.randn(features), torch.randn(features)) if affine else (None, None)
    return BatchNorm(mean, variance, weight, bias, 1e-5)


def double(part):
    if isinstance(part, (BatchNorm, LayerNorm)):
        return type(part)(*map(double, part))
    return part.double() if isinstance(part, torch.Tensor) else part


def norm_and_activation(y, norm, hard_swish):
    if norm is not None:
        y = F.batch_norm(y, norm.mean, norm.variance, norm.weight, norm.bias, eps=norm.eps)
    return F.hardswish(y) if hard_swish else y


def linear_in_torch(x, weight, bias=None, *, batch_norm=None, layer_norm=None, hard_swish=False, add=None):
    if layer_norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *layer_norm)
    rows = F.linear(x, weight, bias).reshape(-1, weight.shape[0])
    y = norm_and_activation(rows, batch_norm, hard_swish).reshape(*x.shape[:-1], weight.shape[0])
    return y if add is None else add + y


def depthwise_in_torch(x, weight, bias=None, stride=1, *, batch_norm=None, hard_swish=False):
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=len(weight))
    return norm_and_activation(y, batch_norm, hard_swish)


def check(function, plain, *args, **parts):
    """Compares a kernel with the oracle in float64; allocated memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)  # fills allocated memory with NaN
    try:
        result = function(*args, **parts)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result is not None, "the kernel did not serve"
    oracle = plain(*map(double, args), **{name: double(part) for name, part in parts.items()})
    assert_close(result, plain(*args, **parts), oracle, plain.__name__)
    return result


# (tokens, input features, output features): below and above one vector, whole vectors or not, few tokens and many
# features, numbers of tokens next to 96
SHAPES = (
    (16, 1, 1),
    (17, 3, 5),
    (16, 33, 97),
    (97, 16, 16),
    (64, 160, 320),
    (193, 96, 24),
    (331, 7, 64),
    (1024, 24, 40),
    (18, 1024, 9),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norms", list(itertools.product([False, True], repeat=2)), ids=str)
def test_linear(shape, norms):
    torch.manual_seed(0)
    N, I, O = shape  # noqa: E741
    x, weight = torch.randn(1, N, I) + 0.5, torch.randn(O, I)
    parts = {}
    if norms[0]:
        parts["layer_norm"] = LayerNorm(torch.randn(I), torch.randn(I), 1e-6)
    if norms[1]:
        parts["batch_norm"] = batch_norm(O)
    for bias, add in itertools.product((None, torch.randn(O)), (None, torch.randn(1, N, O))):
        for hard_swish in (False, True):
            check(linear, linear_in_torch, x, weight, bias, add=add, hard_swish=hard_swish, **parts)


@pytest.mark.parametrize("features", [512, 513, 1000, 1024])
def test_many_features_are_as_accurate_as_few(features):
    for seed in range(8):
        numbers = torch.Generator().manual_seed(seed)
        x, weight, add = (torch.randn(*size, generator=numbers) for size in ((99, features), (17, features), (99, 17)))
        parts = {
            "layer_norm": LayerNorm(None, None, 1e-6),
            "hard_swish": seed % 2 == 1,
            "add": add if seed % 4 else None,
        }
        check(linear, linear_in_torch, x, weight / features**0.5, **parts)


def test_norms_without_affine_parameters():
    x, weight = torch.randn(2, 3, 11, 20), torch.randn(18, 20)
    parts = {"batch_norm": batch_norm(18, affine=False), "layer_norm": LayerNorm(None, None, 1e-5)}
    check(linear, linear_in_torch, x, weight, **parts)
    for eps in (1e-5, 0.0):
        parts["layer_norm"] = LayerNorm(torch.randn(20), None, eps)
        check(linear, linear_in_torch, x, weight, **parts)


IMAGES = ((1, 1, 1, 1), (1, 16, 8, 8), (2, 33, 7, 9), (1, 48, 31, 64), (3, 72, 2, 40), (1, 100, 40, 3), (2, 16, 1, 19))


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(shape, side, stride):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, side, side)
    for bias in (None, torch.randn(shape[1])):
        y = check(depthwise, depthwise_in_torch, x, weight, bias, stride)
        assert y.is_contiguous(memory_format=torch.channels_last)
        for hard_swish in (False, True):
            check(
                depthwise, depthwise_in_torch, x, weight, bias, stride, batch_norm=batch_norm(shape[1]),
                hard_swish=hard_swish,
            )  # fmt: skip


def test_nonfinite_values_do_not_spread():
    x, weight = torch.randn(40, 24), torch.randn(50, 24)
    x[3, 5], x[30, 0] = torch.nan, torch.inf
    y = linear(x, weight, hard_swish=True)
    assert y[3].isnan().all() and not y[[i for i in range(40) if i not in (3, 30)]].isnan().any()
    image = torch.randn(1, 20, 12, 12).contiguous(memory_format=torch.channels_last)
    image[0, 2, 6, 6] = torch.nan
    y = depthwise(image, torch.ones(20, 1, 3, 3))
    assert y.isnan().sum() == 9 and y[0, 2, 5:8, 5:8].isnan().all()


def test_bits_do_not_depend_on_threads():
    """Whether threads split tokens or features, and for any number of them per thread."""
    threads = torch.get_num_threads()
    image = torch.randn(2, 40, 33, 29).contiguous(memory_format=torch.channels_last)
    calls = {
        f"linear {shape}": (linear, torch.randn(shape[0], shape[1]), torch.randn(shape[2], shape[1]))
        for shape in ((64, 160, 320), (2048, 40, 72), (90, 500, 130))
    }
    calls["depthwise"] = (depthwise, image, torch.randn(40, 1, 5, 5))
    # for small maps, threads split the channels
    small = torch.randn(1, 450, 8, 8).contiguous(memory_format=torch.channels_last)
    calls["depthwise, small"] = (depthwise, small, torch.randn(450, 1, 5, 5))
    try:
        for what, (function, *args) in calls.items():
            torch.set_num_threads(1)
            expected = function(*args)
            for count in (2, 3, 4, 7):
                torch.set_num_threads(count)
                assert_bitwise(function(*args), expected, f"{what} with {count} threads")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 72), (64, 160, 900)], ids=str)
def test_packed_weights_give_the_same_bits(shape):
    N, I, O = shape  # noqa: E741
    x, weight = torch.randn(N, I), torch.randn(O, I)
    packed, others = inference.KERNELS.pack_linear(weight), (torch.randn(O), None, (None, None, 1e-6), True, None)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            expected = inference.KERNELS.linear(x, weight, *others)
            assert_bitwise(inference.KERNELS.linear(x, weight, *others, packed), expected, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


def test_packed_weights_have_no_batch_norm():
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    with pytest.raises(ValueError):
        inference.KERNELS.linear(
            x, weight, None, batch_norm(6), None, False, None, inference.KERNELS.pack_linear(weight)
        )


def refused_linears():
    x, weight, bias = torch.randn(20, 8), torch.randn(6, 8), torch.randn(6)
    yield "few tokens", (x[:15], weight, bias), {}
    yield "strided tokens", (torch.randn(8, 20).T, weight, bias), {}
    yield "a strided weight", (x, torch.randn(8, 6).T, bias), {}
    yield "other features", (torch.randn(20, 9), weight, bias), {}
    yield "a short bias", (x, weight, bias[:5]), {}
    yield "a strided bias", (x, weight, torch.randn(12)[::2]), {}
    yield "a bias of two dimensions", (x, weight, bias[:, None]), {}
    yield "a negated bias", (x, weight, torch._neg_view(bias)), {}
    yield "a weight of three dimensions", (x, weight[None], bias), {}
    yield "one number", (x[0, 0], weight, bias), {}
    yield "no mean", (x, weight, bias), {"batch_norm": batch_norm(6)._replace(mean=None)}
    yield "a bias in float64", (x, weight, bias.double()), {}
    yield "float64", (x.double(), weight.double(), bias.double()), {}
    yield "a sum that would broadcast", (x, weight, bias), {"add": torch.randn(6)}
    yield "other batch norm", (x, weight, bias), {"batch_norm": batch_norm(7)}
    yield "other layer norm", (x, weight, bias), {"layer_norm": LayerNorm(torch.randn(6), None, 1e-5)}
    yield "negative eps", (x, weight, bias), {"layer_norm": LayerNorm(None, None, -1.0)}
    yield "no tokens", (x[:0], weight, bias), {}
    yield "a sparse weight", (x, weight.to_sparse_csr(), bias), {}
    yield "too many features", (torch.randn(20, 1025), torch.randn(6, 1025), bias), {}
    yield "no features", (torch.randn(20, 0), torch.randn(6, 0), bias), {}
    yield "a negated view", (torch.complex(x, x).conj().imag, weight, bias), {}


@pytest.mark.parametrize("case", list(refused_linears()), ids=lambda case: case[0])
def test_calls_that_linear_refuses(case):
    what, args, parts = case
    assert linear(*args, **parts) is None, what


def refused_convolutions():
    x, weight = torch.randn(1, 8, 6, 6).contiguous(memory_format=torch.channels_last), torch.randn(8, 1, 3, 3)
    yield "another layout", (x.contiguous(), weight), {}
    yield "no image", (x[:0], weight), {}
    yield "a kernel of 7", (x, torch.randn(8, 1, 7, 7)), {}
    yield "a kernel that is no square", (x, torch.randn(8, 1, 3, 5)), {}
    yield "other channels", (x, torch.randn(9, 1, 3, 3)), {}
    yield "dense", (x, torch.randn(8, 8, 3, 3)), {}
    yield "a weight of three dimensions", (x, weight[:, 0]), {}
    yield "no variance", (x, weight), {"batch_norm": batch_norm(8)._replace(variance=None)}
    yield "a stride of 3", (x, weight, None, 3), {}
    yield "other batch norm", (x, weight), {"batch_norm": batch_norm(9)}
    yield "three dimensions", (x[0], weight), {}


@pytest.mark.parametrize("case", list(refused_convolutions()), ids=lambda case: case[0])
def test_calls_that_depthwise_refuses(case):
    what, args, parts = case
    assert depthwise(*args, **parts) is None, what


def test_not_used_with_gradients_or_autocast():
    x, weight = torch.randn(20, 8), torch.randn(6, 8)
    assert linear(x, weight) is not None
    with torch.enable_grad():
        assert linear(x, weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight) is None
    with torch.inference_mode():
        assert linear(x, weight) is not None


@pytest.mark.parametrize("features", [64, 512, 1024])
def test_shift_larger_than_the_products(features):
    """The shift is added after the products; otherwise every partial sum would be rounded to its precision."""
    for seed in range(4):
        numbers = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(64, features, generator=numbers) / 10, torch.randn(17, features, generator=numbers)
        norm = BatchNorm(torch.full((17,), 10.0), torch.ones(17), None, None, 0.0)
        check(linear, linear_in_torch, x, weight / features**0.5, batch_norm=norm)
        check(linear, linear_in_torch, x, weight / features**0.5, torch.full((17,), 100.0))


def test_norms_must_be_named_tuples():
    x, weight, image = torch.ones(16, 8), torch.ones(8, 8), torch.ones(1, 8, 3, 3)
    norm = (torch.ones(8), torch.ones(8), None, None, 1e-5)
    with pytest.raises(TypeError, match=r"batch_norm must be an inference\.BatchNorm or None, got tuple"):
        linear(x, weight, batch_norm=norm)
    with pytest.raises(TypeError, match=r"layer_norm must be an inference\.LayerNorm or None, got tuple"):
        linear(x, weight, layer_norm=(None, None, 1e-5))
    with pytest.raises(TypeError, match=r"batch_norm must be an inference\.BatchNorm or None, got tuple"):
        depthwise(image, torch.ones(8, 1, 3, 3), batch_norm=norm)

"""Linear attention of each backend, compared with its formula in float64."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAYOUTS, LOW_PRECISION, randn, random_mask
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import xformer_kernels as xk
from xformer_kernels import dispatch, reference, spec
from xformer_kernels.testing import assert_bitwise, assert_close, linear_attention_terms

pytestmark = pytest.mark.needs(norm=None)

MAPS = ("identity", "relu", "elu1", "softmax_features", "softmax_tokens")
PAIRS = (("relu", "identity"), ("identity", "softmax_tokens"), ("elu1", "relu"))
FUSED = ("linear_attention_forward", "linear_attention_backward")
NAMES = ("out", "dq", "dk", "dv")
# (B, H, N, M, D, Dv)
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (2, 3, 17, 7, 5, 9),
    (2, 1, 1, 131, 33, 2),
    (1, 2, 67, 1, 13, 31),
    (1, 2, 300, 211, 48, 32),
    (1, 1, 40, 29, 130, 127),
)
EMPTY = ((0, 2, 5, 3, 4, 4), (2, 0, 5, 3, 4, 4), (2, 2, 0, 3, 4, 4), (2, 2, 5, 0, 4, 3), (1, 1, 0, 0, 1, 1))


def inputs(shape, dtype=torch.float32, device="cpu", positive=False, seed=0):
    """q, k, v and dout, with different spreads per feature; `positive`: denominators are not near zero."""
    B, H, N, M, D, Dv = shape
    made = []
    for i, (tokens, features) in enumerate(((N, D), (M, D), (M, Dv), (N, Dv))):
        x = randn(B, H, tokens, features, seed=10 * seed + i, dtype=torch.float64)
        x = x * torch.linspace(0.5, 2.0, features, dtype=torch.float64)
        made.append((x.abs() + 0.1 if positive and i < 2 else x).to(device, dtype))
    return made


def run(function, tensors, **kwargs):
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, **kwargs)
    assert out.dtype == leaves[0].dtype
    return dict(zip(NAMES, (out.detach(), *torch.autograd.grad(out, leaves, dout)), strict=True))


def ops_of(backend, q, v):
    """The ops that compute linear attention with this backend."""
    fused = dispatch.fuses_linear_attention(backend, ("relu", "relu"), q.dtype, (q.shape[-1], v.shape[-1]))
    return FUSED if fused else ("channel_mix",)


def check(tensors, ran, backend, **kwargs):
    with ran(*ops_of(backend, tensors[0], tensors[2])):
        ours = run(xk.linear_attention, tensors, backend=backend, **kwargs)
    eager = run(reference.linear_attention, tensors, **kwargs)
    exact = [x.double() for x in tensors]
    oracle, terms = run(reference.linear_attention, exact, **kwargs), linear_attention_terms(*exact, **kwargs)
    for name in NAMES:
        assert_close(ours[name], eager[name], oracle[name], name, terms.get(name))
    return ours


# Triton and CUDA use the same composition of gram and channel_mix. If Triton is interpreted, CUDA runs all
# combinations, and Triton a subset that covers each feature map, dtype and value of normalize with each of the others.


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", [*MAPS, *PAIRS], ids=str)
def test_feature_maps(feature_map, dtype, backend, device, ran, interpreted):
    turn = (*MAPS, *PAIRS).index(feature_map) + DTYPES.index(dtype)
    tensors = inputs((1 if interpreted else 2, 2, 53, 71, 12, 20), dtype, device, positive="identity" in feature_map)
    for normalize in (turn % 2 == 0,) if interpreted and dtype != torch.float32 else (True, False):
        check(tensors, ran, backend, feature_map=feature_map, normalize=normalize, scale=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, backend, device, ran, interpreted):
    tensors = inputs(shape, dtype, device)
    turn = SHAPES.index(shape) + (dtype == torch.bfloat16)
    for feature_map in (("relu", "elu1")[turn % 2],) if interpreted else ("relu", "elu1"):
        out = check(tensors, ran, backend, feature_map=feature_map)["out"]
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_empty(feature_map, shape, backend, device, ran):
    """Without keys, the sums and the output are zero."""
    for normalize in (True, False):
        out = check(inputs(shape, device=device), ran, backend, feature_map=feature_map, normalize=normalize)["out"]
        assert out.shape == (*shape[:3], shape[5]) and not out.any()


@pytest.mark.filterwarnings("ignore:no kernel of xformer_kernels")
@pytest.mark.parametrize(("D", "Dv"), [(0, 4), (4, 0), (4, 513), (513, 2)])
def test_unsupported_numbers_of_features(D, Dv):
    q, k, v, _ = inputs((1, 2, 5, 6, D, Dv))
    for normalize in (True, False):
        out = xk.linear_attention(q, k, v, normalize=normalize)
        torch.testing.assert_close(out, reference.linear_attention(q, k, v, normalize=normalize), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device, ran):
    tensors = [LAYOUTS[layout](x) for x in inputs((2, 3, 37, 41, 9, 7), device=device)]
    for feature_map in ("relu", "softmax_tokens"):
        check(tensors, ran, backend, feature_map=feature_map)


@pytest.mark.parametrize("feature_map", ["identity", "relu", "elu1", "softmax_tokens"])
def test_gradients_of_images(feature_map, kernel, device, ran):
    """Gradients of channel-major tokens are channel-major, masked or not, so that they are copied in memory order."""
    image = randn(2, 3, 3, 7, 37, seed=5).to(device).requires_grad_()  # B, H, (q, k, v), D, N
    q, k, v = (x.transpose(-1, -2) for x in image.unbind(2))
    mask, dout = random_mask(2, 37, 3, device), randn(2, 3, 37, 7, seed=6).to(device)
    for normalize in (True, False):
        masks = {"query_mask": mask, "token_mask": mask, "feature_map": feature_map, "normalize": normalize}
        if feature_map == "identity":
            masks["normalize"] = False  # denominators may be near zero
        check([q, k, v, dout], ran, kernel, **masks)
        if ops_of(kernel, q, v) == FUSED:
            gradients = torch.autograd.grad(xk.linear_attention(q, k, v, backend=kernel, **masks), (q, k, v), dout)
            assert all(g.stride(2) == 1 for g in gradients)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_masked_tokens_take_no_part(feature_map, dtype, backend, device, ran, interpreted):
    """Whatever the values of masked tokens, the results are those of the kept tokens, and 0 elsewhere."""
    H, turn = 1 if interpreted else 2, MAPS.index(feature_map) + DTYPES.index(dtype)
    q, k, v, dout = inputs((2, H, 23, 31, 8, 6), dtype, device, positive=feature_map == "identity")
    query_mask, token_mask = random_mask(2, 23, 1, device), random_mask(2, 31, 2, device)
    token_mask[0] = False
    masks = {"query_mask": query_mask, "token_mask": token_mask}
    clean = check([q, k, v, dout], ran, backend, feature_map=feature_map, **masks)
    garbages = (float("nan"), float("inf"), float("-inf"))
    for garbage in (garbages[turn % 3],) if interpreted else garbages:
        dirty = [torch.where(query_mask[:, None, :, None], x, garbage) for x in (q, dout)]
        dirty[1:1] = [torch.where(token_mask[:, None, :, None], x, garbage) for x in (k, v)]
        ours = run(xk.linear_attention, dirty, feature_map=feature_map, backend=backend, **masks)
        theirs = run(reference.linear_attention, dirty, feature_map=feature_map, **masks)
        for name in NAMES:
            assert_bitwise(ours[name], clean[name], f"{name} with {garbage}")
            assert theirs[name].isfinite().all()
    for name, mask in (("out", query_mask), ("dq", query_mask), ("dk", token_mask), ("dv", token_mask)):
        assert not clean[name].transpose(1, 2)[~mask].any(), name
    assert not clean["out"][0].any() and clean["out"].transpose(1, 2).is_contiguous()
    kept = [q[1:, :, query_mask[1]], *(x[1:, :, token_mask[1]] for x in (k, v)), dout[1:, :, query_mask[1]]]
    alone = run(xk.linear_attention, kept, feature_map=feature_map, backend=backend)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype in LOW_PRECISION else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(clean["out"][1:, :, query_mask[1]], alone["out"], **tolerance)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_derivatives(feature_map, normalize, backend, device, ran, slow, interpreted):
    """Derivatives up to third order."""
    q, k, v, _ = inputs((1, 1 if slow else 2, 3, 4, 2, 2), torch.float64, device, positive=True)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    token_mask = torch.tensor([[True, True, False, True]], device=device)

    def function(*leaves):
        return xk.linear_attention(
            *leaves, feature_map=feature_map, normalize=normalize, token_mask=token_mask, backend=backend
        )

    def gradient(*leaves):
        return torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)

    with ran(*ops_of(backend, q, v)):
        assert gradcheck(function, leaves, fast_mode=slow)
        if not interpreted or normalize == (MAPS.index(feature_map) % 2 == 0):
            assert gradgradcheck(function, leaves, fast_mode=slow)
    if normalize and not slow:
        assert gradgradcheck(gradient, leaves, fast_mode=True)


def test_zero_denominators(backend, device):
    """0 / (0 + eps) is 0, for queries or keys that relu maps to zero."""
    q, k, v, dout = inputs((1, 2, 5, 7, 4, 3), device=device)
    for tensors in ((-q.abs(), k, v, dout), (q, -k.abs(), v, dout)):
        ours = run(xk.linear_attention, tensors, backend=backend)
        assert not ours["out"].any()
        assert all(ours[name].isfinite().all() for name in NAMES)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
def test_range_of_float16(normalize, backend, device, slow):
    """Sums over 16384 tokens exceed 65504 by far; the outputs do not."""
    M = 2048 if slow else 16384
    q, k, v, dout = inputs((1, 2, 40, M, 16, 16), torch.float64, device, positive=True)
    q, k, v = (8 * x if normalize else x for x in (q, k, v + 3))
    scale = 1.0 if normalize else 1e-4
    tensors = [x.half() for x in (q, k, v, dout)]
    assert slow or (k.transpose(2, 3) @ v).abs().max() > 65504
    kwargs = {"normalize": normalize, "scale": scale}
    ours = run(xk.linear_attention, tensors, backend=backend, **kwargs)
    eager = run(reference.linear_attention, tensors, **kwargs)
    oracle = run(reference.linear_attention, [x.double() for x in tensors], **kwargs)
    for name in NAMES:
        assert ours[name].isfinite().all()
        assert_close(ours[name], eager[name], oracle[name], name)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_softmax_over_many_tokens(dtype, kernel, device, ran, slow):
    """The weight of each token is close to the smallest float16 number."""
    tensors = inputs((1, 1, 40, 1000 if slow else 16384, 8, 8), dtype, device)
    check(tensors, ran, kernel, feature_map="softmax_tokens")


def test_softmax_of_large_numbers(backend, device):
    q, k, v, _ = inputs((1, 2, 5, 7, 4, 3), torch.float64, device)
    out = xk.linear_attention(q, 1000 * k, v, feature_map="softmax_tokens", backend=backend)
    expected = q.softmax(-1) @ ((1000 * k).softmax(-2).transpose(2, 3) @ v) / (1 + 1e-6)
    torch.testing.assert_close(out, expected)


def test_masked_token_beside_lowest_keys(backend, device):
    """A masked token is ignored even if the other tokens contain the lowest number of the dtype."""
    q, k, v, _ = inputs((1, 1, 4, 6, 3, 2), device=device)
    k[:, :, :5, 1] = torch.finfo(k.dtype).min
    mask = torch.arange(6, device=device)[None] < 5
    kwargs = {"feature_map": "softmax_tokens", "backend": backend}
    out = xk.linear_attention(q, k, v, token_mask=mask, **kwargs)
    torch.testing.assert_close(out, xk.linear_attention(q, k[:, :, :5], v[:, :, :5], **kwargs))


def test_large_scale_does_not_overflow(need_backend):
    """S times the scale would overflow; the output does not."""
    need_backend("cpp")
    q, k, v, _ = inputs((1, 1, 4, 6, 3, 2), torch.float64, positive=True)
    tensors = (1e-10 * q, k, 1e37 * v)
    for normalize in (True, False):
        kwargs = {"scale": 1e3 if not normalize else 1.0, "normalize": normalize}
        out = xk.linear_attention(*(x.float() for x in tensors), **kwargs, backend="cpp")
        torch.testing.assert_close(out.double(), reference.linear_attention(*tensors, **kwargs), rtol=1e-5, atol=0)


def test_512_features_are_fused(need_backend, ran_backend):
    need_backend("cpp")
    with ran_backend("cpp", FUSED[0]):
        xk.linear_attention(*(randn(1, 1, 3, 512, seed=i) for i in range(3)), backend="cpp")


def test_new_feature_map_is_composed(monkeypatch, kernel, device, ran):
    """Adding a feature map as CONTRIBUTING describes: backends that have not fused it compose it."""
    features = reference.features
    monkeypatch.setattr(spec, "FEATURE_MAPS", (*MAPS, "square"))
    monkeypatch.setattr(reference, "features", lambda x, name: x.square() if name == "square" else features(x, name))
    tensors = inputs((2, 2, 13, 17, 5, 6), device=device)
    with ran("channel_mix"):
        ours = run(xk.linear_attention, tensors, feature_map="square", backend=kernel)
    oracle = run(reference.linear_attention, [x.double() for x in tensors], feature_map="square")
    for name in NAMES:
        torch.testing.assert_close(ours[name].double(), oracle[name], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- compilers and transforms


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
@pytest.mark.parametrize("feature_map", ["relu", "elu1", "softmax_tokens"])
def test_compile(feature_map, normalize, ran_auto):
    tensors = inputs((2, 2, 19, 23, 8, 8))
    mask = random_mask(2, 23)

    def function(q, k, v):
        return xk.linear_attention(q, k, v, feature_map=feature_map, normalize=normalize, token_mask=mask)

    with ran_auto(*ops_of(dispatch.choose("auto", "cpu", (torch.float32,), (8,)), tensors[0], tensors[2])):
        ours = run(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors)
    eager = run(function, tensors)
    for name in NAMES:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-5, atol=1e-6)


def test_inductor():
    tensors = inputs((2, 2, 19, 23, 8, 8))
    torch._dynamo.reset()
    ours = run(torch.compile(xk.linear_attention, fullgraph=True), tensors)
    eager = run(xk.linear_attention, tensors)
    for name in NAMES:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-5, atol=1e-6)


def test_export():
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return xk.linear_attention(q, k, v)

    q, k, v, _ = inputs((2, 2, 19, 23, 8, 8))
    tokens = {2: torch.export.Dim("M", min=2)}
    program = torch.export.export(
        Attention(), (q, k, v), dynamic_shapes=({2: torch.export.Dim("N", min=2)}, tokens, tokens)
    )
    q, k, v, _ = inputs((2, 2, 29, 11, 8, 8))
    torch.testing.assert_close(program.module()(q, k, v), xk.linear_attention(q, k, v))


def test_transforms_of_functions():
    q, k, v, _ = inputs((2, 2, 5, 7, 4, 4), positive=True)
    out = torch.func.vmap(lambda *x: xk.linear_attention(*(t[None] for t in x))[0])(q, k, v)
    torch.testing.assert_close(out, xk.linear_attention(q, k, v))
    gradient = torch.func.grad(lambda q: xk.linear_attention(q, k, v).square().sum())(q)
    leaf = q.requires_grad_()
    (expected,) = torch.autograd.grad(xk.linear_attention(leaf, k, v).square().sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(lambda v: xk.linear_attention(q.detach(), k, v), (v,), (v,))
    torch.testing.assert_close(tangent, xk.linear_attention(q.detach(), k, v))


def test_flops():
    B, H, N, M, D, Dv = 2, 3, 17, 7, 5, 9
    q, k, v, _ = inputs((B, H, N, M, D, Dv))
    with FlopCounterMode(display=False) as counter:
        out = xk.linear_attention(*(x.requires_grad_() for x in (q, k, v)))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * B * H * D * Dv * (M + N) and counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "plain"])
def test_autocast(normalize, backend):
    """The result is that of q, k and v in the dtype of autocast; nothing else is cast."""
    q, k, v, _ = inputs((2, 2, 19, 23, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = xk.linear_attention(q, k, v, normalize=normalize, backend=backend)
    expected = xk.linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), normalize=normalize, backend=backend)
    assert_bitwise(out, expected, "autocast")


def test_result_may_be_modified_in_place(backend):
    q, k, v, _ = inputs((1, 2, 5, 7, 4, 3))
    for normalize in (True, False):
        grads = []
        for double in (lambda out: out.mul_(2), lambda out: 2 * out):
            leaf = q.detach().requires_grad_()
            grads += torch.autograd.grad(
                double(xk.linear_attention(leaf, k, v, normalize=normalize, backend=backend)).sum(), leaf
            )
        assert_bitwise(*grads, "dq")


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": 1}, TypeError, "q must be a torch.Tensor, got int"),
        ({"q": torch.ones(2, 3, 4)}, ValueError, r"q must have 4 dimensions, \(B, H, N, D\), got 3"),
        ({"k": torch.ones(2, 3, 7, 5)}, ValueError, r"k must have shape \(B, H, M, D\) with B = 2, H = 3 and D = 4"),
        ({"k": torch.ones(2, 3, 7, 4).double()}, TypeError, "k must have the dtype of q, torch.float32"),
        ({"v": torch.ones(2, 3, 8, 6)}, ValueError, r"v must have shape \(B, H, M, Dv\) .* M = 7 as k has"),
        ({"feature_map": "elu"}, ValueError, "feature_map of k must be one of 'identity', .*, got 'elu'"),
        ({"feature_map": ("relu", 1)}, ValueError, "feature_map of k must be one of .*, got 1"),
        ({"feature_map": ("softmax_tokens", "relu")}, ValueError, "feature_map of q .*got 'softmax_tokens'"),
        ({"feature_map": ("relu",)}, ValueError, "feature_map must be a name or a pair of names"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got int: 1"),
        ({"scale": "1"}, TypeError, "scale must be a finite number, got str"),
        ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
        ({"eps": 0}, ValueError, "eps must be a finite number above 0, got 0"),
        (
            {"query_mask": torch.ones(2, 7, dtype=torch.bool)},
            ValueError,
            r"query_mask must have shape \(B, N\) = \(2, 5\)",
        ),
        ({"token_mask": torch.ones(2, 7)}, TypeError, "token_mask must have dtype torch.bool"),
        ({"token_mask": [True]}, TypeError, "token_mask must be a torch.Tensor of bool, got list"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto'"),
    ],
)
def test_wrong_arguments(changes, error, message):
    call = {"q": torch.ones(2, 3, 5, 4), "k": torch.ones(2, 3, 7, 4), "v": torch.ones(2, 3, 7, 6), **changes}
    with pytest.raises(error, match=message):
        xk.linear_attention(**call)

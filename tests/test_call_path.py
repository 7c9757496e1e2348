"""The path from a public function to a kernel: its number of frames, the checks, and the parts of a backend."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from cases import CONFIGS, make_problem, randn

import xformer_kernels as xk
from bench.measure import python_calls
from xformer_kernels import backends, dispatch, reference, repeated
from xformer_kernels.spec import Spec


def frames(monkeypatch, call, name):
    """Names of our Python frames from a public function to the backend's function `name`, inclusive."""
    module, found = backends.load("cpp")[0].module, []
    kernel = getattr(module, name)

    def spy(*args):
        frame, names = sys._getframe(1), [name]
        while frame.f_code is not here:
            if not frame.f_globals["__name__"].startswith("torch."):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        found.append(names[::-1])
        return kernel(*args)

    here = sys._getframe().f_code
    monkeypatch.setattr(module, name, spy)
    call()
    monkeypatch.setattr(module, name, kernel)
    return found[0]


def test_number_of_frames_to_the_kernel(monkeypatch, need_backend):
    need_backend("cpp")
    q, k, v = (randn(1, 2, 9, 4, seed=i).requires_grad_() for i in range(3))
    t, x = torch.ones(2), randn(1, 9, 8, seed=4).requires_grad_()
    layer = xk.XFA(8, 2)

    def of(function, *args, **choices):
        return lambda: function(*args, **choices, backend="cpp")

    xfa = frames(monkeypatch, of(xk.xfa, q, k, v, t), "xfa_forward")
    assert xfa[0] == "<lambda>" and xfa[1:] == ["xfa", "call", "forward", "xfa_forward"]
    gram = frames(monkeypatch, of(xk.gram, q, k), "gram")
    assert len(gram[1:]) <= 4
    mix = frames(monkeypatch, of(xk.channel_mix, q, torch.ones(4, 4)), "channel_mix")
    assert len(mix[1:]) <= 4
    in_gram_form = frames(monkeypatch, of(xk.xfa_layer, x, *layer.weights(), form="gram"), "layer_gram")
    assert in_gram_form[1] == "xfa_layer" and len(in_gram_form[1:]) <= 5


def test_python_calls_of_a_repeated_call(need_backend, forget):
    """The checks and the choice of a backend are not repeated, so that small tensors are not dominated by Python."""
    need_backend("cpp")
    q, k, v = (randn(1, 2, 9, 4, seed=i) for i in range(3))
    t, layer, x = torch.ones(2), xk.XFA(8, 2, form="direct").eval(), randn(1, 9, 8, seed=4)
    with torch.no_grad():
        for most, call in (
            (36, lambda: xk.xfa(q, k, v, t)),
            (36, lambda: xk.xfa(q, k, v, t.view(2, 1, 1))),
            (36, lambda: xk.linear_attention(q, k, v)),
            (36, lambda: xk.gram(q, k)),
            (44, lambda: xk.channel_mix(q, torch.eye(4))),
            (96, lambda: layer(x)),
        ):
            first = python_calls(call)
            call()
            assert python_calls(call) <= most < first


def refuses(call, arguments, changes):
    """`call` accepts `arguments`, repeatedly, and raises if one of the changes is made to them."""
    for _ in range(2):
        call(**arguments)
    for change, error, said in changes:
        with pytest.raises(error, match=said):
            call(**(arguments | change))


def test_repeated_calls_are_checked_and_served_as_new_ones(need_backend, monkeypatch):
    """What does not belong to the signature of a call: modes, settings, options of other types, other arguments."""
    need_backend("cpp")
    q, k, v = (randn(1, 2, 9, 4, seed=i) for i in range(3))
    t = torch.ones(2)
    for eps in (1e-12, 1, 1):
        xk.xfa(q, k, v, t, eps=eps)
    refuses(
        xk.xfa,
        {"q": q, "k": k, "v": v, "temperature": t},
        (
            ({"eps": True}, TypeError, "eps"),
            ({"dropout_p": True}, TypeError, "dropout_p"),
            ({"dropout_p": torch.zeros(())}, TypeError, "dropout_p"),
            ({"token_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, "token_mask"),
            ({"map_fn": 1}, TypeError, "map_fn"),
            ({"backend": "gpu"}, ValueError, "backend must be one of"),
            ({"backend": ["cpp"]}, ValueError, "backend must be one of"),
            ({"map": ["query_key"]}, ValueError, "map must be one of"),
            ({"q": None}, TypeError, "q must be a torch.Tensor"),
            ({"temperature": None}, TypeError, "temperature must be a torch.Tensor"),
            ({"temperature": torch.ones(2, 1)}, ValueError, "temperature must have shape"),
            ({"k": k.to_sparse()}, TypeError, "k must be a dense tensor"),
            ({"k": torch.nested.nested_tensor([k[0]])}, TypeError, "k must be a dense tensor"),
            ({"k": k.to("meta")}, ValueError, "k must be on the device of q"),
            ({"v": v[:, :, :8]}, ValueError, "v must have the shape of q"),
            ({"v": v.double()}, TypeError, "v must have the dtype of q"),
        ),
    )
    expected = xk.xfa(q, k, v, t)

    def backends_of(call):
        with dispatch.record() as ran:
            result = call()
        torch.testing.assert_close(result, expected.to(result.dtype), rtol=2e-2, atol=2e-2)
        return {backend for backend, _ in ran}

    assert backends_of(lambda: xk.xfa(q, k, v, t)) == {"cpp"}
    assert backends_of(lambda: xk.xfa(q, k, v, t.view(2, 1, 1))) == {"cpp"}
    assert backends_of(lambda: xk.xfa(q, k, v, torch.ones(()))) == {"cpp"}
    assert backends_of(lambda: torch.vmap(lambda q: xk.xfa(q, k, v, t))(q[None])[0]) == {"reference"}
    assert backends_of(lambda: xk.xfa(q, k, v, t, backend="reference")) == {"reference"}
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert xk.xfa(q, k, v, t).dtype == torch.bfloat16
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert backends_of(lambda: xk.xfa(q, k, v, t)) == {"reference"}
    monkeypatch.setenv(dispatch.ENVIRONMENT, "nothing")
    with pytest.raises(ValueError, match="'nothing'; it must be one of"):
        xk.xfa(q, k, v, t)


def test_repeated_calls_of_other_functions_are_checked(need_backend):
    need_backend("cpp")
    q, k, v = (randn(1, 2, 9, 4, seed=i) for i in range(3))
    refuses(
        xk.gram,
        {"a": q, "b": q, "symmetric": True},
        (
            ({"b": q.clone()}, ValueError, "symmetric"),
            ({"symmetric": 1}, TypeError, "symmetric"),
            ({"sums": 0}, TypeError, "sums"),
            ({"token_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, "token_mask"),
            ({"b": None}, TypeError, "b must be a torch.Tensor"),
        ),
    )
    refuses(
        xk.channel_mix,
        {"x": q, "weight": torch.ones(3, 4)},
        (
            ({"weight": torch.ones(3, 5)}, ValueError, "weight must have shape"),
            ({"bias": torch.ones(4)}, ValueError, "bias must have a shape"),
            ({"add_scale": torch.ones(3)}, ValueError, "add_scale"),
            ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
        ),
    )
    refuses(
        xk.linear_attention,
        {"q": q, "k": k, "v": v, "normalize": True, "scale": 1.0},
        (
            ({"normalize": 1}, TypeError, "normalize"),
            ({"scale": True}, TypeError, "scale"),
            ({"feature_map": ["relu", "relu"]}, TypeError, "feature_map"),
            ({"query_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, "query_mask"),
            ({"v": v[:, :, :8]}, ValueError, "v must have shape"),
        ),
    )


def test_repeated_layers_are_checked_and_served_as_new_ones(need_backend, monkeypatch):
    need_backend("cpp")
    x, layer = randn(1, 9, 8, seed=0), xk.XFA(8, 2, form="direct").eval()
    names = ("qkv_weight", "qkv_bias", "temperature", "proj_weight", "proj_bias")
    weights = dict(zip(names, layer.weights(), strict=True))
    wrong_of_layer = (
        ({"x": randn(1, 9, 7, seed=0)}, ValueError, "qkv_weight must have shape"),
        ({"x": x[0]}, ValueError, "x must have 3 dimensions"),
        ({"temperature": torch.ones(3)}, ValueError, "qkv_weight must have shape"),
        ({"proj_bias": torch.ones(9)}, ValueError, "proj_bias must have shape"),
        ({"qkv_weight": None}, TypeError, "qkv_weight must be a torch.Tensor"),
        ({"dropout_p": 2}, ValueError, "dropout_p"),
        ({"dropout_p": False}, TypeError, "dropout_p"),
        ({"dropout_p": torch.zeros(2)}, TypeError, "dropout_p"),
        ({"eps": True}, TypeError, "eps"),
        ({"form": "fast"}, ValueError, "form must be one of"),
        ({"form": ["direct"]}, ValueError, "form must be one of"),
        ({"form": "gram", "norm": "feature"}, ValueError, "form='gram' is not possible"),
        ({"backend": None}, ValueError, "backend must be one of"),
        ({"token_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, "token_mask"),
    )
    refuses(xk.xfa_layer, {"x": x, **weights, "eps": 1}, wrong_of_layer)
    block = {"ln_weight": None, "ln_bias": None, "ln_eps": 1.0, "residual": True}
    wrong_of_block = (({"ln_eps": True}, TypeError, "ln_eps"), ({"residual": 1}, TypeError, "residual"))
    refuses(xk.xfa_block, {"x": x, **weights, **block}, (*wrong_of_block, *wrong_of_layer))
    expected = layer(x)

    def ran_in(call):
        with dispatch.record() as ran:
            result = call()
        torch.testing.assert_close(result, expected.to(result.dtype), rtol=2e-2, atol=2e-2)
        return ran

    for _ in range(2):
        assert ran_in(lambda: layer(x)) == [("cpp", "xfa_forward")]
        assert ("cpp", "layer_forward") in ran_in(lambda: xk.xfa_layer(x, **weights, form="gram"))
        assert ran_in(lambda: torch.vmap(layer)(x[None])[0]) == [("reference", "xfa")]
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    handle = layer.qkv.register_forward_hook(lambda *_: seen.append(True))
    seen = []
    layer(x)
    handle.remove()
    assert seen
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, C\) with C = 8"):
        layer(randn(1, 9, 7, seed=0))
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    assert ran_in(lambda: layer(x)) == [("reference", "xfa")]


def test_signatures_of_many_shapes_are_forgotten(need_backend, monkeypatch):
    need_backend("cpp")
    monkeypatch.setattr(repeated, "_known", {})
    monkeypatch.setattr(repeated, "_MOST", 8)
    for n in range(1, 30):
        q = randn(1, 1, n, 4, seed=n)
        xk.xfa(q, q, q, torch.ones(1))
        assert len(repeated._known) <= 8


def test_spec_checks_and_text():
    for config in CONFIGS:
        spec = config.spec.check()
        assert Spec.of_text(spec.text()) == spec and hash(spec) == hash(config.spec)
    assert Spec.of_text(Spec(eps=1e-300).text()).eps == 1e-300
    linear = Spec.of_linear_attention("softmax_tokens", True, 0.3, 1e-5)
    assert Spec.of_text(linear.text()) == linear and linear.feature_maps == ("softmax_features", "softmax_tokens")
    for wrong, error, said in (
        (Spec(map="key_query"), ValueError, "map must be one of 'query_key', 'key_value', got 'key_query'"),
        (Spec(norm=None), ValueError, "norm must be one of"),
        (Spec(activation=["softmax"]), ValueError, "activation must be one of"),
        (Spec(eps=0.0), ValueError, "eps must be a finite number above 0, got 0.0"),
        (Spec(eps="1"), TypeError, "eps must be a number above 0, got str"),
        (Spec("key_value", "none", feature_maps=("softmax_tokens", "relu")), ValueError, "feature_map of q must be"),
        (Spec("key_value", "none", normalize=1), TypeError, "normalize must be True or False, got int"),
        # combinations without a formula
        (
            Spec(normalize=True),
            ValueError,
            "normalize=True .* need map='key_value' and norm='none', got map='query_key'",
        ),
        (Spec("key_value", feature_maps=("relu", "relu")), ValueError, "feature_map=.*relu.* got .* norm='token'"),
    ):
        with pytest.raises(error, match=said):
            wrong.check()


# ----------------------------------------------------------------------------------------- a backend of thirty lines


def unsupported(device_type, dtypes, head_dims):
    return [] if device_type == "cpu" and max(head_dims) <= 8 else ["it is for small maps on the CPU"]


def gram(a, b, symmetric, token_mask):
    return reference.gram(a, b, symmetric=symmetric, token_mask=token_mask)


def channel_mix(x, weight, bias, add, add_scale, x2, weight2):
    y = reference.channel_mix(x, weight, bias=bias, add=add, add_scale=add_scale, x2=x2, weight2=weight2)
    return y.transpose(1, 2)


def xfa_forward(q, k, v, temperature, token_mask, spec):
    B, H, _, D = q.shape
    out = reference.xfa(q, k, v, temperature, **spec.of_xfa(), token_mask=token_mask)
    return out.transpose(1, 2).contiguous(), q.new_empty(B, H, D * D + 2 * D)


def xfa_backward(dout, q, k, v, temperature, stats, token_mask, spec, packed):
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v, temperature)]
        out = reference.xfa(*inputs, **spec.of_xfa(), token_mask=token_mask)
        *dqkv, dtemperature = torch.autograd.grad(out, inputs, dout)
    return torch.stack([x.transpose(1, 2) for x in dqkv]), dtemperature


@pytest.fixture
def slate(monkeypatch, forget):
    functions = (unsupported, gram, channel_mix, xfa_forward, xfa_backward)
    monkeypatch.setitem(backends.PATHS, "slate", SimpleNamespace(**{f.__name__: f for f in functions}))
    yield "slate"
    backends._loaded.pop("slate", None)


@pytest.mark.parametrize(
    "config",
    [config if i % 5 == 0 else pytest.param(config, marks=pytest.mark.nightly) for i, config in enumerate(CONFIGS)],
    ids=str,
)
def test_adding_a_backend(config, slate):
    """A new backend serves all of the package, with derivatives of any order, and its reasons are reported."""
    problem = make_problem((2, 13, 2, 4), config, masked=True)
    with dispatch.record() as ran:
        problem.check(problem.run(xk.xfa, backend=slate))
    assert ran == [(slate, "xfa_forward"), (slate, "xfa_backward")]
    x = randn(1, 40, 6, seed=1, dtype=torch.float64).requires_grad_()
    layer = xk.XFA(6, 2, backend=slate, form="gram").double()
    with dispatch.record() as ran:
        torch.autograd.gradgradcheck(lambda x: layer(x), (x,))
    assert (slate, "layer_forward") in ran and (slate, "gram") in ran
    assert "slate serves this call" in str(
        xk.explain(problem.q, problem.k, problem.v, problem.temperature, backend=slate)
    )
    with pytest.raises(RuntimeError, match="it is for small maps on the CPU"):
        xk.gram(torch.ones(1, 1, 5, 9), torch.ones(1, 1, 5, 9), backend=slate)


def test_backend_may_come_first(slate, monkeypatch):
    monkeypatch.setattr(backends.PATHS[slate], "comes_first", lambda q, spec: spec.norm == "token", raising=False)
    backend, _ = backends.load(slate)
    assert backend.comes_first(torch.empty(1, 1, 1, 1), Spec())
    assert not backend.comes_first(torch.empty(1, 1, 1, 1), Spec(norm="feature"))
    others = [backends.load(name)[0] for name in backends.PATHS if name != slate]
    assert not any(other.comes_first(torch.empty(1, 1, 1, 1), Spec()) for other in others if other is not None)

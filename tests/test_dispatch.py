"""Which backend serves a call, the reasons why others do not, and the errors for invalid arguments."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import make_problem, randn

import xformer_kernels as xk


@pytest.fixture
def p():
    return make_problem((2, 9, 3, 4), layout="contiguous")


def args(p):
    return p.q, p.k, p.v, p.temperature


# ----------------------------------------------------------------------------------------------------------- dispatch


@pytest.fixture
def no_override(monkeypatch):
    monkeypatch.delenv("XFORMER_KERNELS_BACKEND", raising=False)


def test_auto_uses_the_kernels(p, need_backend, no_override, ran_backend):
    need_backend("cpp")
    with ran_backend("cpp", "xfa_forward", "xfa_backward"):
        p.run(xk.xfa)
    text = str(xk.explain(*args(p)))
    assert "cpp" in text and "reference" in text


def test_auto_falls_back_to_the_reference_with_the_reason(p, no_override, ran_backend):
    """The reference serves heads with more features than the kernels support; the reasons are printed."""
    wide = torch.ones(1, 1, 3, 600)
    explanation = xk.explain(wide, wide, wide, torch.ones(1))
    assert explanation.backend == "reference"
    assert "cpp: no\n    - 600 features per head, the kernels take 1 to 512" in str(explanation)


def test_meta_tensors_use_the_reference(p, no_override):
    out = xk.xfa(*(x.to("meta") for x in args(p)))
    assert out.device.type == "meta" and out.shape == p.q.shape
    assert "meta" in str(xk.explain(*(x.to("meta") for x in args(p))))


def test_environment_overrides_auto_at_every_call(p, monkeypatch, need_backend, ran_backend):
    need_backend("cpp")
    for name in ("reference", "cpp", "reference"):
        monkeypatch.setenv("XFORMER_KERNELS_BACKEND", name)
        with ran_backend(name, "xfa_forward", "xfa_backward"):
            p.run(xk.xfa)
        with ran_backend("cpp", "xfa_forward", "xfa_backward"):
            p.run(xk.xfa, backend="cpp")
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "auto")
    with ran_backend("cpp", "xfa_forward", "xfa_backward"):
        p.run(xk.xfa)


def test_bad_environment(p, monkeypatch):
    monkeypatch.setenv("XFORMER_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"XFORMER_KERNELS_BACKEND.*gpu.*cpp.*reference"):
        xk.xfa(*args(p))


def test_named_backend_that_cannot_serve_gives_every_reason(p):
    wide = torch.ones(1, 1, 3, 600, device="meta")
    with pytest.raises(RuntimeError) as error:
        xk.xfa(wide, wide, wide, torch.ones(1, device="meta"), backend="cpp")
    for word in ("cpp", "meta", "600 features per head"):
        assert word in str(error.value)


def test_no_features_use_the_reference(recwarn):
    """Without features there is nothing to compute; the kernels refuse the call and do not crash."""
    q, k, v = torch.ones(3, 2, 2, 5, 0, requires_grad=True).unbind(0)
    t = torch.ones(2)
    for map in ("query_key", "key_value"):
        out = xk.xfa(q, k, v, t, map=map)
        assert out.shape == (2, 2, 5, 0)
        out.sum().backward()
    assert xk.gram(q, torch.ones(2, 2, 5, 3))[2].tolist() == torch.full((2, 2, 3), 5.0).tolist()
    assert xk.channel_mix(q, torch.ones(3, 0), bias=torch.ones(3)).tolist() == torch.ones(2, 2, 5, 3).tolist()
    assert xk.channel_mix(torch.ones(2, 2, 5, 3), torch.ones(0, 3)).shape == (2, 2, 5, 0)
    assert "features" in str(xk.explain(q, k, v, t)) or "cannot be imported" in str(xk.explain(q, k, v, t))
    with pytest.raises(RuntimeError, match=r"features|imported"):
        xk.xfa(q, k, v, t, backend="cpp")


def test_no_heads(kernel, ran_backend):
    p = make_problem((2, 5, 0, 3), layout="contiguous", dout="contiguous")
    with ran_backend(kernel, "xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=kernel)
    assert result["out"].shape == p.q.shape and result["dtemperature"].shape == (0,)


@pytest.mark.filterwarnings("ignore:no kernel:RuntimeWarning")
def test_very_wide_heads_use_the_reference(ran_backend):
    p = make_problem((1, 30, 1, 600), layout="contiguous", dout="contiguous")
    with ran_backend("reference"):
        p.check(p.run(xk.xfa))
    assert "600 features" in str(xk.explain(*args(p))) or "cannot be imported" in str(xk.explain(*args(p)))


def test_explain_of_a_named_backend(p, need_backend):
    need_backend("cpp")
    assert "reference" in str(xk.explain(*args(p), backend="reference"))
    assert "cpp" in str(xk.explain(*args(p), backend="cpp"))


def test_explain_takes_what_xfa_takes(p):
    mask = torch.ones(2, 9, dtype=torch.bool)
    xk.explain(
        *args(p), map="key_value", norm="feature", activation="identity", eps=1e-6, token_mask=mask, dropout_p=0.1
    )
    xk.explain(*args(p), map_fn=lambda S: S, backend="auto")
    with pytest.raises(ValueError, match="map"):
        xk.explain(*args(p), map="nothing")


# ---------------------------------------------------------------------------------------------------------- bad input


# (changes of a valid call, exception, regular expressions that its message must match)
def nested():
    return torch.nested.nested_tensor([torch.ones(5, 8), torch.ones(7, 8)])


BAD_XFA = {
    "q of 3 dimensions": (lambda p: {"q": p.q[0]}, ValueError, [r"\bq\b", "4", r"3, 9, 4"]),
    "k of 5 dimensions": (lambda p: {"k": p.k[None]}, ValueError, [r"\bk\b", "4"]),
    "q not a tensor": (lambda p: {"q": p.q.tolist()}, TypeError, [r"\bq\b", "list", "[Tt]ensor"]),
    "v missing": (lambda p: {"v": None}, TypeError, [r"\bv\b", "None"]),
    "k of other tokens": (lambda p: {"k": p.k[:, :, :5]}, ValueError, [r"\bk\b", "5", "9"]),
    "v of other features": (lambda p: {"v": p.v[..., :2]}, ValueError, [r"\bv\b", "2", "4"]),
    "v of other heads": (lambda p: {"v": p.v[:, :1]}, ValueError, [r"\bv\b", "1", "3"]),
    "k of another batch": (lambda p: {"k": p.k[:1]}, ValueError, [r"\bk\b", "1", "2"]),
    "k of another dtype": (lambda p: {"k": p.k.double()}, (ValueError, TypeError), [r"\bk\b", "float64", "float32"]),
    "v on another device": (lambda p: {"v": p.v.to("meta")}, ValueError, [r"\bv\b", "meta", "cpu"]),
    "integers": (lambda p: {x: getattr(p, x).long() for x in "qkv"}, TypeError, [r"\bq\b", "int64", "float"]),
    "complex": (lambda p: {x: getattr(p, x).cfloat() for x in "qkv"}, TypeError, [r"\bq\b", "complex64", "float"]),
    "sparse": (lambda p: {"q": p.q.to_sparse()}, TypeError, [r"\bq\b", "sparse_coo", "strided"]),
    "bool": (lambda p: {x: getattr(p, x) > 0 for x in "qkv"}, TypeError, [r"\bq\b", "bool", "float"]),
    "temperature of other heads": (lambda p: {"temperature": torch.ones(2)}, ValueError, ["temperature", "2", "3"]),
    "temperature transposed": (lambda p: {"temperature": torch.ones(1, 1, 3)}, ValueError, ["temperature", r"1, 1, 3"]),
    "temperature of integers": (lambda p: {"temperature": torch.ones(3).int()}, TypeError, ["temperature", "int32"]),
    "temperature on another device": (
        lambda p: {"temperature": torch.ones(3, device="meta")},
        ValueError,
        ["temperature", "meta", "cpu"],
    ),
    "mask of other tokens": (
        lambda p: {"token_mask": torch.ones(2, 8, dtype=torch.bool)},
        ValueError,
        ["token_mask", r"2, 8", r"2, 9"],
    ),
    "mask of 4 dimensions": (
        lambda p: {"token_mask": torch.ones(2, 1, 9, 1, dtype=torch.bool)},
        ValueError,
        ["token_mask", r"2, 1, 9, 1"],
    ),
    "mask of floats": (
        lambda p: {"token_mask": torch.ones(2, 9)},
        (TypeError, ValueError),
        ["token_mask", "float32", "bool"],
    ),
    "mask on another device": (
        lambda p: {"token_mask": torch.ones(2, 9, dtype=torch.bool, device="meta")},
        ValueError,
        ["token_mask", "meta"],
    ),
    "eps zero": (lambda p: {"eps": 0.0}, ValueError, ["eps", r"0"]),
    "eps negative": (lambda p: {"eps": -1e-6}, ValueError, ["eps", "-1e-06"]),
    "eps nan": (lambda p: {"eps": float("nan")}, ValueError, ["eps", "nan"]),
    "eps of text": (lambda p: {"eps": "small"}, TypeError, ["eps", "str"]),
    "unknown map": (lambda p: {"map": "value_query"}, ValueError, ["map", "value_query", "query_key", "key_value"]),
    "unknown norm": (lambda p: {"norm": "layer"}, ValueError, ["norm", "layer", "token", "feature"]),
    "unknown activation": (lambda p: {"activation": "relu"}, ValueError, ["activation", "relu", "softmax", "identity"]),
    "unknown backend": (lambda p: {"backend": "gpu"}, ValueError, ["backend", "gpu", "auto", "cpp", "reference"]),
    "dropout of one": (lambda p: {"dropout_p": 1.0}, ValueError, ["dropout_p", "1.0"]),
    "dropout negative": (lambda p: {"dropout_p": -0.1}, ValueError, ["dropout_p", "-0.1"]),
    "map_fn not callable": (lambda p: {"map_fn": "softmax"}, TypeError, ["map_fn", "str", "callable"]),
    "map_fn of another shape": (
        lambda p: {"map_fn": lambda S: S.sum(-1)},
        ValueError,
        ["map_fn", r"2, 3, 4", r"2, 3, 4, 4"],
    ),
    "map_fn giving no tensor": (lambda p: {"map_fn": lambda S: None}, TypeError, ["map_fn", "None"]),
    "nested": (lambda p: {"q": nested()}, TypeError, [r"\bq\b", "nested", "token_mask"]),
    "float8": (lambda p: {"v": p.v.to(torch.float8_e4m3fn)}, TypeError, [r"\bv\b", "float8_e4m3fn", "bfloat16"]),
    "float8 temperature": (
        lambda p: {"temperature": p.temperature.to(torch.float8_e5m2)},
        TypeError,
        ["temperature", "float8_e5m2"],
    ),
    "backend None": (lambda p: {"backend": None}, ValueError, ["backend", "None", "'cpp'"]),
    "backend a list": (lambda p: {"backend": ["cpp"]}, ValueError, ["backend", r"\['cpp'\]"]),
}


def assert_refused(call, exception, words):
    with pytest.raises(exception) as error:
        call()
    for word in words:
        error.match(word)


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD_XFA)
def test_bad_xfa(case, backend_name, p):
    change, exception, words = BAD_XFA[case]
    good = {"q": p.q, "k": p.k, "v": p.v, "temperature": p.temperature, "backend": backend_name}
    xk.xfa(**good)
    assert_refused(lambda: xk.xfa(**{**good, **change(p)}), exception, words)
    if "map_fn" not in case:
        assert_refused(lambda: xk.explain(**{**good, **change(p)}), exception, words)


def test_arguments_after_temperature_are_by_keyword(p):
    with pytest.raises(TypeError):
        xk.xfa(*args(p), "key_value")


BAD_GRAM = {
    "rank": (lambda a, b: {"a": a[0, 0]}, ValueError, [r"\ba\b", r"9, 4"]),
    "unlike ranks": (lambda a, b: {"b": b[0]}, ValueError, [r"\bb\b"]),
    "tokens": (lambda a, b: {"b": b[:, :, :5]}, ValueError, [r"\bb\b", "5", "9"]),
    "dtype": (lambda a, b: {"b": b.double()}, (ValueError, TypeError), [r"\bb\b", "float64", "float32"]),
    "device": (lambda a, b: {"b": b.to("meta")}, ValueError, [r"\bb\b", "meta", "cpu"]),
    "integers": (lambda a, b: {"a": a.int(), "b": b.int()}, TypeError, [r"\ba\b", "int32", "float"]),
    "symmetric of two": (lambda a, b: {"b": a.clone(), "symmetric": True}, ValueError, ["symmetric", r"\bb\b"]),
    "symmetric": (lambda a, b: {"symmetric": "no"}, TypeError, ["symmetric", "True or False", "'no'"]),
    "mask": (lambda a, b: {"token_mask": torch.ones(9, dtype=torch.bool)}, ValueError, ["token_mask", "9"]),
    "backend": (lambda a, b: {"backend": "gpu"}, ValueError, ["backend", "gpu", "cpp"]),
}


@pytest.mark.parametrize("case", BAD_GRAM)
def test_bad_gram(case):
    a, b = randn(2, 3, 9, 4, seed=1), randn(2, 3, 9, 5, seed=2)
    change, exception, words = BAD_GRAM[case]
    assert_refused(lambda: xk.gram(**{"a": a, "b": b, **change(a, b)}), exception, words)


BAD_MIX = {
    "rank": ({"x": (9, 4)}, ValueError, [r"\bx\b", r"9, 4"]),
    "inputs of weight": ({"weight": (5, 3)}, ValueError, ["weight", "3", "4"]),
    "heads of weight": ({"weight": (2, 5, 4)}, ValueError, ["weight", "2", "3"]),
    "weight of 1 dimension": ({"weight": (4,)}, ValueError, ["weight"]),
    "bias": ({"bias": (4,)}, ValueError, ["bias", "4", "5"]),
    "add": ({"add": (2, 3, 9, 4)}, ValueError, ["add", r"2, 3, 9, 4", r"2, 3, 9, 5"]),
    "add_scale": ({"add": (2, 3, 9, 5), "add_scale": (9,)}, ValueError, ["add_scale", "9", "5"]),
    "add_scale without add": ({"add_scale": (5,)}, ValueError, ["add_scale", r"\badd\b"]),
    "x2 without weight2": ({"x2": (2, 3, 9, 6)}, ValueError, ["x2", "weight2"]),
    "weight2 without x2": ({"weight2": (5, 6)}, ValueError, ["x2", "weight2"]),
    "tokens of x2": ({"x2": (2, 3, 8, 6), "weight2": (5, 6)}, ValueError, ["x2", "8", "9"]),
    "outputs of weight2": ({"x2": (2, 3, 9, 6), "weight2": (4, 6)}, ValueError, ["weight2", "4", "5"]),
}


@pytest.mark.parametrize("case", BAD_MIX)
def test_bad_channel_mix(case):
    shapes, exception, words = BAD_MIX[case]
    good = {"x": (2, 3, 9, 4), "weight": (5, 4)}
    tensors = {name: randn(*shape, seed=1) for name, shape in {**good, **shapes}.items()}
    assert_refused(lambda: xk.channel_mix(**tensors), exception, words)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "add", "add_scale", "x2", "weight2"])
@pytest.mark.parametrize(
    "change", [torch.Tensor.int, torch.Tensor.tolist, lambda x: x.to("meta")], ids=["int", "list", "meta"]
)
def test_bad_channel_mix_tensors(name, change):
    shapes = {"x": (2, 3, 9, 4), "weight": (5, 4), "bias": (5,), "add": (2, 3, 9, 5), "add_scale": (5,)}
    shapes |= {"x2": (2, 3, 9, 6), "weight2": (5, 6)}
    tensors = {key: randn(*shape, seed=1) for key, shape in shapes.items()}
    xk.channel_mix(**tensors)
    assert_refused(
        lambda: xk.channel_mix(**{**tensors, name: change(tensors[name])}), (TypeError, ValueError), [rf"\b{name}\b"]
    )


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"dim": 10, "num_heads": 3}, ["dim", "10", "num_heads", "3"]),
        ({"dim": 12, "num_heads": 0}, ["num_heads", "0"]),
        ({"dim": 0, "num_heads": 1}, ["dim", "0"]),
        ({"dim": 12, "num_heads": 3, "attn_drop": 1.5}, ["attn_drop", "1.5"]),
        ({"dim": 12, "num_heads": 3, "map": "query"}, ["map", "query"]),
        ({"dim": 12, "num_heads": 3, "norm": "query"}, ["norm", "query"]),
        ({"dim": 12, "num_heads": 3, "activation": "query"}, ["activation", "query"]),
        ({"dim": 12, "num_heads": 3, "backend": "query"}, ["backend", "query"]),
    ],
    ids=str,
)
def test_bad_layer(kwargs, words):
    """Errors are raised at construction, not at the first batch."""
    assert_refused(lambda: xk.XFA(**kwargs), ValueError, words)
    assert_refused(lambda: xk.XFABlock(**kwargs), ValueError, words)


@pytest.mark.parametrize("name", ["dim", "num_heads"])
@pytest.mark.parametrize("value", [8.0, "8", True, None], ids=str)
def test_sizes_of_a_layer_are_integers(name, value):
    for kind in (xk.XFA, xk.XFABlock):
        assert_refused(lambda kind=kind: kind(**{"dim": 8, "num_heads": 2, name: value}), TypeError, [name, "integer"])


def test_constructors_take_a_device_and_a_dtype():
    """As in torch's layers; torch.nn.utils.skip_init works too."""
    for kind in (xk.XFA, partial(xk.XFABlock, layer_scale=1e-6)):
        meta = kind(8, 2, True, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in meta.parameters())
        assert meta.state_dict().keys() == kind(8, 2, True).state_dict().keys()
    assert torch.nn.utils.skip_init(xk.XFA, 8, 2)(torch.zeros(1, 3, 8)).shape == (1, 3, 8)


@pytest.mark.parametrize(
    ("x", "exception", "words"),
    [
        (None, TypeError, ["NoneType"]),
        ([1.0], TypeError, ["list"]),
        (torch.ones(1, 5, 8).to_sparse(), TypeError, ["sparse"]),
        (torch.ones(1, 5, 7), ValueError, ["C = 8", r"\(1, 5, 7\)"]),
        (torch.ones(5, 8), ValueError, [r"\(5, 8\)"]),
        (torch.ones(1, 5, 8).int(), TypeError, ["int32"]),
        (torch.ones(1, 5, 8).to(torch.float8_e4m3fn), TypeError, ["float8"]),
    ],
    ids=["None", "list", "sparse", "features", "dimensions", "int", "float8"],
)
def test_bad_tokens_of_modules(x, exception, words):
    for module in (xk.XFA(8, 2), xk.XFABlock(8, 2)):
        assert_refused(lambda module=module: module(x), exception, [r"\bx\b", *words])
        assert_refused(lambda module=module: module(nested()), TypeError, [r"\bx\b", "nested"])


@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_bad_masks_of_modules(hooked):
    layer = xk.XFA(8, 2)
    if hooked:
        layer.qkv.register_forward_hook(lambda module, args, y: None)
    x = torch.ones(2, 5, 8)
    assert_refused(lambda: layer(x, torch.ones(2, 4).bool()), ValueError, ["token_mask", r"\(2, 5\)", r"\(2, 4\)"])
    assert_refused(lambda: layer(x, torch.ones(2, 5)), TypeError, ["token_mask", "float32", "bool"])
    assert_refused(lambda: layer(x, [1]), TypeError, ["token_mask", "list"])


@pytest.mark.parametrize("shape", [(2, 9, 11), (9, 12), (2, 3, 4, 12)], ids=str)
def test_bad_layer_input(shape):
    layer = xk.XFA(12, num_heads=3)
    assert_refused(lambda: layer(torch.ones(shape)), ValueError, [r"\bx\b", ", ".join(map(str, shape)), "12"])

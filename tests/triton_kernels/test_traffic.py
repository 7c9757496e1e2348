"""The traffic model agrees with the loads, stores and products of the kernels in Triton's interpreter."""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from cases import Config, randn

triton = pytest.importorskip("triton", reason="triton is not installed")

from xformer_kernels.backends.triton import configs, launch, linear, ops, traffic  # noqa: E402
from xformer_kernels.reference import accumulate_dtype  # noqa: E402
from xformer_kernels.spec import Spec  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETING, reason="counts what Triton's interpreter does"),
    pytest.mark.usefixtures("triton_runs"),
]
B, H = 1, 1
CHOICES = [(map, norm) for map in ("query_key", "key_value") for norm in ("token", "feature")]


@contextmanager
def counting(tensors):
    """Context that counts the bytes loaded and stored for each tensor, and the terms of products."""
    from triton.runtime.interpreter import InterpreterBuilder

    loads, stores, terms = defaultdict(int), defaultdict(int), [0]
    originals = {x: getattr(InterpreterBuilder, x) for x in ("create_masked_load", "create_masked_store", "create_dot")}

    def count(counts, pointers, mask):
        addresses = pointers.data[mask.data.astype(bool)]
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for name, tensor in tensors.items():
            begin = tensor.data_ptr()
            counts[name] += size * int(((addresses >= begin) & (addresses < begin + tensor.nbytes)).sum())

    def load(self, pointers, mask, *args, **kwargs):
        count(loads, pointers, mask)
        return originals["create_masked_load"](self, pointers, mask, *args, **kwargs)

    def store(self, pointers, value, mask, *args, **kwargs):
        count(stores, pointers, mask)
        return originals["create_masked_store"](self, pointers, value, mask, *args, **kwargs)

    def dot(self, a, b, acc, precision, *args, **kwargs):
        count = a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        # each of the three products of tf32x3 is a third of a product
        terms[0] += Fraction(count, 3) if precision == triton._C.libtriton.ir.INPUT_PRECISION.TF32 else count
        return originals["create_dot"](self, a, b, acc, precision, *args, **kwargs)

    replaced = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot}
    for name, function in replaced.items():
        setattr(InterpreterBuilder, name, function)
    try:
        yield loads, stores, terms
    finally:
        for name, function in originals.items():
            setattr(InterpreterBuilder, name, function)


def run(N, D, dtype, map, norm):
    """The inputs, the counts of the forward and the counts of the backward."""
    inputs = {name: randn(B, H, N, D, seed=i, dtype=dtype) for i, name in enumerate(("q", "k", "v", "dout"))}
    t, spec = torch.ones(H), Spec(map, norm)
    q, k, v, dout = inputs.values()
    with counting(inputs) as forward:
        _, stats = ops.xfa_forward(q, k, v, t, None, spec)
    with counting(inputs) as backward:
        ops.xfa_backward(dout, q, k, v, t, stats, None, spec)
    return inputs, forward, backward


def models(D, dtype, map, norm, at_once):
    key_value, token = map == "key_value", norm == "token"
    wide = accumulate_dtype(dtype)

    def config(kernel, normalised=False):
        precision = launch.gram_precision(dtype, False, "interpreter", D) if kernel == "gram" else "tf32x3"
        kernel = "gram_normalised" if normalised else launch.variant(kernel, dtype, precision)
        if (kernel, D > launch.LONGEST_IN_PARTS) == ("apply_tf32x3", True):
            kernel = "apply"
        return configs.get(configs.Key(kernel, wide if normalised else dtype, D, f"{map}-{norm}"), "interpreter")

    forward = traffic.forward(D, key_value, token, config("gram", not token), None if at_once else config("apply"))
    backward = traffic.backward(D, key_value, token, config("gram", key_value and not token), config("gradients"))
    return forward, backward


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("map, norm", CHOICES, ids="-".join)
@pytest.mark.parametrize("N, D", [(512, 32), (128, 256), (500, 48)])
def test_model_is_what_the_kernels_do(N, D, map, norm, dtype):
    inputs, forward, backward = run(N, D, dtype, map, norm)
    size = inputs["q"].nbytes
    for (loads, stores, terms), model in zip((forward, backward), models(D, dtype, map, norm, False), strict=True):
        assert {name: count / size for name, count in loads.items() if count} == model.reads
        assert not any(stores.values())
        if N % 128 == 0 and configs.block(D) == D:  # products compute whole tiles; loads are masked
            assert terms[0] == model.products * B * H * N * D * D


@pytest.mark.parametrize("map, norm", CHOICES, ids="-".join)
def test_one_launch(map, norm, monkeypatch):
    """The model is right for the one-launch forward. The target has one multiprocessor, which one head fills."""
    monkeypatch.setattr(launch, "target", lambda device: launch.Target("interpreter", 1))
    monkeypatch.setattr(ops, "_slots", lambda *_, **__: 1)
    inputs, (loads, _, terms), _ = run(512, 32, torch.float32, map, norm)
    model, _ = models(32, torch.float32, map, norm, True)
    assert {name: count / inputs["q"].nbytes for name, count in loads.items() if count} == model.reads
    assert terms[0] == model.products * B * H * 512 * 32 * 32


def test_results_are_written_once():
    """Every element of out, dq, dk and dv is stored exactly once, and no other tensor of this size is allocated."""
    q, k, v, dout = (randn(2, 3, 1000, 20, seed=i).transpose(1, 2).contiguous().transpose(1, 2) for i in range(4))
    results, empty = {}, ops._empty

    def remembering(size, dtype, like):
        results[f"{len(results)}: {tuple(size)}"] = tensor = empty(size, dtype, like)
        return tensor

    ops._empty = remembering
    try:
        with counting(results) as (_, stores, _):
            spec = Spec()
            _, stats = ops.xfa_forward(q, k, v, torch.ones(3), None, spec)
            ops.xfa_backward(dout, q, k, v, torch.ones(3), stats, None, spec)
    finally:
        ops._empty = empty
    large = {name: tensor for name, tensor in results.items() if tensor.numel() >= q.numel()}
    assert [tuple(tensor.shape) for tensor in large.values()] == [(2, 1000, 3, 20), (3, 2, 1000, 3, 20)]
    for name, tensor in large.items():
        assert stores[name] == tensor.nbytes


def test_the_least_is_reached_by_the_default():
    """XCA reads q, k and v once and writes out once; its backward reads dout twice, once for each pass."""
    for dtype in (torch.bfloat16, torch.float16):
        for features in (16, 32, 48, 64):
            forward, backward = models(features, dtype, "query_key", "token", False)
            assert forward.over_least(4) == 1
            assert backward.over_least(7) == 8 / 7


def test_launches(monkeypatch):
    """At most two launches forward and three backward; one forward if heads fill the device or tokens are few."""
    launched = []
    run = ops._run
    monkeypatch.setattr(ops, "_run", lambda kernel, *args, **kw: (launched.append(kernel), run(kernel, *args, **kw)))
    for config in (Config(), Config("key_value", "feature"), Config("query_key", "none")):
        spec = config.spec
        for shape, launches in (((1, 1, 513, 16), 2), ((2, 4, 513, 16), 1), ((1, 1, 30, 16), 1), ((1, 1, 30, 200), 2)):
            q, k, v, dout = (randn(*shape, seed=i) for i in range(4))
            launched.clear()
            _, stats = ops.xfa_forward(q, k, v, torch.ones(shape[1]), None, spec)
            assert len(launched) == launches
            launched.clear()
            ops.xfa_backward(dout, q, k, v, torch.ones(shape[1]), stats, None, spec)
            assert len(launched) == 3


@pytest.mark.parametrize("feature_map, launches", [("relu", 2), ("softmax_tokens", 3)])
def test_linear_attention(feature_map, launches, monkeypatch):
    """Forward and backward read each input once; a forward softmax over tokens reads k again for its maxima."""
    launched, run = [], ops._run
    monkeypatch.setattr(ops, "_run", lambda kernel, *args, **kw: (launched.append(kernel), run(kernel, *args, **kw)))
    shapes = {"q": (1000, 20), "k": (900, 20), "v": (900, 12), "dout": (1000, 12)}
    inputs = {name: randn(2, 3, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    q, k, v, dout = inputs.values()
    spec = Spec.of_linear_attention(feature_map, True, 1.0, 1e-6)
    with counting(inputs) as (forward, _, _):
        _, stats = linear.linear_attention_forward(q, k, v, None, None, spec)
    assert len(launched) == launches
    assert {name: n / inputs[name].nbytes for name, n in forward.items() if n} == {"q": 1, "k": launches - 1, "v": 1}
    with counting(inputs) as (backward, _, _):
        linear.linear_attention_backward(dout, q, k, v, stats, None, None, spec)
    assert len(launched) == launches + 2
    assert {name: n / inputs[name].nbytes for name, n in backward.items()} == dict.fromkeys(inputs, 1)

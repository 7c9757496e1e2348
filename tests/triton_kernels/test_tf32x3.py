"""float32 products by three products of tf32 keep the tolerance rule, by a model of the tensor core's sums.

The model adds 8 products to an accumulator as tensor cores do: the addends are aligned to the largest one and cut, and
the sum is cut to 24 bits. `extra` is the number of bits kept below those of the largest addend: 0 is the worst case
that measurements of GPUs have shown, 2 is usual.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import generator, randn

from xformer_kernels.testing import assert_close

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from xformer_kernels.backends.triton import configs, launch, plan, table  # noqa: E402
from xformer_kernels.backends.triton.kernels.compiler import kernel  # noqa: E402
from xformer_kernels.backends.triton.kernels.tiles import three_products  # noqa: E402

STEP = 8
"""Terms that tensor cores add to an accumulator at a time."""
TF32 = np.uint32(0xFFFFE000)


def cut(x):
    """The tf32 number that tensor cores use for x: its leading bits."""
    return (x.view(np.uint32) & TF32).view(np.float32)


def nearest(x):
    return ((x.view(np.uint32) + np.uint32(0x1000)) & TF32).view(np.float32)


def add(sums, a, b, extra):
    """sums + a^T @ b for tf32 a and b of STEP rows, by the model."""
    products = cut(a).T[:, None, :].astype(np.float64) * cut(b).T[None].astype(np.float64)
    terms = np.concatenate([sums[..., None].astype(np.float64), products], -1)
    exponents = np.frexp(np.abs(terms).max(-1, keepdims=True))[1]
    unit = np.ldexp(1.0, exponents - 24 - extra)
    mantissas, exponents = np.frexp((np.trunc(terms / unit) * unit).sum(-1))
    return np.ldexp(np.trunc(np.ldexp(mantissas, 24)), exponents - 24).astype(np.float32)


def by_tensor_cores(a, b, extra, chunk, rounded=nearest, small_terms=True):
    """a^T @ b as in tiles.three_products, `chunk` terms per sum of tensor cores; these sums are added in float32."""
    total = np.zeros((a.shape[1], b.shape[1]), np.float32)
    a_high, b_high = rounded(a), rounded(b)
    small = ((a - a_high, b_high), (a_high, b - b_high)) if small_terms else ()
    for start in range(0, len(a), chunk):
        for products in (small, ((a_high, b_high),)):
            sums = np.zeros_like(total)
            for x, y in products:
                for i in range(start, min(start + chunk, len(a)), STEP):
                    sums = add(sums, x[i : i + STEP], y[i : i + STEP], extra)
            total += sums
    return total


def check(a, b, **model):
    """Asserts the rule for a^T @ b."""
    result = torch.from_numpy(by_tensor_cores(a.numpy(), b.numpy(), **model))
    assert_close(result, a.T @ b, a.double().T @ b.double(), str(model))


def tokens(mean, N, features):
    return tuple(randn(N, features, seed=seed) + mean for seed in (0, 1))


def values_and_map(mean, D):
    x, logits = randn(D, 96, seed=2) + mean, randn(D, D, seed=3)
    return x, (0.3 * logits).softmax(0)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_products_keep_the_rule(mean, extra):
    """Gram matrices of tokens, whose mean may be far from 0, and products with maps."""
    for chunk in (32, launch.LONGEST_IN_PARTS):
        check(*tokens(mean, 1024, 24), extra=extra, chunk=chunk)
    for D in (32, 48, launch.LONGEST_IN_PARTS):
        check(*values_and_map(mean, D), extra=extra, chunk=D)


@pytest.mark.parametrize("extra", [0, 2])
def test_numbers_just_below_those_of_tf32(extra):
    """A rest of nearly a unit of tf32, which a truncating split leaves, is rounded away."""
    a, b = just_below()
    check(a, b, extra=extra, chunk=launch.LONGEST_IN_PARTS)


def just_below():
    return tuple(1 + 2**-10 * (0.97 + 0.03 * torch.rand(64, 16, generator=generator(seed))) for seed in (4, 5))


@pytest.mark.parametrize("extra", [0, 2])
def test_the_model_finds_faults(extra):
    """The rule fails for one sum over all tokens, for a split that truncates, and without the small terms."""
    faults = {
        "one sum": (tokens(3.0, 1024, 24), {"chunk": 1024}),
        "truncating split": (just_below(), {"chunk": launch.LONGEST_IN_PARTS, "rounded": cut}),
        "one product": (tokens(0.0, 256, 24), {"chunk": launch.LONGEST_IN_PARTS, "small_terms": False}),
    }
    for operands, model in faults.values():
        with pytest.raises(AssertionError, match="error"):
            check(*operands, extra=extra, **model)
    if not extra:
        with pytest.raises(AssertionError, match="error"):
            check(*values_and_map(3.0, 256), extra=extra, chunk=256)


def test_no_sum_of_tensor_cores_is_long():
    """In every config that may be tried, of kernels that multiply float32 by tf32x3."""
    rows = [(name, D) for name, size in table.TABLE if "tf32x3" in name for D in table.TABLE[name, size]]
    assert {name for name, _ in rows} == set(configs.IN_PARTS)
    for name, row in rows:
        D, arch = row if isinstance(row, tuple) else (row, "sm_80")
        for config in configs.candidates(configs.Key(name, torch.float32, D, ""), arch):
            if name.startswith(("gram", "forward", "layer_gram")) and D > 32:
                assert config.block_n <= launch.LONGEST_IN_PARTS
            if name.startswith(("apply", "gradients")):
                assert min(config.block_k, D) <= launch.LONGEST_IN_PARTS


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_which_products_are_of_tf32x3(arch, monkeypatch):
    """Where it pays, unless tf32 is allowed; never norms, float64 or AMD."""
    f32, matmul = torch.float32, torch.backends.cuda.matmul
    nvidia = arch.startswith("sm_")
    assert (launch.gram_precision(f32, False, arch, 48) == "tf32x3") == nvidia
    assert launch.gram_precision(f32, False, arch, 32) == "ieee"
    assert launch.gram_precision(f32, False, arch, 48, symmetric=True) == "ieee"
    assert (launch.map_precision(f32, arch, 32) == "tf32x3") == nvidia
    assert launch.map_precision(f32, arch, plan.WIDEST) == launch.map_precision(f32, arch) == "ieee"
    assert (
        launch.gram_precision(torch.float64, False, arch, 48) == launch.map_precision(torch.float64, arch, 32) == "ieee"
    )
    monkeypatch.setattr(launch, "tf32_allowed", lambda: True)
    assert launch.gram_precision(f32, False, arch, 48) == launch.map_precision(f32, arch, 32) == "tf32"
    assert not matmul.allow_tf32


@kernel
def multiply(a_ptr, b_ptr, y_ptr):
    i = tl.arange(0, 16)
    places = i[:, None] * 16 + i[None, :]
    tl.store(y_ptr + places, three_products(tl.load(a_ptr + places), tl.load(b_ptr + places)))


@pytest.mark.skipif(not launch.INTERPRETING, reason="runs a kernel on the CPU")
def test_numbers_that_are_not_finite(triton_runs):
    """Inf and NaN are where a float32 product has them, also the NaN of GPUs, all of whose bits may be set."""
    a, b = randn(16, 16, seed=6), randn(16, 16, seed=7)
    a[1, 2], a[3, 4], a[5, 6], a[7, 8] = float("inf"), float("-inf"), float("nan"), 1e-38
    b[2, 9], b[10, 11] = 0.0, float("inf")
    c, d = randn(16, 16, seed=8), randn(16, 16, seed=9)
    c.view(torch.int32)[9, 10], d.view(torch.int32)[12, 13] = 0x7FFFFFFF, -1
    for x, y in ((a, b), (c, d)):
        product = torch.empty(16, 16)
        with np.errstate(invalid="ignore"):
            multiply[(1,)](x, y, product)
        assert_close(product, x @ y, x.double() @ y.double(), "product")

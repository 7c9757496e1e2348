"""Offsets beyond 2^31 elements, in buffers of which only a few pages are touched."""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from cases import Problem, make_problem, randn, random_mask

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise

FAR = 2**31 + 12345
SHAPE = (2, 2, 3, 5)  # (B, H, N, D)


def available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.fixture(scope="module")
def buffer():
    """A buffer of more than 2^31 elements; the operating system allocates its pages when they are written."""
    if not os.path.exists("/proc/meminfo"):
        pytest.skip("needs an operating system that allocates pages when they are first written (Linux)")
    return torch.empty(FAR + 4096, dtype=torch.bfloat16)


def far_view(buffer, values, dim):
    """A view with these values whose last index of `dim` is about 2^31 elements or more from the first."""
    strides, step = [0] * values.ndim, 1
    for other in reversed(range(values.ndim)):
        if other != dim:
            strides[other], step = step, step * values.shape[other]
    strides[dim] = FAR // (values.shape[dim] - 1)
    assert strides[dim] * (values.shape[dim] - 1) + step <= buffer.numel()
    view = buffer.as_strided(values.shape, strides)
    view.copy_(values)
    assert (values.shape[dim] - 1) * view.stride(dim) > 2**31 - 8
    return view


@cache
def near_results(kernel):
    """The problem, and the results of the kernel with small offsets, which are the expected ones."""
    p = make_problem(SHAPE, dtype=torch.bfloat16, layout="contiguous")
    return p, p.run(xk.xfa, backend=kernel)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dim", range(4), ids=["batch", "heads", "tokens", "features"])
def test_xfa(dim, name, kernel, device, ran, buffer):
    if device != "cpu":
        pytest.skip("device memory is not allocated lazily")
    p, expected = near_results(kernel)
    near = {key: getattr(p, key) for key in ("q", "k", "v", "temperature", "dout")}
    near[name] = far_view(buffer, near[name], dim)
    with ran("xfa_forward", "xfa_backward"):
        result = Problem(**near).run(xk.xfa, backend=kernel)
    for key, x in result.items():
        assert_bitwise(x, expected[key], key)


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("dim", range(4), ids=["batch", "heads", "tokens", "features"])
def test_primitives(dim, kernel, device, ran, buffer):
    if device != "cpu":
        pytest.skip("device memory is not handed out lazily")
    near = randn(*SHAPE, seed=1, dtype=torch.bfloat16)
    far, weight = far_view(buffer, near, dim), randn(5, 5, seed=2)
    with ran("gram", "channel_mix"):
        result = (*xk.gram(far, far, symmetric=True, backend=kernel), *xk.gram(near, far, backend=kernel))
        result += (xk.channel_mix(far, weight, add=far, x2=far, weight2=weight, backend=kernel),)
    expected = (*xk.gram(near, near, symmetric=True, backend=kernel), *xk.gram(near, near, backend=kernel))
    expected += (xk.channel_mix(near, weight, add=near, x2=near, weight2=weight, backend=kernel),)
    for a, b in zip(result, expected, strict=True):
        assert_bitwise(a, b, "far and near")


@pytest.mark.parametrize("dim", range(2), ids=["batch", "tokens"])
def test_mask(dim, kernel, device, ran, buffer):
    if device != "cpu":
        pytest.skip("device memory is not handed out lazily")
    p = make_problem(SHAPE)
    p.token_mask = random_mask(p.q.shape[0], p.q.shape[2], seed=1)
    expected = p.run(xk.xfa, backend=kernel)
    p.token_mask = far_view(buffer.view(torch.bool), p.token_mask, dim)
    with ran("xfa_forward", "xfa_backward"):
        result = p.run(xk.xfa, backend=kernel)
    for key, x in result.items():
        assert_bitwise(x, expected[key], key)


def test_output_of_more_than_2_31_elements(kernel, device, ran, slow):
    """The only buffer that is written completely: 4.3 GB of bfloat16, by channel_mix."""
    if slow:
        pytest.skip("4.3 GB take the interpreter hours; far inputs are tested above, and a GPU runs this")
    if device == "cpu" and available_bytes() < 6 * 2**30:
        pytest.skip("needs 6 GiB of free memory for an output of 2^31 elements")
    features = 256
    N = 2**31 // features + 3
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16, device=device).expand(1, 1, N, 1)
    weight = torch.arange(features, dtype=torch.float32, device=device).view(features, 1) % 128
    with ran("channel_mix"), torch.no_grad():
        y = xk.channel_mix(x, weight, backend=kernel)
    assert y.numel() > 2**31
    for n in (0, 1, N // 2, 2**31 // features - 1, 2**31 // features, N - 1):
        assert torch.equal(y[0, 0, n].float(), weight[:, 0]), f"token {n}"

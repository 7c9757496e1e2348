"""Results are bitwise the same for the same inputs, in repeated calls and for any number of threads."""

from __future__ import annotations

import pytest
import torch
from cases import CONFIGS, make_problem, randn

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise

# One chunk of tokens, several chunks, many small units, a single unit.
SHAPES = ((1, 20011, 1, 24), (2, 4500, 2, 48), (16, 64, 4, 60), (1, 9, 1, 4), (1, 300, 1, 257))
THREADS = (1, 2, 3, 4)


def threads_of(kernel):
    """Numbers of threads to compare; for kernels without threads, repeated calls."""
    return THREADS if kernel == "cpp" else (2, 2)


@pytest.mark.nightly(slow=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_xfa_bits_do_not_depend_on_threads(shape, masked, dtype, kernel, device, ran, need_features, shorter):
    need_features(shape[-1])
    p = make_problem(shorter(shape), dtype=dtype, masked=masked, device=device)
    expected = None
    for threads in threads_of(kernel) * (2 if kernel == "cpp" else 1):
        torch.set_num_threads(threads)
        with ran("xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend=kernel)
        expected = expected or result
        for name, x in result.items():
            assert_bitwise(x, expected[name], f"{name} with {threads} threads")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_xfa_bits_of_every_config(config, kernel, device, shorter):
    p = make_problem(shorter((3, 2500, 2, 20)), config, device=device)
    expected = p.run(xk.xfa, backend=kernel)
    for threads in set(threads_of(kernel)):
        torch.set_num_threads(threads)
        for name, x in p.run(xk.xfa, backend=kernel).items():
            assert_bitwise(x, expected[name], f"{name} with {threads} threads")


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("N", [7, 300, 9001])
def test_primitive_bits_do_not_depend_on_threads(N, kernel, device, ran, shorter):
    _, N = shorter((2, N))
    a, b = (randn(2, 2, N, d, seed=d, device=device) for d in (24, 40))
    weight = randn(2, 2, 40, 24, seed=3, device=device)
    expected = None
    for threads in threads_of(kernel):
        torch.set_num_threads(threads)
        with ran("gram", "channel_mix"):
            result = (
                *xk.gram(a, b, backend=kernel),
                xk.gram(b, b, symmetric=True, backend=kernel)[0],
                xk.channel_mix(a, weight, add=b, backend=kernel),
            )
        expected = expected or result
        for i, x in enumerate(result):
            assert_bitwise(x, expected[i], f"result {i} with {threads} threads")


def test_deterministic_mode_changes_nothing(kernel, device, ran, shorter):
    p = make_problem(shorter((2, 3000, 2, 24)), device=device)
    expected = p.run(xk.xfa, backend=kernel)
    torch.use_deterministic_algorithms(True)
    try:
        with ran("xfa_forward", "xfa_backward"):
            result = p.run(xk.xfa, backend=kernel)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in result.items():
        assert_bitwise(x, expected[name], name)

"""The passes of a layer in Gram form: what they launch and write. Their results are tested in tests/test_layer.py."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from layer_cases import make_layer

pytest.importorskip("triton", reason="triton is not installed")

from xformer_kernels import dispatch
from xformer_kernels.backends.triton import launch, layer, ops, plan
from xformer_kernels.backends.triton.maps import WIDEST_MAP
from xformer_kernels.testing import assert_bitwise

pytestmark = [
    pytest.mark.skipif(not launch.INTERPRETING, reason="looks at what Triton's interpreter does"),
    pytest.mark.usefixtures("triton_runs"),
]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, run = [], ops._run
    monkeypatch.setattr(
        ops, "_run", lambda kernel, *args, **kw: (names.append(kernel.fn.__name__), run(kernel, *args, **kw))
    )
    return names


@pytest.mark.parametrize("block", [False, True], ids=["layer", "block"])
@pytest.mark.parametrize("C", [24, 130])
def test_launches(C, block, launched):
    """Each pass is one launch, as are the maps, whose derivatives take two; the statistics of tokens that no tile holds
    are one more. Nothing is composed."""
    run = make_layer((2, 40, C, 2), block=block)
    with dispatch.record() as seen:
        run.run(form="gram", backend="triton")
    assert {op for _, op in seen} == {"layer_forward", "layer_backward"}
    gram = ["layer_statistics_kernel"] * (block and C > 64) + ["layer_gram_kernel"]
    forward = ["layer_sample_kernel", *gram, "layer_maps_kernel", "layer_mix_kernel"]
    backward = [*gram, "layer_maps_backward_kernel", "layer_rows_kernel", "layer_mix_kernel"]
    eager = {"layer_maps_kernel", "layer_maps_backward_kernel", "layer_rows_kernel"} if WIDEST_MAP[4] < C // 2 else ()
    assert launched == [name for name in (*forward, *backward) if name not in eager]


@pytest.mark.parametrize("C", [24, 130])
def test_only_results_have_the_size_of_the_tokens(C, monkeypatch):
    """Besides them, a buffer has at most two numbers per token."""
    sizes, empty = [], ops._empty
    monkeypatch.setattr(ops, "_empty", lambda size, *args: (sizes.append(size), empty(size, *args))[1])
    B, N = 2, 700
    make_layer((B, N, C, 2), block=True).run(form="gram", backend="triton")
    per_token = [torch.Size(size).numel() // (B * N) for size in sizes if N in size]
    assert sorted(x for x in per_token if x > 2) == [C, C]


@pytest.mark.parametrize("C", [24, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_many_parts(dtype, C, monkeypatch):
    """Results are right, the same in every run, and S is exactly symmetric, if parts of the tokens are summed first."""
    monkeypatch.setattr(plan, "LONGEST", 128)
    monkeypatch.setattr(plan, "SHORT", plan.CHUNK)
    run = make_layer((1, 600, C, 2), dtype=dtype, block=True, masked=True)
    results = [run.run(form="gram", backend="triton") for _ in range(2)]
    run.check(results[0])
    for name, first in results[0].items():
        assert_bitwise(first, results[1][name], name)
    x = run.tensors[0].unsqueeze(1)
    S, sums, again = layer.layer_gram(x, x, True, run.token_mask, randn(1, C, seed=5), 1e-6)
    assert_bitwise(S, S.mT.contiguous(), "S")
    assert_bitwise(sums, again, "sums")


def test_more_output_features_than_a_tile_holds(launched, ran_backend):
    run = make_layer((1, 40, 24, 3), out=300)
    with ran_backend("triton", "layer_forward", "layer_backward"):
        run.check(run.run(form="gram", backend="triton"))
    assert "layer_mix_kernel" in launched

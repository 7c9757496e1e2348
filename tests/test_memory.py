"""Besides the results, no memory of size N is saved for the backward or allocated."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from cases import CONFIGS, make_problem

import xformer_kernels as xk
from xformer_kernels import dispatch

MB = 2**20


def saved_bytes(function, inputs) -> tuple[int, torch.Tensor]:
    """Bytes of the distinct storages that autograd saves, except those of the inputs and the output."""
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*inputs)
    for x in inputs:
        saved.pop(x.untyped_storage().data_ptr(), None)
    return sum(saved.values()), out


@pytest.mark.one_in(3)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("D", [8, pytest.param(256, marks=pytest.mark.nightly(slow=True))])
def test_saved_statistics_do_not_grow_with_the_tokens(D, config, masked, kernel, device, ran, slow, need_features):
    saved = []
    if slow:
        D = min(D, 130)  # still too wide for one launch
    need_features(D)
    for N in (30, 90) if slow else (300, 3000):
        p = make_problem((2, N, 2, D), config, masked=masked, device=device)
        mask = p.token_mask

        def function(*x, config=config, mask=mask):
            return xk.xfa(*x, token_mask=mask, **config.kwargs(), backend=kernel)

        inputs = p.inputs()
        with ran("xfa_forward"):
            size, out = saved_bytes(function, inputs)
        if masked:
            size -= min(size, mask.numel())
        saved.append(size)
        assert out.grad_fn is not None
    assert saved[0] == saved[1]
    assert 0 < saved[0] <= 2 * 2 * MB


@pytest.mark.needs(norm=None)
@pytest.mark.parametrize("norm", ["token", "feature"])
def test_saved_by_map_fn(norm, kernel, device):
    """Token norms save only the map; feature norms are applied before the passes, and may save q and k normalised."""
    saved = []
    for N in (300, 3000):
        p = make_problem((2, N, 2, 8), device=device)
        size, _ = saved_bytes(
            lambda *x: xk.xfa(*x, norm=norm, map_fn=lambda S: S.softmax(-1), backend=kernel), p.inputs()
        )
        saved.append(size)
    if norm == "token":
        assert saved[0] == saved[1] <= 2 * 2 * MB


PEAK = """
import sys, torch, xformer_kernels as xk
torch.set_num_threads(2)
B, N, H, D = map(int, sys.argv[1].split(","))
dtype = getattr(torch, sys.argv[2])
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
def reset_peak():
    open("/proc/self/clear_refs", "w").write("5")
qkv = torch.randn(B, N, 3, H, D).to(dtype)
q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
t = torch.ones(H, requires_grad=True)
small = [torch.randn(1, 1, 64, D, dtype=torch.float32).to(dtype).requires_grad_() for _ in range(3)]
torch.autograd.grad(xk.xfa(*small, t[:1], backend="cpp").sum(), small)       # threads, lazily loaded code
torch.autograd.grad(xk.linear_attention(*small, backend="cpp").sum(), small)
torch.autograd.grad(torch.ones(1 << 20, requires_grad=True).exp().sum(), [torch.ones(1, requires_grad=True)],
                    allow_unused=True)
dout = torch.ones(B, N, H, D, dtype=dtype).transpose(1, 2)
reset_peak(); start = status("VmRSS")
if sys.argv[3] == "xfa":
    out, inputs = xk.xfa(q, k, v, t, backend="cpp"), (q, k, v, t)
else:
    out, inputs = xk.linear_attention(q, k, v, feature_map=sys.argv[3], backend="cpp"), (q, k, v)
print(status("VmHWM") - start)
reset_peak(); start = status("VmRSS")
grads = torch.autograd.grad(out, inputs, dout)
print(status("VmHWM") - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)], ids=str)
@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((1, 200_000, 2, 48), "xfa"), ((4, 30_000, 4, 32), "xfa"), ((2, 20_000, 2, 256), "xfa"),
        ((1, 200_000, 2, 48), "relu"), ((4, 30_000, 4, 32), "softmax_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_peak_memory(shape, function, dtype, need_backend):
    """Resident memory, to include the buffers of the kernels: the results and at most 1 MB per (b, h)."""
    need_backend("cpp")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("/proc/self/clear_refs, which resets the peak of resident memory, may not be written here")
    arguments = [",".join(map(str, shape)), str(dtype).removeprefix("torch."), function]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    forward, backward = map(int, done.stdout.split())
    B, N, H, D = shape
    one = B * N * H * D * dtype.itemsize
    noise = 4 * MB  # pages of code and of the allocator that are touched for the first time
    assert forward <= one + B * H * MB + noise, f"{(forward - one) / MB:.1f} MB beside the output"
    assert backward <= 3 * one + B * H * MB + noise, f"{(backward - 3 * one) / MB:.1f} MB beside the gradients"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs MADV_HUGEPAGE of Linux")
def test_large_results_request_huge_pages(need_backend):
    """Huge pages are requested only for results of 32 MiB or more; the values do not change."""
    need_backend("cpp")
    from xformer_kernels import _C
    from xformer_kernels.backends import cpp

    for address, size in ((0, 0), (1 << 20, 1)):
        _C.prefer_huge_pages(address, size)
    asked = []
    original, _C.prefer_huge_pages = _C.prefer_huge_pages, lambda *x: (asked.append(x), original(*x))
    try:
        for N in (1000, 2**32 // 2**7):
            x = torch.ones(1, 1, 1, 1).expand(1, 1, N, 1) if N > 1000 else torch.ones(1, 1, N, 1)
            y = cpp.channel_mix(x, torch.ones(1, 1, 1, 1), None, None, None, None, None)
            assert torch.equal(y.flatten(), torch.ones(N))
    finally:
        _C.prefer_huge_pages = original
    assert [size for _, size in asked] == [2**32 // 2**7 * 4]


def test_linear_attention_saves_only_statistics(kernel, device, ran_backend):
    """A backend that fuses linear attention saves S and z of each head."""
    if not dispatch.fuses_linear_attention(kernel, ("relu", "relu"), torch.float32, (8, 8)):
        pytest.skip(f"{kernel} composes linear attention, and keeps feature maps")
    saved = []
    for N in (300, 3000):
        q, k, v = (torch.randn(2, 2, N, 8, device=device).requires_grad_() for _ in range(3))
        with ran_backend(kernel, "linear_attention_forward"):
            size, _ = saved_bytes(lambda *x: xk.linear_attention(*x, backend=kernel), (q, k, v))
        saved.append(size)
    assert saved[0] == saved[1] == 4 * (8 * 8 + 8) * 4

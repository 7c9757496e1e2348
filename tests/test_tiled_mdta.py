"""Attention of Restormer computed by tiles of rows: the same result, with the memory of one tile."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from cases import randn
from monai.networks.blocks.cablock import CABlock
from test_integrations import MDTA
from test_nn import randomize
from torch import nn

from xformer_kernels.integrations import replace_attention, tiled_mdta
from xformer_kernels.testing import assert_close


def block(dim=24, heads=3, bias=True):
    return randomize(MDTA(dim, heads, bias)).requires_grad_(False)


@pytest.mark.parametrize("tile", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(2, 24, 17, 13), (1, 24, 1, 5), (1, 24, 16, 1)], ids=str)
def test_equals_the_forward_without_tiles(shape, bias, tile):
    model = block(bias=bias).double()
    x = randn(*shape, seed=1, dtype=torch.float64)
    torch.testing.assert_close(tiled_mdta(model, x, tile=tile), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_tolerance(memory_format, dtype):
    model = block().to(dtype).to(memory_format=memory_format)
    x = randn(2, 24, 33, 29, seed=1, dtype=dtype).to(memory_format=memory_format)
    y = tiled_mdta(model, x, tile=8)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    assert_close(y, model(x), copy.deepcopy(model).double()(x.double()), "y")


@pytest.mark.parametrize("size, dilation", [(1, 1), (5, 1), (3, 2)])
def test_depthwise_convolutions_of_other_sizes(size, dilation):
    model = block().double()
    model.qkv_dwconv = nn.Conv2d(72, 72, size, padding="same", dilation=dilation, groups=72).double()
    x = randn(1, 24, 19, 7, seed=1, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(tiled_mdta(model, x, tile=4), model(x), rtol=1e-10, atol=1e-10)


def test_monai_and_replaced_modules():
    model = block().double()
    x = randn(1, 24, 9, 7, seed=1, dtype=torch.float64)
    expected = model(x)
    replace_attention(model)
    torch.testing.assert_close(tiled_mdta(model, x, tile=4), expected, rtol=1e-10, atol=1e-10)
    model = randomize(CABlock(2, 24, 3, True)).double()
    with torch.no_grad():
        torch.testing.assert_close(tiled_mdta(model, x, tile=4), model(x), rtol=1e-10, atol=1e-10)


def test_zero_channel():
    """Its norm is clamped, as in F.normalize."""
    model = block(bias=False).double()
    model.qkv.weight[:5] = 0
    x = randn(1, 24, 9, 7, seed=1, dtype=torch.float64)
    torch.testing.assert_close(tiled_mdta(model, x, tile=4), model(x), rtol=1e-10, atol=1e-10)


def test_refusals():
    model, x = block(), randn(1, 24, 9, 7, seed=1)
    with pytest.raises(RuntimeError, match="no_grad"):
        tiled_mdta(model, x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="no_grad"):
        tiled_mdta(copy.deepcopy(model).requires_grad_(True), x)
    for bad in (0, -1):
        with pytest.raises(ValueError, match="tile"):
            tiled_mdta(model, x, tile=bad)
    with pytest.raises(TypeError, match="tile"):
        tiled_mdta(model, x, tile=2.5)
    with pytest.raises(TypeError, match="module"):
        tiled_mdta(None, x)
    with pytest.raises(ValueError, match="module"):
        tiled_mdta(nn.Conv2d(24, 24, 1), x)
    with pytest.raises(TypeError, match="x must be"):
        tiled_mdta(model, None)
    with pytest.raises(ValueError, match="C = 24"):
        tiled_mdta(model, x[:, :5])

    class Almost(MDTA):
        def forward(self, x):
            return super().forward(x) + x

    with pytest.raises(ValueError, match="it computes something else"):
        tiled_mdta(Almost(24, 3, True).requires_grad_(False), x)
    for change in (
        lambda m: setattr(m.qkv_dwconv, "stride", (2, 2)),
        lambda m: setattr(m.qkv_dwconv, "padding", (0, 0)),
        lambda m: setattr(m.qkv_dwconv, "padding_mode", "reflect"),
        lambda m: m.qkv_dwconv.register_forward_hook(print),
    ):
        other = copy.deepcopy(model)
        change(other)
        with pytest.raises(ValueError, match=r"module\.qkv_dwconv"):
            tiled_mdta(other, x)


MEASURED = """
import sys, torch
from xformer_kernels.integrations import replace_attention, tiled_mdta
from test_integrations import MDTA
def memory(kind):  # of this process alone: ru_maxrss is at least what the process that started it had
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind + ":"))
how, side = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(2)
model = MDTA(48, 1, False).requires_grad_(False)
if how == "fused":
    replace_attention(model)
run = (lambda x: tiled_mdta(model, x, tile=32)) if how == "tiled" else model
run(torch.randn(1, 48, 32, 32))
x = torch.randn(1, 48, side, side)
before = memory("VmRSS")
y = run(x)
print((memory("VmHWM") - before) / y.nbytes)
"""


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_peak_memory():
    """In units of the output: the output itself and one tile. Without tiles, q, k, v and their inputs are 6 more."""

    def outputs(how):
        command = [sys.executable, "-c", MEASURED, how, "768"]
        paths = ":".join(path for path in sys.path if path)
        ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
        assert ran.returncode == 0, ran.stderr
        return float(ran.stdout)

    tiled, fused = outputs("tiled"), outputs("fused")
    print(f"peak memory beside x, in outputs of 113 MB: tiled {tiled:.2f}, fused {fused:.2f}")
    assert tiled < 1.6 < 4 < fused

"""Every instruction level that was built and that this processor supports gives correct results."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from cases import CONFIGS, LAYOUTS, make_problem
from layer_cases import make_layer
from test_primitives import mix_inputs
import xformer_kernels as xk
from xformer_kernels import _C, reference
from xformer_kernels.testing import assert_close
torch.set_num_threads(1)
assert _C.cpu_level() == sys.argv[2], _C.cpu_level()
for shape in ((2, 17, 3, 5), (1, 131, 2, 48), (1, 40, 1, 130), (2, 0, 1, 3)):
    for config in CONFIGS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for layout in ("packed", "token_contiguous", "padded"):
                p = make_problem(shape, config, dtype=dtype, layout=layout, masked=layout == "padded")
                p.check(p.run(xk.xfa, backend="cpp"))
t = mix_inputs((2, 3, 67, 9, 20), ("bias", "add", "add_scale", "x2"))
y = xk.channel_mix(**t, backend="cpp")
assert_close(y, reference.channel_mix(**t), reference.channel_mix(**{k: x.double() for k, x in t.items()}), "y")
for shape in ((2, 17, 10, 2), (1, 131, 48, 4), (1, 40, 130, 1)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for block in (False, True):
            layer = make_layer(shape, dtype=dtype, block=block, masked=block)
            layer.check(layer.run(form="gram", backend="cpp"))
from test_inference_kernels import SHAPES, batch_norm, check, depthwise, depthwise_in_torch, linear, linear_in_torch
from xformer_kernels import backends, inference
from xformer_kernels.inference import LayerNorm
# at every level, also those at which they do not serve by themselves
inference.KERNELS = backends.load("cpp")[0].module
torch.manual_seed(0)
with torch.no_grad():
    for N, I, O in SHAPES:
        parts = {"batch_norm": batch_norm(O), "layer_norm": LayerNorm(torch.randn(I), torch.randn(I), 1e-6)}
        check(linear, linear_in_torch, torch.randn(N, I), torch.randn(O, I), hard_swish=True, **parts)
        check(linear, linear_in_torch, torch.randn(N, I), torch.randn(O, I), torch.randn(O), add=torch.randn(N, O))
    for channels, side, stride in ((40, 3, 1), (33, 3, 2), (16, 5, 1), (7, 5, 2)):
        x = torch.randn(2, channels, 13, 21).contiguous(memory_format=torch.channels_last)
        weight, norm = torch.randn(channels, 1, side, side), batch_norm(channels)
        check(depthwise, depthwise_in_torch, x, weight, None, stride, batch_norm=norm, hard_swish=True)
print("same")
"""


def built_levels():
    try:
        from xformer_kernels import _C
    except ImportError:
        return ["none"]
    return _C.build_info()["levels"].split()


@cache
def usable(level):
    """Whether the processor supports the level. Starts a process, which takes seconds, so not called at collection."""
    probe = "from xformer_kernels import _C; print(_C.cpu_level())"
    env = {**os.environ, "XFORMER_KERNELS_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return bool(done.stdout.strip())


@pytest.fixture(params=built_levels())
def level(request, need_backend):
    need_backend("cpp")
    if not usable(request.param):
        pytest.skip(f"this processor does not have all of {request.param}")
    return request.param


def test_level(level):
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), level]
    env = {**os.environ, "XFORMER_KERNELS_CPU_LEVEL": level}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]


PAIRS = """
import torch, xformer_kernels as xk
def largest(D, masked):
    q, k = torch.randn(2, 1, 2, 41, D).to(torch.bfloat16).unbind(0)
    v, mask = torch.full_like(q, 1e-39), torch.ones(1, 41, dtype=torch.bool) if masked else None
    return xk.xfa(q, k, v, torch.ones(2), token_mask=mask, backend="cpp").abs().max().item()
print(*(int(largest(*case) > 0) for case in ((24, False), (32, False), (25, False), (24, True))))
"""


def processor_features():
    """CPU family and flags as reported by the system; empty if it does not report them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "", ()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("cpu family", ""), facts.get("flags", "").split()


def test_bf16_pairs_are_used_on_zen4_only(level):
    """Detected by subnormal numbers: the instruction for pairs treats them as zero, other paths do not."""
    env = {**os.environ, "XFORMER_KERNELS_CPU_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", PAIRS], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == (["0", "0", "1", "1"] if level == "zen4" else ["1"] * 4), done.stderr[-3000:]


def test_zen4_is_used_for_bf16_by_default(need_backend):
    need_backend("cpp")
    family, flags = processor_features()
    expected = family == "25" and "avx512_bf16" in flags and "zen4" in built_levels() and usable("zen4")
    env = {key: value for key, value in os.environ.items() if key != "XFORMER_KERNELS_CPU_LEVEL"}
    done = subprocess.run([sys.executable, "-c", PAIRS], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == (["0", "0", "1", "1"] if expected else ["1"] * 4), done.stderr[-3000:]

"""The kernel for Hugging Face's Hub that tools/hub_kernel.py makes: loaded as the Hub's loader does, and by it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLEAN = {key: value for key, value in os.environ.items() if not key.startswith(("XFORMER_KERNELS_", "PYTHONPATH"))}

# What timm's XCA has, and its forward.
XCA = """
import torch
from torch import nn

class XCA(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.rand(num_heads, 1, 1) + 0.5)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).permute(0, 3, 1, 2).reshape(B, N, C)))

def results(layer, x):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

torch.manual_seed(0)
layer, x = XCA(16, 2), torch.randn(2, 19, 16)
expected = results(layer, x)
"""

# Loaded by path under its id, as kernels.importer does.
LOAD = (
    XCA
    + """
import importlib.util, json, sys, types
from pathlib import Path
folder = Path(sys.argv[1])
id = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(id, folder / "__init__.py")
kernel = sys.modules[id] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
assert "xformer_kernels" not in sys.modules, "it imports the installed package"

with kernel.dispatch.record() as ran:
    layer.forward = types.MethodType(kernel.layers.XCA.forward, layer)
    got = results(layer, x)
assert ran and {backend for backend, _ in ran} == {"triton"}, ran
for ours, theirs in zip(got, expected):
    torch.testing.assert_close(ours, theirs)

q, k, v = torch.randn(3, 1, 2, 17, 8).unbind(0)
calls = [("xfa", (torch.ones(2),)), ("linear_attention", ())]
for name, more in calls:
    given = (q, k, v, *more)
    exact = getattr(kernel.reference, name)(*(t.double() for t in given))
    eager = getattr(kernel.reference, name)(*given)
    with kernel.dispatch.record() as ran:
        out = getattr(kernel, name)(*given)
    assert ran and {backend for backend, _ in ran} == {"triton"}, ran
    importlib.import_module(f"{id}.testing").assert_close(out, eager, exact, name)

# Beside the installed package, and in a namespace of its own.
import xformer_kernels
assert Path(xformer_kernels.__file__) != Path(kernel.__file__)
assert torch.ops.xformer_kernels.xfa_forward.default.name() == "xformer_kernels::xfa_forward"
assert getattr(torch.ops, id).xfa_forward.default.name() == f"{id}::xfa_forward"
print(id)
"""
)

KERNELIZE = (
    XCA
    + """
import sys
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub
from kernels import use_kernel_mapping
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

folder = Path(sys.argv[1])
variant = folder / "build" / "torch-cuda"
assert [str(backend) for backend in Build.open(folder).general.backends]
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
kernel = get_local_kernel(folder, backend="cuda")
replace_kernel_forward_from_hub(XCA, "XCA")
if not torch.cuda.is_available():
    # kernelize asks for it to choose a kernel; the kernels run in the interpreter
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
repository = LocalLayerRepository(repo_path=folder, layer_name="XCA")
with use_kernel_mapping({"XCA": {"cuda": repository}}):
    model = kernelize(nn.Sequential(layer), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cuda", use_fallback=False)
with kernel.dispatch.record() as ran:
    got = results(model[0], x)
assert ran and {backend for backend, _ in ran} == {"triton"}, ran
for ours, theirs in zip(got, expected):
    torch.testing.assert_close(ours, theirs)
"""
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "kernel"
    command = [sys.executable, ROOT / "tools" / "hub_kernel.py", out, "--repo", "someone/xformer-kernels"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return out


def run(code, folder):
    """The code in a process of its own, with the kernels in Triton's interpreter."""
    env = {
        **CLEAN, "TRITON_INTERPRET": "1", "XFORMER_KERNELS_BACKEND": "triton", "HF_HUB_OFFLINE": "1",
        "XFORMER_KERNELS_CALIBRATION": "off", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_files(hub):
    """The configuration is complete, and the digest is that of the files."""
    for name in ("build.toml", "CARD.md", "flake.nix"):
        text = (hub / name).read_text()
        assert "xformer-kernels" in text and not re.search("@[A-Z]+@", text), name
    variant = hub / "build" / "torch-cuda"
    metadata = json.loads((variant / "metadata.json").read_text())
    files = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*") if path.is_file()}
    files.pop("metadata.json")
    assert metadata["digest"]["files"] == {
        name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
    }
    source = hub / "torch-ext" / "xformer_kernels"
    assert {*files} - {"LICENSE", "_ops.py"} == {p.relative_to(source).as_posix() for p in source.rglob("*.py")}


def test_loads_by_path(hub, triton_runs):
    """Results and gradients of a layer and of the functions, by its Triton kernels, beside the installed package."""
    identifier = run(LOAD, hub / "build" / "torch-cuda").strip()
    assert identifier.startswith("_xformer_kernels_cuda_") and identifier.isidentifier()


@pytest.mark.nightly
def test_kernels_package_loads_and_kernelizes(hub, triton_runs):
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed (pip install kernels)")
    import torch

    if torch.version.cuda is None:
        pytest.skip("the kernels package refuses CUDA kernels where torch was built without CUDA")
    run(KERNELIZE, hub)

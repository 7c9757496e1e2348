"""Exported programs without ops of this package: ONNX files of plain torch.onnx, and run_decompositions."""

from __future__ import annotations

import pytest
import torch
from cases import CONFIGS
from torch import nn

import xformer_kernels as xk


class Attention(nn.Module):
    """A function of packed tokens (B, N, 3 * 2 * 8) and a mask (B, N)."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.temperature = nn.Parameter(torch.tensor([0.7, 1.3]))

    def forward(self, x, mask):
        q, k, v = x.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.function(q, k, v, self.temperature, mask).transpose(1, 2).flatten(2)


def composed(q, k, v, temperature, mask):
    G, ssq_k, ssq_q = xk.gram(k, q, token_mask=mask)
    return xk.channel_mix(v, G / 100, bias=ssq_k / 100, add=q, add_scale=ssq_q / 100)


FUNCTIONS = {
    **{
        str(config): lambda q, k, v, t, mask, c=config: xk.xfa(
            q, k, v, t, map=c.map, norm=c.norm, activation=c.activation, token_mask=mask
        )
        for config in CONFIGS
    },
    "gram and channel_mix": composed,
    "relu": lambda q, k, v, t, mask: xk.linear_attention(q, k, v, query_mask=mask, token_mask=mask),
    "softmax": lambda q, k, v, t, mask: xk.linear_attention(
        q, k, v, feature_map="softmax_tokens", normalize=False, token_mask=mask
    ),
}
B, N = torch.export.Dim("B", min=1, max=64), torch.export.Dim("N", min=2, max=4096)


def inputs(batch, tokens):
    torch.manual_seed(batch)
    mask = torch.rand(batch, tokens) < 0.7
    mask[:, 0] = True
    return torch.randn(batch, tokens, 48), mask


def of_this_package(program):
    return [node for node in program.graph.nodes if "xformer_kernels" in str(node.target)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_run_decompositions(name):
    """Programs for any batch size and number of tokens, without the statistics for the backward."""
    module = Attention(FUNCTIONS[name]).eval()
    program = torch.export.export(module, inputs(2, 20), dynamic_shapes=({0: B, 1: N}, {0: B, 1: N}))
    assert of_this_package(program)
    program = program.run_decompositions(torch.export.default_decompositions() | xk.decompositions())
    assert not of_this_package(program)
    assert not [node for node in program.graph.nodes if "full" in str(node.target) and "nan" in str(node.args).lower()]
    for args in (inputs(2, 20), inputs(3, 7)):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*args), module(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [xk.XFA, xk.XFABlock])
@pytest.mark.parametrize("form", ["auto", "gram"])
def test_layers(kind, form):
    module = kind(48, 4, qkv_bias=True, form=form).eval()
    program = torch.export.export(module, (torch.randn(2, 300, 48),), dynamic_shapes=({0: B, 1: N},))
    program = program.run_decompositions(torch.export.default_decompositions() | xk.decompositions())
    assert not of_this_package(program)
    x = torch.randn(3, 200, 48)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def onnx_outputs(module, args, dynamic_shapes, others, path):
    """Outputs of the file that torch.onnx exports from the module, without options of this package."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime runs the files")
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    torch.onnx.export(module, args, path, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, others, strict=True)})


def test_onnx_of_a_replaced_model(tmp_path):
    timm = pytest.importorskip("timm", reason="the model is timm's")
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=7, depth=2, img_size=64).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    assert xk.integrations.replace_attention(model)
    (found,) = onnx_outputs(model, (x[:2],), ({0: torch.export.Dim("B")},), (x,), tmp_path / "m.onnx")
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_onnx_of_a_backbone(tmp_path):
    """Of any number of images and any size that its stride divides."""
    import xformer

    model, x = xformer.xformer_xxs(num_classes=7, zero_init_last=False).eval(), torch.randn(3, 3, 96, 128)
    B, H, W = torch.export.Dim("B"), torch.export.Dim("H", min=2), torch.export.Dim("W", min=2)
    (found,) = onnx_outputs(model, (x[:2, :, :64, :64],), ({0: B, 2: 32 * H, 3: 32 * W},), (x,), tmp_path / "m.onnx")
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def test_onnx_of_functions(tmp_path):
    class All(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Attention(function) for function in FUNCTIONS.values()])

        def forward(self, x, mask):
            return [part(x, mask) for part in self.parts]

    module, others = All().eval(), inputs(3, 33)
    with torch.no_grad():
        expected = module(*others)
    found = onnx_outputs(module, inputs(2, 20), ({0: B, 1: N}, {0: B, 1: N}), others, tmp_path / "m.onnx")
    for y, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(y), other, rtol=1e-4, atol=1e-5)


def test_compiled_graphs_call_the_kernels(need_backend, ran_backend):
    """Also with symbolic shapes; results have the layout that the kernel returns."""
    need_backend("cpp")
    function = torch.compile(
        lambda q, k, v, t: xk.xfa(q, k, v, t) * 2, backend="aot_eager", dynamic=True, fullgraph=True
    )
    for tokens in (20, 33):
        q, k, v = torch.randn(3, 2, 2, 8, tokens).transpose(-1, -2).unbind(0)
        with ran_backend("cpp", "xfa_forward"):
            y = function(q, k, v, torch.ones(2))
        torch.testing.assert_close(y, xk.xfa(q, k, v, torch.ones(2)) * 2)

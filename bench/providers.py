"""What is compared: who computes a workload, and the proof that the result is right.

Each workload has a baseline, ``eager``, which is also run in float64 as the oracle. A provider is timed only after its
output and all gradients have passed the rule of :mod:`xformer_kernels.testing` against the oracle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xformer_kernels as xk
from bench.workloads import LayerShape, ModelShape, OpShape
from xformer_kernels import dispatch, reference
from xformer_kernels.integrations import replace_attention
from xformer_kernels.testing import assert_close, gradient_terms

Function = Callable[..., Tensor]
SDPA_FLOPS = 3e11
"""Softmax attention over tokens is quadratic in their number; above this many FLOPs forward it is left out."""
SDPA_MAP = 2**26
"""The same for layers, in numbers of the map that the check of the gradients holds in float64."""


@dataclass
class Case:
    """One provider at work on one workload."""

    provider: str
    forward: Callable[[], object]
    both: Callable[[], object] | None  # None: this provider is for the forward only
    check: Callable[[], None]


def _gradients(function: Function, inputs: tuple[Tensor, ...], dout: Tensor) -> list[Tensor]:
    """The output, and the gradients of all inputs."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def _compare(
    names: list[str],
    result: list[Tensor],
    eager: list[Tensor],
    oracle: list[Tensor],
    terms: dict[str, Tensor] | None = None,
) -> None:
    for name, got, baseline, exact in zip(names, result, eager, oracle, strict=True):
        assert_close(got, baseline, exact, name, (terms or {}).get(name))


def _compiled(function: Function) -> Function:
    torch.compiler.reset()
    compiled: Function = torch.compile(function, dynamic=False)
    return compiled


# ------------------------------------------------------------------------------------------------------------- operator


def op_cases(shape: OpShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """Inputs are views of a packed projection, as in a layer."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    q, k, v = random(shape.B, shape.N, 3, shape.H, shape.D).permute(2, 0, 3, 1, 4).unbind(0)
    t = torch.linspace(0.7, 1.5, shape.H, device=device)
    dout = random(shape.B, shape.N, shape.H, shape.D).transpose(1, 2)
    tensors = (q, k, v, t)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)

    def case(provider: str, function: Function) -> Case:
        def check() -> None:
            wide = tuple(x.detach().double().requires_grad_() for x in tensors)
            _compare(
                ["out", "dq", "dk", "dv", "dtemperature"],
                _gradients(function, leaves, dout),
                _gradients(reference.xfa, leaves, dout),
                _gradients(reference.xfa, wide, dout.double()),
                gradient_terms(*(x.double() for x in (*tensors, dout))),
            )

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors)

        return Case(provider, forward, lambda: _gradients(function, leaves, dout), check)

    def graph_case(provider: str, replay: Callable[[], Tensor]) -> Case:
        def check() -> None:
            exact = reference.xfa(*(x.double() for x in tensors))
            for _ in range(3):  # torch.compile records at its second call
                got = replay()
            _compare(["out"], [got], [reference.xfa(*tensors)], [exact])

        return Case(provider, replay, None, check)

    if "eager" in wanted:
        yield case("eager", reference.xfa)
    if "compile" in wanted:
        yield case("compile", _compiled(reference.xfa))
    for name in dispatch.BACKENDS:
        if name in wanted and name != "reference" and not dispatch.reasons_against(name, device, (dtype,), (shape.D,)):
            yield case(name, lambda *x, name=name: xk.xfa(*x, backend=name))  # type: ignore[misc]
    if device == "cuda" and shape.B == 1:
        if "compile+graphs" in wanted:
            yield graph_case("compile+graphs", _compiled_into_graph(reference.xfa, tensors))
        for name in ("triton", "cuda"):
            if f"{name}+graphs" in wanted and not dispatch.reasons_against(name, device, (dtype,), (shape.D,)):
                yield graph_case(
                    f"{name}+graphs",
                    _captured(lambda name=name: xk.xfa(*tensors, backend=name)),  # type: ignore[misc]
                )
    if "sdpa" in wanted and 4 * shape.B * shape.H * shape.N**2 * shape.D <= SDPA_FLOPS:
        yield _sdpa_case(leaves[:3], dout)


def _compiled_into_graph(function: Function, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """torch.compile's forward as a CUDA graph, told that its inputs stay where they are: it copies none of them."""
    inputs = tuple(x.detach() for x in inputs)
    for x in inputs:
        torch._dynamo.mark_static_address(x)
    compiled: Function = torch.compile(function, dynamic=False, mode="reduce-overhead")

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(*inputs)

    return run


def _captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The function in a CUDA graph, captured at the first call: what is timed is a replay."""
    graph: torch.cuda.CUDAGraph | None = None
    out = torch.empty(0)

    def replay() -> Tensor:
        nonlocal graph, out
        if graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.no_grad(), torch.cuda.stream(stream):
                function()  # compiles
            torch.cuda.current_stream().wait_stream(stream)
            captured = torch.cuda.CUDAGraph()
            with torch.no_grad(), torch.cuda.graph(captured):
                out = function()
            graph = captured
        graph.replay()
        return out

    return replay


softmax_attention: Function = F.scaled_dot_product_attention


def _sdpa_case(leaves: tuple[Tensor, ...], dout: Tensor) -> Case:
    """Another operator: softmax attention over tokens, at the same shape."""
    rows = torch.arange(0, dout.shape[2], max(1, dout.shape[2] // 16), device=dout.device)

    def check() -> None:
        """A gradient that is zero but in a few queries is that of attention from these queries alone."""
        few = torch.zeros_like(dout)
        few[:, :, rows] = dout[:, :, rows]
        out, dq, dk, dv = _gradients(softmax_attention, leaves, few)

        def explicit(to: torch.dtype) -> list[Tensor]:
            q, k, v = (x.detach().to(to).requires_grad_() for x in (leaves[0][:, :, rows], *leaves[1:]))

            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v

            return _gradients(attention, (q, k, v), dout[:, :, rows].to(to))

        result = [out[:, :, rows], dq[:, :, rows], dk, dv]
        _compare(["out", "dq", "dk", "dv"], result, explicit(out.dtype), explicit(torch.float64))

    plain = tuple(x.detach() for x in leaves)
    return Case(
        "sdpa",
        lambda: softmax_attention(*plain),
        lambda: _gradients(softmax_attention, leaves, dout),
        check,
    )


# --------------------------------------------------------------------------------------------------- layers and models


def layer_cases(shape: LayerShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """timm's XCA with its weights in each provider's layer; SDPA is timm's attention over tokens of the same size."""
    from timm.models.vision_transformer import Attention
    from timm.models.xcit import XCA

    torch.manual_seed(0)
    eager = XCA(shape.C, shape.heads, qkv_bias=True).to(device, dtype)
    x = torch.randn(shape.B, shape.N, shape.C).to(device, dtype)
    yield from _module_cases(eager, x, wanted)
    if "sdpa" in wanted and shape.B * shape.heads * shape.N**2 <= SDPA_MAP:
        attention = Attention(shape.C, shape.heads, qkv_bias=True).to(device, dtype)
        plain = copy.deepcopy(attention)
        plain.__dict__["fused_attn"] = False  # its other way of computing the same
        yield _module_case("sdpa", attention, plain, x)


def model_cases(shape: ModelShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """A timm model before and after replace_attention."""
    model = create_model(shape.name).to(device, dtype)
    x = torch.randn(shape.B, 3, shape.size, shape.size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    yield from _module_cases(model, x, wanted)


def create_model(name: str, pretrained: bool = False) -> nn.Module:
    """A timm model in evaluation mode; untrained ones get layer scales of 0.5, since 1e-6 would hide their layers."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=pretrained).eval()
    if not pretrained:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "gamma" in key:
                    parameter.fill_(0.5)
    return model


def _module_cases(eager: nn.Module, x: Tensor, wanted: set[str]) -> Iterator[Case]:
    if "eager" in wanted:
        yield _module_case("eager", eager, eager, x)
    if "compile" in wanted:
        yield _module_case("compile", eager, eager, x, compiled=True)
    for name in dispatch.BACKENDS:
        if name == "reference" or dispatch.reasons_against(name, x.device.type, (x.dtype,), ()):
            continue
        ours = copy.deepcopy(eager)
        if name in wanted or f"{name}+compile" in wanted:
            replace_attention(ours, backend=name)
        if name in wanted:
            yield _module_case(name, ours, eager, x)
        if f"{name}+compile" in wanted:
            yield _module_case(f"{name}+compile", ours, eager, x, compiled=True)


def _module_case(provider: str, module: nn.Module, baseline: nn.Module, x: Tensor, compiled: bool = False) -> Case:
    leaf = x.detach().requires_grad_()
    dy = torch.randn(module(x).shape, generator=torch.Generator().manual_seed(1)).to(x)
    function = _compiled(module) if compiled else module

    def gradients(module: nn.Module, function: Function, leaf: Tensor, dy: Tensor) -> list[Tensor]:
        y = function(leaf)
        return [y.detach(), *torch.autograd.grad(y, (leaf, *module.parameters()), dy)]

    def check() -> None:
        wide = copy.deepcopy(baseline).double()
        check_gradients(
            ["y", "dx", *(f"d{name}" for name, _ in module.named_parameters())],
            gradients(module, function, leaf, dy),
            gradients(baseline, baseline, leaf, dy),
            gradients(wide, wide, x.double().requires_grad_(), dy.double()),
        )

    def forward() -> object:
        with torch.no_grad():
            return function(x)

    return Case(provider, forward, lambda: gradients(module, function, leaf, dy), check)


def check_gradients(names: list[str], result: list[Tensor], eager: list[Tensor], oracle: list[Tensor]) -> None:
    """The rule for a deep model: the errors of all its layers are in each gradient, so it is judged as a whole.

    The worst error, relative to each tensor's largest number, may be twice the baseline's and a few ulp. Gradients that
    are zero but for rounding are left out. Raises AssertionError.
    """
    largest = max(x.abs().max().item() for x in oracle)

    def worst(tensors: list[Tensor]) -> tuple[float, str]:
        errors = [(0.0, "")]
        for name, x, exact in zip(names, tensors, oracle, strict=True):
            if not x.isfinite().all():
                raise AssertionError(f"{name} is not finite")
            unit = exact.abs().max().item()
            if unit > 1e-12 * largest:
                errors.append((((x.double() - exact).abs().max() / unit).item(), name))
        return max(errors)

    error, where = worst(result)
    allowed = 2 * worst(eager)[0] + 8 * torch.finfo(result[0].dtype).eps
    if not error <= allowed:
        raise AssertionError(f"relative error {error:.2e} of {where} > {allowed:.2e}")

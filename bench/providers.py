"""What is compared: who computes the operator, and the proof that the result is right; modules.py has the layers.

Each workload has a baseline, ``eager``, which is also run in float64 as the oracle. A provider is timed only after its
output and all gradients have passed the rule of :mod:`xformer_kernels.testing` against the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import xformer_kernels as xk
from bench.workloads import OpShape
from xformer_kernels import dispatch, reference
from xformer_kernels.testing import assert_close, gradient_terms

Function = Callable[..., Tensor]
SDPA_FLOPS = 3e11
"""Softmax attention over tokens is quadratic in their number; above this many FLOPs forward it is left out."""


class Errors(NamedTuple):
    """Largest differences to the eager result in the same dtype, relative to each tensor's largest number."""

    output: float
    gradients: float


@dataclass
class Case:
    """One provider at work on one workload."""

    provider: str
    forward: Callable[[], object]
    both: Callable[[], list[Tensor]] | None  # the result and all gradients; None: this provider is for the forward only
    check: Callable[[], Errors | None]
    weights_from: int = 4  # of what `both` gives, the gradients of weights: temperature's is the operator's only one
    form: Callable[[], str] | None = None  # which form a layer takes, to be asked with gradients on or off
    part: bool = False  # of eager, to say its share of it: no provider
    errors: Errors | None = None  # what check found


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


def compiled(function: Function) -> Function:
    torch.compiler.reset()
    result: Function = torch.compile(function, dynamic=False)
    return result


# ------------------------------------------------------------------------------------------------------------- operator


def op_cases(shape: OpShape, dtype: torch.dtype, device: str, wanted: set[str]) -> Iterator[Case]:
    """Inputs are views of a packed projection, as in a layer."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    q, k, v = random(shape.B, shape.N, 3, shape.H, shape.D).permute(2, 0, 3, 1, 4).unbind(0)
    t = torch.linspace(0.7, 1.5, shape.H, device=device)
    dout = random(shape.B, shape.N, shape.H, shape.D).transpose(1, 2)
    tensors = (q, k, v, t)
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    expected: list[tuple[list[Tensor], list[Tensor], dict[str, Tensor]]] = []  # computed once, when first asked for

    def expect() -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """The eager results, the oracle's, and what gradients subtract."""
        if not expected:
            wide = tuple(x.detach().double().requires_grad_() for x in tensors)
            expected.append((
                _gradients(reference.xfa, leaves, dout),
                _gradients(reference.xfa, wide, dout.double()),
                gradient_terms(*(x.double() for x in (*tensors, dout))),
            ))  # fmt: skip
        return expected[0]

    def case(provider: str, function: Function) -> Case:
        def check() -> None:
            names = ["out", "dq", "dk", "dv", "dtemperature"]
            _compare(names, _gradients(function, leaves, dout), *expect())

        def forward() -> object:
            with torch.no_grad():
                return function(*tensors)

        return Case(provider, forward, lambda: _gradients(function, leaves, dout), check)

    def graph_case(provider: str, replay: Callable[[], Tensor]) -> Case:
        def check() -> None:
            for _ in range(3):  # torch.compile records at its second call
                got = replay()
            eager, exact, _terms = expect()
            _compare(["out"], [got], eager[:1], exact[:1])

        return Case(provider, replay, None, check)

    if "eager" in wanted:
        yield case("eager", reference.xfa)
    if "compile" in wanted:
        yield case("compile", compiled(reference.xfa))
    for name in dispatch.names():
        if (
            name in wanted
            and name != "reference"
            and not dispatch.reasons_against(name, device, (dtype,), (shape.D,), "token")
        ):
            yield case(name, lambda *x, name=name: xk.xfa(*x, backend=name))  # type: ignore[misc]
    if device == "cuda" and shape.B == 1:
        if "compile+graphs" in wanted:
            yield graph_case("compile+graphs", _compiled_into_graph(reference.xfa, tensors))
        for name in ("triton", "cuda"):
            if f"{name}+graphs" in wanted and not dispatch.reasons_against(name, device, (dtype,), (shape.D,), "token"):
                yield graph_case(
                    f"{name}+graphs",
                    _captured(lambda name=name: xk.xfa(*tensors, backend=name)),  # type: ignore[misc]
                )
    if "sdpa" in wanted and 4 * shape.B * shape.H * shape.N**2 * shape.D <= SDPA_FLOPS:
        yield _sdpa_case(leaves[:3], dout)
    expected.clear()  # all are checked; what is timed needs the memory


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

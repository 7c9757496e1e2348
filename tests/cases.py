"""Shapes, configurations and inputs of the tests of xfa."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xformer_kernels import reference
from xformer_kernels.spec import Spec
from xformer_kernels.testing import assert_close, gradient_terms

THOROUGH = os.environ.get("XFORMER_KERNELS_THOROUGH", "0") not in ("", "0")
"""Whether tests that are reduced on a push run in full; see .ci/thorough."""

LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW_PRECISION, torch.float64)
RESULTS = ("out", "dq", "dk", "dv", "dtemperature")

# (B, N, H, D)
SHAPES = (
    (1, 1, 1, 1),
    (2, 2, 1, 3),
    (3, 7, 2, 8),
    (2, 17, 3, 5),
    (2, 64, 4, 60),
    (1, 196, 8, 48),
    (2, 131, 2, 33),
    (5, 40, 1, 16),
    (1, 100, 1, 130),
    (1, 29, 2, 257),
    (1, 600, 1, 512),
    (1, 5003, 2, 24),
    (2, 4096, 1, 32),
)
EMPTY_SHAPES = ((0, 5, 2, 4), (2, 0, 3, 4), (0, 0, 1, 1))


@dataclass(frozen=True)
class Config:
    """The mathematical options of a call of xfa."""

    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    eps: float = 1e-12

    @property
    def spec(self) -> Spec:
        return Spec(self.map, self.norm, self.activation, self.eps)

    def kwargs(self) -> dict[str, Any]:
        return {"map": self.map, "norm": self.norm, "activation": self.activation, "eps": self.eps}

    def __str__(self) -> str:
        return f"{self.map}-{self.norm}-{self.activation}"


CONFIGS = tuple(
    Config(map, norm, activation)
    for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
    for norm in ("token", "feature")
)


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _token_contiguous(x: Tensor) -> Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def _padded(x: Tensor) -> Tensor:
    """A view of a larger, oddly aligned buffer filled with NaN: a slice of each dimension, and every other feature."""
    B, H, N, D = x.shape
    buffer = torch.full((B + 1, N + 3, H + 1, 2 * D + 3), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[1:, 2 : N + 2, :H, 1 : 2 * D + 1 : 2].transpose(1, 2)
    view.copy_(x)
    return view


# Each function takes a (B, H, N, D) tensor and returns the same values with other strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "token_major": _token_major,
    "token_contiguous": _token_contiguous,
    "padded": _padded,
}


def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same values as views of one (B, N, 3, H, D) projection."""
    buffer = torch.stack((q, k, v), 2).permute(0, 3, 2, 1, 4).contiguous()
    q, k, v = buffer.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


QKV_LAYOUTS = ("packed", *LAYOUTS)


def lay_out(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return packed(*tensors) if layout == "packed" else tuple(LAYOUTS[layout](t) for t in tensors)


# Layouts of dout: each function takes a (B, H, N, D) tensor and returns dout; the expanded ones have other values.
DOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "sum": lambda x: torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape),
    "mean_of_tokens": lambda x: x[:, :, :1].expand(x.shape) if x.shape[2] else x,
    "per_feature": lambda x: x[:1, :1, :1].expand(x.shape) if x.numel() else x,
}


@dataclass
class Problem:
    """Inputs of one call of xfa and of its backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    temperature: Tensor
    dout: Tensor
    config: Config = field(default_factory=Config)
    token_mask: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The problem with all tensors in another dtype; that of the oracle is `to(torch.float64)`."""
        tensors = (t.to(dtype) for t in (self.q, self.k, self.v, self.temperature, self.dout))
        return Problem(*tensors, self.config, self.token_mask)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leaves that require gradients, with the storage and strides of the problem's tensors."""
        q, k, v, t = (x.detach().requires_grad_() for x in (self.q, self.k, self.v, self.temperature))
        return q, k, v, t

    def run(self, function: Callable[..., Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """The output and all gradients, by name."""
        inputs = self.inputs()
        out = function(*inputs, token_mask=self.token_mask, **self.config.kwargs(), **kwargs)
        grads = torch.autograd.grad(out, inputs, self.dout.to(out.dtype))
        return {"out": out.detach(), **dict(zip(RESULTS[1:], grads, strict=True))}

    def run_cuda(self, backend: Any) -> tuple[dict[str, Tensor], Any, Any]:
        """Results of the functions of the CUDA backend, and the kernels that forward and backward launched."""
        options = (self.token_mask, self.config.spec)
        inputs = (self.q, self.k, self.v, self.temperature)
        out, stats = backend.xfa_forward(*inputs, *options)
        first = backend._cuda.launched()
        dqkv, dtemperature = backend.xfa_backward(self.dout, *inputs, stats, *options)
        second = backend._cuda.launched()
        results = (out.transpose(1, 2), *dqkv.transpose(2, 3).unbind(0), dtemperature)
        return dict(zip(RESULTS, results, strict=True)), first, second

    def eager(self) -> dict[str, Tensor]:
        return self.run(reference.xfa)

    def oracle(self) -> dict[str, Tensor]:
        return self.to(torch.float64).run(reference.xfa)

    def terms(self) -> dict[str, Tensor]:
        p = self.to(torch.float64)
        return gradient_terms(p.q, p.k, p.v, p.temperature, p.dout, **p.config.kwargs(), token_mask=p.token_mask)

    def check(self, result: dict[str, Tensor], names: tuple[str, ...] = RESULTS) -> None:
        """Checks the output and all gradients with :func:`assert_close`."""
        eager, oracle, terms = self.eager(), self.oracle(), self.terms()
        for name in names:
            assert result[name].dtype == eager[name].dtype, f"{name} is {result[name].dtype}"
            assert_close(result[name], eager[name], oracle[name], name, terms.get(name))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(device, dtype)


def random_mask(B: int, N: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """A mask that keeps about two of three tokens, different ones in each sequence."""
    return (torch.rand(B, N, generator=generator(seed)) < 0.66).to(device)


def make_problem(
    shape: tuple[int, int, int, int],
    config: Config | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "packed",
    dout: str = "token_major",
    masked: bool = False,
    temperature_dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """Features have different means and spreads, so that swapped heads, features or tokens are noticed."""
    B, N, H, D = shape
    spread = torch.linspace(0.5, 2.0, H * D, dtype=torch.float64).view(1, H, 1, D)
    base = [randn(B, H, N, D, seed=10 * seed + i, dtype=torch.float64) for i in range(4)]
    q, k, v, g = ((x * spread + 0.1 * spread.flip(3)).to(device, dtype) for x in base)
    q, k, v = lay_out(layout, q, k, v)
    temperature = torch.linspace(0.7, 3.0, H, dtype=torch.float64).to(device, temperature_dtype or dtype)
    mask = random_mask(B, N, seed, device) if masked else None
    return Problem(q, k, v, temperature, DOUTS[dout](g), config or Config(), mask)

"""Draws a case from a seed: sizes, values, strides and options."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from cases import Config, random_mask
from torch import Tensor

T = TypeVar("T")


class Draw:
    """The random parts of one call. Named draws are kept, to describe a call that fails."""

    def __init__(self, seed: int, numbers: int = 0) -> None:
        """`numbers`: selects other values, with the same sizes, strides and options."""
        self.seed = seed
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed((seed + 0x9E3779B1 * numbers) % 2**32)
        self.notes: dict[str, Any] = {}

    def pick(self, name: str, *choices: T) -> T:
        self.notes[name] = value = self.random.choice(choices)
        return value

    def maybe(self, p: float = 0.5) -> bool:
        return self.random.random() < p

    def size(self, name: str, few: Sequence[int], most: int) -> int:
        """Mostly a small size or one of `few`, sometimes any size up to `most`."""
        return self.pick(name, 1, 2, 3, *few, self.random.randint(1, most))

    def batch(self) -> int:
        return self.pick("B", 0, 1, 1, 1, 2, 3)

    def tokens(self) -> int:
        return self.pick("N", 0, 1, 2, 3, 7, 16, 31, 97, 196, 257, 1024, self.random.randint(4, 700))

    def dtype(self) -> torch.dtype:
        return self.pick(
            "dtype", torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64
        )

    def config(self) -> Config:
        return Config(
            self.pick("map", "query_key", "key_value"),
            self.pick("norm", "token", "token", "feature", "none"),
            self.pick("activation", "softmax", "softmax", "identity"),
            self.pick("eps", 1e-12, 1e-12, 1e-6, 1e-3, 0.5),
        )

    def mask(self, B: int, N: int) -> Tensor | None:
        kind = self.pick("mask", None, None, "random", "all", "none of the first image")
        if kind is None:
            return None
        mask = random_mask(B, N, self.random.randint(0, 99)) if kind == "random" else torch.ones(B, N, dtype=torch.bool)
        if kind.startswith("none"):
            mask[:1] = False
        return mask

    def temperature(self, H: int, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """A temperature of any accepted shape and dtype."""
        shape = self.pick("temperature shape", *shapes)
        kind = self.pick("temperature dtype", dtype, dtype, torch.float32, torch.bfloat16, torch.float16, torch.float64)
        numbers = torch.rand(math.prod(shape), generator=self.numbers, dtype=torch.float64) * 3 + 0.2
        return numbers.view(shape).to(kind)

    def values(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """float64 values (..., tokens, features) with a random kind of distribution."""
        x = torch.randn(shape, generator=self.numbers, dtype=torch.float64)
        kind = self.pick(
            f"{name} numbers", "normal", "normal", "scaled", "means", "equal tokens", "zero features", "spread"
        )
        if kind == "scaled":
            x = x * self.pick(f"{name} scale", 1e-3, 0.1, 5.0, 30.0)
        elif kind == "means":
            x = x + self.pick(f"{name} mean", 1.0, 10.0) * torch.randn(
                shape[-1], generator=self.numbers, dtype=torch.float64
            )
        elif kind == "equal tokens" and len(shape) > 1 and shape[-2]:
            x = x[..., :1, :].expand(shape)
        elif kind == "zero features":
            x = x * (torch.rand(shape[-1], generator=self.numbers, dtype=torch.float64) < 0.7)
        elif kind == "spread":
            x = x * torch.logspace(-2, 1, shape[-1], dtype=torch.float64)
        return x

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        """A view with any memory order, steps and offset in a buffer of NaN, or an expanded view."""
        values = self.values(name, shape) if values is None else values
        layout = self.pick(f"{name} layout", "contiguous", "contiguous", "permuted", "strided", "expanded")
        if layout == "contiguous":
            return values.to(dtype).contiguous()
        order = list(range(len(shape)))
        if layout != "expanded":
            self.random.shuffle(order)
        steps = [self.random.choice((1, 1, 2, 3)) if layout == "strided" else 1 for _ in shape]
        strides, extent = [0] * len(shape), 1
        for dim in reversed(order):
            strides[dim] = extent * steps[dim]
            extent *= max(shape[dim], 1) * steps[dim] + (self.random.choice((0, 0, 1, 5)) if layout == "strided" else 0)
        offset = self.random.choice((0, 1, 3, 8))
        view = torch.full((offset + extent,), math.nan, dtype=dtype).as_strided(shape, strides, offset)
        view.copy_(values)
        if layout == "expanded" and 0 not in shape:
            dim = self.random.randrange(len(shape))
            return view.narrow(dim, 0, 1).expand(shape)
        return view

    def gradient(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.pick("gradient", "drawn", "drawn", "sum") == "sum":
            return torch.ones((), dtype=dtype).expand(shape)
        return self.tensor("gradient", shape, dtype, torch.randn(shape, generator=self.numbers, dtype=torch.float64))

    def wanted(self, tensors: dict[str, Any]) -> list[str]:
        """Names of the tensors that require a gradient: all, or some of them."""
        names = [name for name, t in tensors.items() if t is not None]
        some = [name for name in names if self.maybe()] or names[:1]
        return self.pick("wanted", names, some)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.notes.items())

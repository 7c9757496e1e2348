"""Compares replayed launches with those of the same functions without plans, with a driver that launches nothing.

test_replay.py runs this script in a separate process with indices of CASES. It prints the number of compared calls of
each function, the number of Python functions that a call of xfa enters, the number of launches that a hook saw, and
which kernels have asynchronous products.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import host, measure
from xformer_kernels.backends.triton import layer, linear, maps, ops, plan
from xformer_kernels.layer.maps import Rule
from xformer_kernels.spec import Spec

fake = host.install()
B, H, D = 2, 3, 16
FUNCTIONS: dict[str, Any] = {
    **{name: getattr(ops, name) for name in ("xfa_forward", "xfa_backward", "gram", "channel_mix")},
    **{name: getattr(linear, name) for name in ("linear_attention_forward", "linear_attention_backward")},
    "layer_sample": layer.layer_sample,
    "layer_gram": layer.layer_gram,
    "layer_maps": maps._forward,
    "layer_maps_backward": maps._backward,
    "layer_mix": layer._mix,
}
WITHOUT_MASK = ("channel_mix", "layer_mix", "layer_maps", "layer_maps_backward")
SPECS = (Spec(), Spec("key_value", "feature", "identity"), Spec("query_key", "none"))
# dtype, tokens, layout, masked, plan.LONGEST
CASES = (
    ("bfloat16", 700, "packed", True, 256),
    ("bfloat16", 5000, "packed", False, 16384),
    ("float32", 700, "channel-major", True, 256),
    ("float32", 100, "apart", False, 16384),
    ("float64", 100, "packed", True, 16384),
)


def tokens(N: int, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    if layout == "packed":
        x = torch.randn(B, N, 4, H, D).to(dtype).permute(2, 0, 3, 1, 4)
    elif layout == "channel-major":
        x = torch.randn(4, B, H, D, N).to(dtype).transpose(3, 4)
    else:
        x = torch.randn(4, B, H, N, D).to(dtype)
    return list(x.unbind(0))


def calls(dtype: torch.dtype, N: int, layout: str, masked: bool, same: bool) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """`same`: q, k and v are one object."""
    q, k, v, dout = tokens(N, dtype, layout)
    if same:
        k = v = q
    mask = torch.rand(B, N) < 0.5 if masked else None
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    temperature, stats = torch.ones(H), torch.randn(B, H, D * D + 2 * D, dtype=wide)
    for spec in SPECS:
        yield "xfa_forward", (q, k, v, temperature, mask, spec)
        yield "xfa_backward", (dout, q, k, v, temperature, stats, mask, spec, False)
    yield "gram", (q, k, False, mask)
    yield "gram", (q, q, True, mask)
    weight, vector = torch.randn(B, H, D, D).to(dtype), torch.randn(B, H, D).to(dtype)
    yield "channel_mix", (q, weight, vector, k, vector, v, weight)
    yield "channel_mix", (q, weight, None, None, None, None, None)
    yield from layer_calls(dtype, N, mask, same)
    for feature_map in ("relu", "softmax_tokens"):
        spec = Spec.of_linear_attention(feature_map, True, 1.0, 1e-6)
        stats = torch.randn(B, H, spec.statistics(D, D), dtype=wide)
        yield "linear_attention_forward", (q, k, v, mask, mask, spec)
        yield "linear_attention_backward", (dout, q, k, v, stats, mask, mask, spec, False)


def layer_calls(
    dtype: torch.dtype, N: int, mask: torch.Tensor | None, same: bool
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The kernels of a layer of 160 features, more than a tile of layer_gram holds, and heads of 16."""
    C, heads = 160, 10
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    x, dy = (torch.randn(B, 1, N, C).to(dtype) for _ in range(2))
    weight, center = torch.randn(B, 1, C, C, dtype=wide), torch.randn(B, C, dtype=wide)
    again = weight if same else weight.clone()
    yield "layer_sample", (x.squeeze(1), mask, 1e-6)
    yield "layer_gram", (x, x, True, mask, center, 1e-6)
    yield "layer_gram", (dy, x, False, mask, None, None)
    yield "layer_mix", (x, weight, weight[:, :, 0].clone(), dy, None, None, center, 1e-6, False)
    yield "layer_mix", (dy, weight, None, x if same else x.clone(), x, again, center, 1e-6, True)
    keep = torch.rand(B, heads, D, D, dtype=wide) if mask is not None else None
    for map in ("query_key", "key_value"):
        rule = Rule(map, "softmax", 1e-12)
        rows, T = (torch.randn(n, heads, D, C, dtype=wide) for n in (3, B))
        P = torch.randn(B, rule.rows, heads, D, C, dtype=wide)
        vectors = (rows[..., 0].clone(), torch.ones(heads, dtype=wide))
        sums = (center, torch.ones(B, 1, dtype=wide), center if same else center.clone(), keep, rule)
        yield "layer_maps", (P, rows, *vectors, *sums)
        cos, norms = torch.randn(B, heads, D, D, dtype=wide), torch.randn(B, 2, heads, D, dtype=wide)
        yield "layer_maps_backward", (T, T[..., 0].clone(), rows, *vectors, cos, norms, *sums)


def launched(function: Any, args: tuple[Any, ...], memory: list[torch.Tensor]) -> tuple[Any, ...]:
    """The launches of a call and the addresses of its results. Allocations are taken from `memory`, in order."""
    empty, free = torch.empty, iter(list(memory))

    def from_memory(size: Any, **options: Any) -> torch.Tensor:
        t = next(free, None)
        if t is None:
            memory.append(t := empty(size, **options))
        assert (t.shape, t.dtype) == (torch.Size(size), options["dtype"])
        return t

    fake.launches, torch.empty = [], from_memory
    try:
        results = function(*args)
    finally:
        torch.empty = empty
    tensors = [results] if isinstance(results, torch.Tensor) else results
    return fake.launches, [(x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors]


def compare(cases: list[Any]) -> Counter[str]:
    compared: Counter[str] = Counter()
    for name, N, layout, masked, longest in cases:
        case = (getattr(torch, name), N, layout, masked)
        plan.LONGEST, plan.SHORT = longest, min(longest, 4096)
        for function in FUNCTIONS.values():
            function.plans.clear()
        for name, args in calls(*case, same=True):
            FUNCTIONS[name](*args)
        # arguments that were one object are different objects now
        for name, args in calls(*case, same=False):
            function, memory = FUNCTIONS[name], []
            before = dict(function.plans)
            expected, found = launched(function.__wrapped__, args, memory), launched(function, args, memory)
            copies_mask = masked and case[0] is torch.float64 and name not in WITHOUT_MASK
            if copies_mask:  # the temporary copy is not a recorded buffer, so there is no plan
                expected, found = ([launch[:2] for launch in launches] for launches, _ in (expected, found))
            assert expected and found == expected, (case, name, args[-1], found, expected)
            assert function.plans == before, f"{name} was planned again: {case}"
            compared[name] += not copies_mask
        assert not masked or case[0] is not torch.float64 or not any(FUNCTIONS["gram"].plans.values())
    return compared


def hooks() -> int:
    """How many launches of replayed calls a pre-run hook of Triton saw."""
    args = next(args for name, args in calls(torch.bfloat16, 700, "packed", True, False) if name == "gram")
    ops.gram(*args)
    seen: list[str] = []
    ops.gram_kernel.add_pre_run_hook(lambda *_, **__: seen.append("before"))
    ops.gram(*args)
    ops.gram_kernel.pre_run_hooks.clear()
    ops.gram(*args)
    return len(seen)


def python_calls() -> dict[str, int]:
    fake.launches = None
    calls = host.cases(1, 196, 2, 16)
    for call in calls.values():
        call()  # compiles and plans
    return {name: measure.python_calls(call) for name, call in calls.items()}


def asynchronous() -> dict[str, bool]:
    """Whether the kernel that an op launches on sm_90 has wgmma; by the number of features."""
    found = {}
    for features in (64, 128):
        x, weight = (torch.zeros(1, 1, n, features, dtype=torch.bfloat16) for n in (256, features))
        for function, args in ((ops.gram, (x, x, False, None)), (ops.channel_mix, (x, weight, *[None] * 5))):
            function.plans.clear()
            function(*args)
            (planned,) = function.plans.values()
            name = f"{function.__name__} of {features}"
            found[name] = any("wgmma" in step.compiled.asm["ptx"] for step in planned.steps)
    return found


if __name__ == "__main__":
    print(json.dumps([compare([CASES[int(i)] for i in sys.argv[1:]]), python_calls(), hooks(), asynchronous()]))

"""Which of Triton and CUDA C++ ``backend="auto"`` asks first for a call of xfa on a GPU: one table.

No measured results stand behind it: no GPU has run these kernels yet. It says where the CUDA kernels do in one launch
what Triton's do in two or three: few heads, whose tokens fit into the shared memory of a block (or of a cluster of
blocks, from sm_90 on). Everywhere else Triton comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rule(NamedTuple):
    """CUDA comes first from this capability on, for at most so many heads of so many bytes of q."""

    capability: int  # 10 * major + minor
    heads: int  # of all sequences
    head_bytes: int


CUDA_FIRST = (Rule(120, 32, 96 << 10), Rule(90, 32, 256 << 10), Rule(80, 32, 32 << 10))
"""The first rule whose capability the device has is the one that counts."""


def cuda_first(capability: int, heads: int, head_bytes: int) -> bool:
    """Whether the table puts CUDA before Triton."""
    rule = next((rule for rule in CUDA_FIRST if capability >= rule.capability), None)
    return rule is not None and 0 < heads <= rule.heads and head_bytes <= rule.head_bytes


def first_asked(q: Tensor, norm: str) -> str | None:
    """The backend that auto asks before all others, for (B, H, N, D) tokens; None for the usual order.

    In a graph that is compiled for any length the sizes are unknown, and the usual order stands.
    """
    if not q.is_cuda or norm != "token" or torch.compiler.is_compiling() or torch.version.hip is not None:
        return None
    B, H, N, D = q.shape
    major, minor = torch.cuda.get_device_capability(q.device)
    return "cuda" if cuda_first(10 * major + minor, B * H, N * D * q.element_size()) else None

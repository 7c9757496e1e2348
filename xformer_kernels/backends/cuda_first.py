"""Which of Triton and CUDA C++ ``backend="auto"`` tries first for a call of xfa on a GPU, as a table.

Its bounds are not based on measurements. They cover the calls for which the CUDA kernels need one launch and Triton's
two or three: few heads, whose tokens fit into the shared memory of a block (or of a cluster of blocks, from sm_90 on),
so that the host's launch overhead dominates. For all other calls Triton comes first: on an H200, the only GPU on which
both were run, it was faster.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xformer_kernels.spec import Spec


class Rule(NamedTuple):
    """CUDA comes first on devices from `first` to `last`, for at most this many heads, features and bytes per head."""

    first: int  # of compute capability, 10 * major + minor
    last: int
    heads: int  # of all sequences
    features: int
    head_bytes: int  # of q, with features that are padded to 32 or 64


CUDA_FIRST = (
    Rule(80, 80, 32, 64, 12 << 10),  # one block of 163 KiB
    Rule(90, 119, 32, 64, 256 << 10),  # clusters of 227 KiB a block
    Rule(120, 129, 32, 32, 64 << 10),  # clusters of 99 KiB a block
)
"""Within these bounds forward and backward are one launch each; tested on emulated devices."""


def padded(features: int) -> int:
    """Number of columns of the tiles that hold this many features."""
    return 32 if features <= 32 else 64


def cuda_first(capability: int, heads: int, tokens: int, features: int, itemsize: int) -> bool:
    """Whether the table puts CUDA before Triton."""
    head_bytes = tokens * padded(features) * itemsize
    return any(
        rule.first <= capability <= rule.last
        and 0 < heads <= rule.heads
        and features <= rule.features
        and head_bytes <= rule.head_bytes
        for rule in CUDA_FIRST
    )


def comes_first(q: Tensor, spec: Spec) -> bool:
    """Whether auto tries the CUDA kernels before all others, for (B, H, N, D) tokens."""
    if not q.is_cuda or spec.norm != "token" or q.dtype is torch.float64 or torch.version.hip is not None:
        return False
    B, H, N, D = q.shape
    major, minor = torch.cuda.get_device_capability(q.device)
    return cuda_first(10 * major + minor, B * H, N, D, q.element_size())

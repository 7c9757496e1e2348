"""The namespace of the ops.

In a kernel for Hugging Face's Hub (``tools/hub_kernel.py``), a generated module with the same names and a unique
namespace takes the place of this one.
"""

from __future__ import annotations

from typing import Any

import torch

ops: Any = torch.ops.xformer_kernels


def add_op_namespace_prefix(name: str) -> str:
    """``namespace::name``."""
    return f"xformer_kernels::{name}"

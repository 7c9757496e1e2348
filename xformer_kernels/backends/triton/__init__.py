"""GPU kernels in Triton. With ``TRITON_INTERPRET=1`` they run on CPU tensors instead, which is slow and for tests.

Each function has the signature of its op and returns newly allocated tensors. The kernels read any strides in place,
accumulate in fp32 (fp64 for fp64) and sum in an order that depends only on the shapes, the device and the compiled
kernel: the grid is sized to the number of programs that the device runs at the same time, or a small multiple of it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

try:
    import triton
except ImportError as error:
    raise ImportError(f"triton is not installed ({error}); pip install 'xformer-kernels[triton]'") from error

OLDEST = (3, 6)
if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"triton {triton.__version__} is too old: {OLDEST[0]}.{OLDEST[1]} or newer is needed")

from xformer_kernels.backends import precision_of_products, unsupported_numbers  # noqa: E402
from xformer_kernels.backends.triton import launch  # noqa: E402
from xformer_kernels.backends.triton.launch import INTERPRETING  # noqa: E402
from xformer_kernels.backends.triton.layer import layer_gram, layer_mix, layer_sample  # noqa: E402
from xformer_kernels.backends.triton.linear import (  # noqa: E402
    FEATURE_MAPS,
    linear_attention_backward,
    linear_attention_forward,
    takes_linear_attention,
)
from xformer_kernels.backends.triton.maps import (  # noqa: E402
    layer_maps,
    layer_maps_backward,
    takes_layer_maps,
)
from xformer_kernels.backends.triton.ops import channel_mix, gram, xfa_backward, xfa_forward  # noqa: E402
from xformer_kernels.backends.triton.plan import WIDEST  # noqa: E402

__all__ = [
    "FEATURE_MAPS", "NAME", "NORMS", "ONLY_BY_NAME", "channel_mix", "decisions", "gram", "layer_gram", "layer_maps",
    "layer_maps_backward", "layer_mix", "layer_sample", "linear_attention_backward", "linear_attention_forward",
    "takes_layer_maps", "takes_linear_attention", "unsupported", "xfa_backward", "xfa_forward",
]  # fmt: skip

NAME = "triton"
NORMS = ("token", "feature", "none")
ONLY_BY_NAME = (
    "TRITON_INTERPRET is set: interpreted kernels serve calls that ask for triton by name" if INTERPRETING else ""
)


def unsupported(device_type: str, dtypes: Iterable[torch.dtype], head_dims: Iterable[int]) -> list[str]:
    """Every reason why these kernels cannot serve a call. Empty if they can."""
    reasons = []
    if INTERPRETING and device_type != "cpu":
        reasons.append(f"TRITON_INTERPRET is set: kernels are interpreted, on CPU tensors only, got {device_type}")
    elif not INTERPRETING and device_type != "cuda":
        reasons.append(
            f"tensors are on {device_type}, the kernels run on cuda (on cpu under TRITON_INTERPRET=1, for tests)"
        )
    if not INTERPRETING and device_type == "cuda":
        reasons += _of_device()
    return reasons + unsupported_numbers(dtypes, head_dims, WIDEST)


def decisions(tokens: dict[str, torch.Tensor]) -> list[str]:
    first = next(iter(tokens.values()))
    tf32 = launch.tokens_precision(first.dtype, launch.target(first.device).arch) == "tf32"
    apart = [name for name, t in tokens.items() if not launch.side_by_side(t)]
    loads = [f"{', '.join(apart)}: features lie apart in memory and are loaded one by one"] if apart else []
    return precision_of_products(first.dtype, tf32) + loads


def _of_device() -> list[str]:
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device"]
    if torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability()
        if major < 8:
            return [f"the device is of compute capability {major}.{minor}, the kernels need 8.0 or newer"]
    return []

"""All private PyTorch APIs that this package uses, each with the reason why no public API suffices."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import _decomp
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.nn.modules import module as _module

# Whether a TorchDispatchMode or TorchFunctionMode, a transform of torch.func or torch.jit.trace is active. No public
# API tells, and going through the dispatcher, which handles them, costs as much as a small kernel.
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
transform = torch._C._functorch.peek_interpreter_stack
tracing_state = torch._C._get_tracing_state

# Tensors of torch.autograd.grad(is_grads_batched=True): their type is Tensor, but their memory holds the whole batch.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# Dispatch key guards for our ops' kernels: torch.library provides them for whole ops, not for kernels of single keys.
below_autograd = torch._C._AutoDispatchBelowAutograd
without_autocast_key = torch._C._DisableAutocast

GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
"""Global module hooks: fusing a module must not skip them, and no public API lists them."""


def calls_more_than_forward(module: Any) -> bool:
    """Whether calling a module runs its own hooks or the result of ``module.compile()``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
    )


def forward_ad_is_on() -> bool:
    """Whether ``torch.autograd.forward_ad.dual_level`` is active; no public API tells."""
    return _forward_ad._current_level >= 0


def profiler_is_on() -> bool:
    """Whether torch.profiler is recording; it only sees dispatched ops."""
    return _profiler._is_profiler_enabled


def decompose_in_onnx(overload: Any, function: Any, fake: Any) -> None:
    """Registers the decomposition of an op in the table that torch.onnx reads; there is no public API for it.

    With symbolic shapes, fake tensors prefer a decomposition to the op's fake, unless there is a meta function.
    """
    _decomp.decomposition_table[overload] = function
    _decomp.meta_table[overload] = fake


def process_group(name: str) -> Any:
    """The process group with this name; op schemas can hold names, but not groups."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def device_types(group: Any) -> list[str]:
    """The device types that a process group supports, sorted."""
    return sorted(device.type for device in group._device_types)

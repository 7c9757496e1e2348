"""Everything private of PyTorch that this package uses, each with the reason why nothing public will do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import _decomp
from torch.autograd import forward_ad as _forward_ad
from torch.autograd import profiler as _profiler
from torch.nn.modules import module as _module

# Whether a TorchDispatchMode or TorchFunctionMode, a transform of torch.func or torch.jit.trace has to see a call.
# Nothing public tells, and a trip through the dispatcher, which would ask them, costs as much as a small kernel.
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
transform = torch._C._functorch.peek_interpreter_stack
tracing_state = torch._C._get_tracing_state

# Tensors of torch.autograd.grad(is_grads_batched=True): their type is Tensor, and their memory is that of many.
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# Guards for kernels of our own ops: torch.library gives them to ops that it registers whole, not to single keys.
below_autograd = torch._C._AutoDispatchBelowAutograd
without_autocast_key = torch._C._DisableAutocast

GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)
"""Hooks of all modules: fusing a module must not pass them over, and there is no public list of them."""


def calls_more_than_forward(module: Any) -> bool:
    """Whether calling a module runs hooks of its own, or what ``module.compile()`` has made."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
    )


def forward_ad_is_on() -> bool:
    """Whether code runs under ``torch.autograd.forward_ad.dual_level``, which has no public question."""
    return _forward_ad._current_level >= 0


def profiler_is_on() -> bool:
    """Whether torch.profiler records: it sees only what the dispatcher calls."""
    return _profiler._is_profiler_enabled


def decompose_in_onnx(overload: Any, function: Any, fake: Any) -> None:
    """Registers the decomposition of an op for torch.onnx, which reads this table and has no public function for it.

    With symbolic shapes, fake tensors prefer a decomposition to the fake of the op, unless there is a meta function.
    """
    _decomp.decomposition_table[overload] = function
    _decomp.meta_table[overload] = fake


def process_group(name: str) -> Any:
    """The group of a name, which is what the schema of an op can hold."""
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


def device_types(group: Any) -> list[str]:
    """Of what a process group can communicate, sorted."""
    return sorted(device.type for device in group._device_types)

"""Token parallelism with other parts of torch: modules under DDP, FSDP2 and by hand, and calls under transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from cases import randn
from rank_cases import Case
from torch import Tensor

import xformer_kernels as xk


def network(seed: int = 0) -> torch.nn.Module:
    """A module with weights before and after the attention, whose forward takes (x, group)."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(24, 24)
            self.block = xk.XFABlock(24, 3, qkv_bias=True, layer_scale=0.5, form="gram")
            self.attn = xk.XFA(24, 3, form="direct")

        def forward(self, x: Tensor, group: Any = None) -> Tensor:
            return self.attn(self.block(self.first(x), group=group), group=group)

    torch.manual_seed(seed)
    return Network().double()


def network_input() -> tuple[Tensor, Tensor]:
    return randn(2, 30, 24, seed=31, dtype=torch.float64), randn(2, 30, 24, seed=32, dtype=torch.float64)


def mine(t: Tensor, rank: int, ranks: int, even: bool = False) -> Tensor:
    sizes = [t.shape[1] // ranks] * ranks if even else {2: [21, 9], 3: [21, 0, 9]}[ranks]
    return t.split(sizes, 1)[rank]


def grads_of(module: torch.nn.Module) -> dict[str, Tensor]:
    def whole(t: Any) -> Tensor:
        return (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()

    return {name.removeprefix("module."): whole(p.grad) for name, p in module.named_parameters()}


def ddp_sum(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The loss is a sum over tokens, multiplied by the number of ranks since DDP divides by it."""
    model = torch.nn.parallel.DistributedDataParallel(network())
    x, target = (mine(t, rank, ranks) for t in network_input())
    ((model(x, group=group) - target).square().sum() * ranks).backward()
    return grads_of(model)


def ddp_mean(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The loss is a mean over tokens, and all ranks have equally many: no correction is needed."""
    model = torch.nn.parallel.DistributedDataParallel(network())
    x, target = (mine(t, rank, ranks, even=True) for t in network_input())
    (model(x, group=group) - target).square().mean().backward()
    return grads_of(model)


def fsdp(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    model = network()
    for module in (model.block, model.attn, model):
        fully_shard(module, mesh=mesh)
    x, target = (mine(t, rank, ranks) for t in network_input())
    ((model(x, group=group) - target).square().sum() * ranks).backward()
    return grads_of(model)


def fsdp_of_the_layer(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The layer in the block is sharded separately: the block then calls the layer and its norm as modules."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (ranks,))
    model = network()
    for module in (model.block.attn, model):
        fully_shard(module, mesh=mesh)
    x, target = (mine(t, rank, ranks) for t in network_input())
    ((model(x, group=group) - target).square().sum() * ranks).backward()
    return grads_of(model)


def by_hand(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    model = network()
    x, target = (mine(t, rank, ranks) for t in network_input())
    (model(x, group=group) - target).square().sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
    return grads_of(model)


def checkpointed(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The backward repeats the forward with its collectives, on all ranks."""
    from torch.utils.checkpoint import checkpoint

    model = network()
    x, target = (mine(t, rank, ranks) for t in network_input())
    (checkpoint(model, x, group, use_reentrant=False) - target).square().sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
    return grads_of(model)


def compiled(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """Under torch.compile the call is a graph break; with fullgraph=True it is refused."""
    model = network()
    x, target = (mine(t, rank, ranks) for t in network_input())
    function = torch.compile(model, backend="eager")
    (function(x, group) - target).square().sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
    try:
        torch.compile(network(), backend="eager", fullgraph=True)(x, group)
    except Exception as error:
        assert "ranks compare their arguments at run time" in str(error), str(error)
    else:
        raise AssertionError("compiled as one graph")
    return grads_of(model)


def exported(group: Any) -> Any:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return case.call(x, weights, group=group)

    case = Case()
    x, _, weights, _ = case.inputs()
    return torch.export.export(Module(), (x,), strict=False)


def twice(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """Gradients of the squared gradients of the tokens, in the direct form."""
    case = Case("direct", dtype=torch.float64, split=((40, 27), (31, 0, 36)))
    x, dout, weights, _ = case.inputs()
    x, dout = (t.split(case.shards(ranks), 1)[rank] for t in (x, dout))
    return second(lambda x, w: case.call(x, w, group=group), x, dout, weights)


def second(function: Any, x: Tensor, dout: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    leaves = {name: t.clone().requires_grad_() for name, t in weights.items()}
    (g,) = torch.autograd.grad((function(x, leaves) * dout).sum(), x, create_graph=True)
    names = [name for name in leaves if name != "proj_bias"]
    grads = torch.autograd.grad(g.square().sum(), (x, *(leaves[name] for name in names)))
    return dict(zip(("dx", *names), grads, strict=True))


def autocast(rank: int, ranks: int, group: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Our results and those of one process, under bfloat16 autocast, for both forms."""
    pairs = {}
    for form in ("gram", "direct"):
        case = Case(form, block=True)
        x, _, weights, _ = case.inputs()
        with torch.autocast("cpu", torch.bfloat16):
            ours = case.call(x.split(case.shards(ranks), 1)[rank], weights, group=group)
            alone = case.call(x, weights)
        pairs[form] = ours, alone.split(case.shards(ranks), 1)[rank]
    return pairs


def no_gradient_of_some_tokens(rank: int, ranks: int, group: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients of weights if the tokens of the first rank require none: their sums, and those of one process."""
    pairs = {}
    for form in ("gram", "direct"):
        case = Case(form, dtype=torch.float64)
        x, _, weights, _ = case.inputs()
        leaves = [t.requires_grad_() for t in weights.values()]
        strip = x.split(case.shards(ranks), 1)[rank].clone().requires_grad_(rank > 0)
        ours = torch.autograd.grad(case.call(strip, weights, group=group).square().sum(), leaves)
        alone = torch.autograd.grad(case.call(x, weights).square().sum(), leaves)
        for name, a, b in zip(weights, ours, alone, strict=True):
            dist.all_reduce(a, group=group)
            pairs[f"{form} {name}"] = a, b
    return pairs


PAIRS = {f.__name__: f for f in (autocast, no_gradient_of_some_tokens)}
MODELS = {f.__name__: f for f in (ddp_sum, ddp_mean, fsdp, fsdp_of_the_layer, by_hand, checkpointed)}

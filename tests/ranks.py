"""What the processes of tests/test_parallel.py do: one rank each, all cases, results in a file.

python tests/ranks.py RANK RANKS FOLDER
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import randn
from torch import Tensor

import xformer_kernels as xk
from xformer_kernels import reference

LAYER_WEIGHTS = ("qkv_weight", "qkv_bias", "temperature", "proj_weight", "proj_bias")
BLOCK_WEIGHTS = (*LAYER_WEIGHTS, "ln_weight", "ln_bias", "layer_scale")
SEED = 11
WAIT = timedelta(seconds=15)


@dataclass(frozen=True)
class Case:
    """One call whose tokens are split: `split` by number of ranks."""

    form: str = "gram"
    map: str = "query_key"
    norm: str = "token"
    activation: str = "softmax"
    dtype: torch.dtype = torch.float32
    weights: torch.dtype | None = None
    masked: bool = False
    dropout_p: float = 0.0
    block: bool = False
    B: int = 2
    C: int = 24
    H: int = 3
    split: tuple[tuple[int, ...], ...] = ((40, 27), (31, 5, 31))
    only: int = 0

    @property
    def choices(self) -> dict[str, Any]:
        return {"map": self.map, "norm": self.norm, "activation": self.activation}

    def shards(self, ranks: int) -> tuple[int, ...]:
        return self.split[ranks - 2]

    def __str__(self) -> str:
        parts = [self.form, self.map, self.norm, self.activation, str(self.dtype).removeprefix("torch.")]
        parts += ["masked"] * self.masked + ["dropout"] * bool(self.dropout_p) + ["block"] * self.block
        parts += ["empty"] * (0 in self.split[0]) + ["narrow"] * (self.weights == self.dtype) + [f"C{self.C}"]
        return "-".join(parts)

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """x, dout, weights by name and mask, of all tokens, the same on every rank."""
        N, C = sum(self.split[0]), self.C
        dtype = self.weights or reference.accumulate_dtype(self.dtype)
        spread = torch.linspace(0.5, 1.5, C, dtype=torch.float64)
        x = (randn(self.B, N, C, seed=1, dtype=torch.float64) * spread + spread.flip(0)).to(self.dtype)
        weights = {
            "qkv_weight": randn(3 * C, C, seed=2, dtype=torch.float64) * C**-0.5,
            "qkv_bias": randn(3 * C, seed=3, dtype=torch.float64) * 0.3,
            "temperature": torch.linspace(0.7, 2.0, self.H, dtype=torch.float64),
            "proj_weight": randn(C, C, seed=4, dtype=torch.float64) * C**-0.5,
            "proj_bias": randn(C, seed=5, dtype=torch.float64),
        }
        if self.block:
            weights["ln_weight"] = spread
            weights["ln_bias"] = randn(C, seed=6, dtype=torch.float64) * 0.2
            weights["layer_scale"] = spread.flip(0)
        mask = torch.rand(self.B, N, generator=torch.Generator().manual_seed(7)) < 0.7 if self.masked else None
        dout = randn(self.B, N, C, seed=8, dtype=torch.float64).to(self.dtype)
        return x, dout, {name: t.to(dtype) for name, t in weights.items()}, mask

    def run(self, group: Any, rank: int, ranks: int) -> dict[str, Tensor]:
        """This rank's output, gradient of tokens and gradients of weights."""
        sizes = self.shards(ranks)
        x, dout, weights, mask = self.inputs()
        x, dout = (t.split(sizes, 1)[rank].clone() for t in (x, dout))
        mask = None if mask is None else mask.split(sizes, 1)[rank]
        x.requires_grad_()
        leaves = {name: t.requires_grad_() for name, t in weights.items()}
        torch.manual_seed(SEED + rank)
        out = self.call(x, leaves, token_mask=mask, group=group)
        grads = torch.autograd.grad(out, (x, *leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(("dx", *leaves), grads, strict=True))}

    def call(self, x: Tensor, w: dict[str, Tensor], **kwargs: Any) -> Tensor:
        layer = [w[name] for name in LAYER_WEIGHTS]
        choices = {**self.choices, "form": self.form, "dropout_p": self.dropout_p, **kwargs}
        if self.block:
            return xk.xfa_block(
                x, w["ln_weight"], w["ln_bias"], 1e-6, *layer, layer_scale=w["layer_scale"], **choices
            )  # fmt: skip
        return xk.xfa_layer(x, *layer, **choices)

    def by_reference(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The same names from one process; all in `dtype`, or in the case's own if None."""
        x, dout, weights, mask = self.inputs()
        x, dout = (t.to(dtype or t.dtype).requires_grad_(t is x) for t in (x, dout))
        leaves = {name: t.to(dtype or t.dtype).requires_grad_() for name, t in weights.items()}
        cast = {name: t.to(x.dtype) for name, t in leaves.items()}
        choices = dict(self.choices, token_mask=mask)
        if self.dropout_p:
            torch.manual_seed(SEED)
            D = self.C // self.H
            wide = reference.accumulate_dtype(self.dtype)
            keep = F.dropout(torch.ones(self.B, self.H, D, D, dtype=wide), self.dropout_p)
            choices["map_fn"] = lambda S: reference.activate(S, self.map, self.activation) * keep
        function = reference.xfa_block if self.block else reference.xfa_layer
        out = function(x, *cast.values(), **choices)
        grads = torch.autograd.grad(out, (x, *leaves.values()), dout)
        return {"out": out.detach(), **dict(zip(("dx", *leaves), grads, strict=True))}


EMPTY = ((0, 67), (33, 0, 34))
CASES = (
    *(
        Case(form, map, "token", activation)
        for form in ("gram", "direct")
        for map, activation in (("query_key", "softmax"), ("query_key", "identity"), ("key_value", "softmax"))
    ),
    Case("direct", norm="feature"),
    Case("direct", "key_value", norm="feature", masked=True),
    Case("direct", norm="feature", masked=True, dtype=torch.float16, dropout_p=0.2),
    *(Case(form, masked=True, block=True, split=EMPTY) for form in ("gram", "direct")),
    *(Case(form, "key_value", block=True, split=EMPTY) for form in ("gram", "direct")),
    *(Case(form, dropout_p=0.3, block=block) for form, block in (("gram", True), ("direct", False))),
    *(Case(form, dtype=torch.float64, masked=True, block=True) for form in ("gram", "direct")),
    *(Case(form, dtype=torch.bfloat16, block=True) for form in ("gram", "direct")),
    *(Case(form, dtype=torch.bfloat16, weights=torch.bfloat16, split=EMPTY) for form in ("gram", "direct")),
    # each rank alone would take another form
    Case("auto", B=1, C=64, H=2, split=((3, 4000), (3, 4000, 0))),
)


# ------------------------------------------------------------------------------------------------------- errors


@dataclass(frozen=True)
class Refusal:
    """A call that every rank refuses: `call` from the rank, the ranks and a group of them all."""

    call: Callable[[int, int, Any], Any]
    types: tuple[type[Exception], ...]
    words: str
    """In the message of at least one rank, in lower case."""


def _differ(**other: Any) -> Callable[[int, int, Any], Any]:
    """The last rank calls with something else than the others."""

    def call(rank: int, ranks: int, group: Any) -> Any:
        changes = dict(other) if rank == ranks - 1 else {}
        case = Case(**{"form": "auto", **changes.pop("case", {})})
        x, _, weights, _ = case.inputs()
        x = x[: changes.pop("B", case.B), :9]
        x = changes.pop("x", lambda x: x)(x)
        weights = changes.pop("weights", lambda w: w)(weights)
        return case.call(x, weights, group=group, **changes)

    return call


def _module(change: Callable[[torch.nn.Module], Any], block: bool, C: int = 24) -> Callable[[int, int, Any], Any]:
    """Modules whose last rank's is changed and has tokens of C features."""

    def call(rank: int, ranks: int, group: Any) -> Any:
        module = (xk.XFABlock if block else xk.XFA)(24, 3)
        last = rank == ranks - 1
        if last:
            change(module)
        return module(torch.randn(1, 4, C if last else 24), group=group)

    return call


def _cuda_only(rank: int, ranks: int, group: Any) -> Any:
    return Case().call(*Case().inputs()[0:3:2], group=_extra["cuda"])


def _twice_backward(rank: int, ranks: int, group: Any) -> Any:
    case = Case()
    x, _, weights, _ = case.inputs()
    x.requires_grad_()
    (g,) = torch.autograd.grad(case.call(x, weights, group=group).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)


VALUE, TYPE = (ValueError,), (TypeError,)
BOTH = (TypeError, ValueError)
_extra: dict[str, Any] = {}
REFUSALS = {
    "no group": Refusal(lambda r, n, g: Case().call(*Case().inputs()[0:3:2], group="world"), TYPE, "got str"),
    "backend of another device": Refusal(_cuda_only, VALUE, "for tensors on cuda, and x is on cpu"),
    "x elsewhere on one rank": Refusal(_differ(x=lambda x: x.to("meta")), VALUE, "x is on meta"),
    "no tensor on one rank": Refusal(_differ(x=lambda x: x.tolist()), BOTH, "x must be a torch.tensor"),
    "C": Refusal(_differ(case={"C": 30}), VALUE, "agree on c, and they do not: [24, "),
    "heads": Refusal(_differ(case={"H": 4}), VALUE, "agree on the number of heads, and they do not: [3, "),
    "B": Refusal(_differ(B=1), VALUE, "agree on the number of images b, and they do not: [2, "),
    "dtype": Refusal(_differ(case={"dtype": torch.bfloat16}), VALUE, "agree on dtype"),
    "map": Refusal(_differ(case={"map": "key_value"}), VALUE, "agree on map"),
    "activation": Refusal(_differ(case={"activation": "identity"}), VALUE, "agree on map, norm, activation"),
    "form": Refusal(_differ(case={"form": "direct"}), VALUE, "form"),
    "eps": Refusal(_differ(eps=1e-6), VALUE, "eps"),
    "dropout": Refusal(_differ(dropout_p=0.5), VALUE, "dropout_p"),
    "layer or block": Refusal(_differ(case={"block": True}), VALUE, "which weights are none"),
    "bias": Refusal(_differ(weights=lambda w: {**w, "qkv_bias": None}), VALUE, "which weights are none"),
    "gradients": Refusal(_differ(x=lambda x: x.requires_grad_()), VALUE, "which gradients are wanted"),
    "a shape on one rank": Refusal(
        _differ(weights=lambda w: {**w, "proj_weight": w["proj_weight"][:, 1:]}), VALUE, "proj_weight must have shape"
    ),
    "a mask on one rank": Refusal(_differ(token_mask=torch.ones(2, 3).bool()), VALUE, "token_mask must have shape"),
    "an unknown map on one rank": Refusal(_differ(case={"map": "key_query"}), VALUE, "map must be one of"),
    "C of a module": Refusal(_module(lambda m: None, False, 25), VALUE, "c = 25"),
    "C of a block": Refusal(_module(lambda m: None, True, 25), VALUE, "c = 25"),
    "hooks on one rank": Refusal(
        _module(lambda m: m.qkv.register_forward_hook(print), False), VALUE, "no plain torch.nn.linear"
    ),
    "Gram form, differentiated twice": Refusal(_twice_backward, (NotImplementedError,), "second derivatives"),
}


# ------------------------------------------------------------------------------------------------ whole modules


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
    """The loss is a sum over tokens: times the number of ranks, which DDP divides by."""
    model = torch.nn.parallel.DistributedDataParallel(network())
    x, target = (mine(t, rank, ranks) for t in network_input())
    ((model(x, group=group) - target).square().sum() * ranks).backward()
    return grads_of(model)


def ddp_mean(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """The loss is a mean over tokens and all ranks have as many: nothing to do."""
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
    """The layer in the block is sharded by itself: the block then calls it and its norm as modules."""
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
    """Forward once more in backward, and its collectives with it, on all ranks alike."""
    from torch.utils.checkpoint import checkpoint

    model = network()
    x, target = (mine(t, rank, ranks) for t in network_input())
    (checkpoint(model, x, group, use_reentrant=False) - target).square().sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, group=group)
    return grads_of(model)


def compiled(rank: int, ranks: int, group: Any) -> dict[str, Tensor]:
    """Under torch.compile the call is between the graphs; without breaks in the graph it is refused."""
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
    """Gradients of the squared gradients of the tokens, direct form."""
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
    """Ours and that of one process, in bfloat16 by autocast, for both forms."""
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
    """Gradients of weights where the first rank's tokens want none: their sums, and those of one process."""
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


# ---------------------------------------------------------------------------------------------- bytes on the wire


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes of the tensors given to collectives, by the name of the collective."""
    seen: dict[str, int] = {}
    real = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast")}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = args[1:2] if name == "all_gather" else args[:1]
            seen[name] = seen.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, counting(name))
    try:
        yield seen
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


COUNTED = {
    "gram": Case("gram"),
    "direct": Case("direct"),
    "gram of more tokens": Case("gram", split=((400, 27), (310, 5, 112))),
    "gram, bfloat16": Case("gram", dtype=torch.bfloat16),
    "gram, dropout": Case("gram", dropout_p=0.1),
}


def count(case: Case, rank: int, ranks: int, group: Any) -> dict[str, int]:
    with counted() as seen:
        case.run(group, rank, ranks)
    return seen


# -------------------------------------------------------------------------------------------------------- the rank


def attempt(function: Callable[[], Any]) -> dict[str, Any]:
    """The result or the error, and the seconds it took; nothing is run any more once ranks have waited in vain."""
    if _waited_in_vain:
        return {"error": "not run", "words": _waited_in_vain[0], "trace": _waited_in_vain[0], "seconds": 0.0}
    start = time.monotonic()
    try:
        outcome = {"result": function()}
    except Exception as error:
        outcome = {"error": type(error).__name__, "words": str(error), "trace": traceback.format_exc()}
        if "imed out" in str(error) or "closed by peer" in str(error):
            _waited_in_vain.append("after " + outcome["trace"])
    return {**outcome, "seconds": time.monotonic() - start}


_waited_in_vain: list[str] = []


def in_step(group: Any, rank: int, ranks: int) -> bool:
    """Whether the ranks still hear each other in the order in which they speak."""
    if _waited_in_vain:
        return False
    t = torch.tensor([rank])
    dist.all_reduce(t, group=group)
    return t.item() == ranks * (ranks - 1) // 2


def refused(refusal: Refusal, rank: int, ranks: int, group: Any) -> dict[str, Any]:
    return {**attempt(lambda: refusal.call(rank, ranks, group)), "in_step": in_step(group, rank, ranks)}


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=WAIT)
    world = dist.group.WORLD
    _extra["cuda"] = dist.new_group(backend="cuda:gloo")
    results: dict[str, Any] = {}
    for case in CASES:
        results[f"case {case}"] = attempt(lambda case=case: case.run(world, rank, ranks))
    for name, refusal in REFUSALS.items():
        results[f"refusal {name}"] = refused(refusal, rank, ranks, world)
    for name, model in MODELS.items():
        results[f"model {name}"] = attempt(lambda model=model: model(rank, ranks, world))
    for name, function in PAIRS.items():
        results[f"pairs {name}"] = attempt(lambda function=function: function(rank, ranks, world))
    for name, case in COUNTED.items():
        results[f"count {name}"] = attempt(lambda case=case: count(case, rank, ranks, world))
    results["twice"] = attempt(lambda: twice(rank, ranks, world))
    if ranks == 2:
        results["model compiled"] = attempt(lambda: compiled(rank, ranks, world))
        results["exported"] = attempt(lambda: exported(world))
    if ranks == 3:
        pair = dist.new_group([0, 2])
        place = {0: 0, 2: 1}.get(rank)
        results["pair"] = attempt(lambda: Case().run(pair, 0 if place is None else place, 2))
    torch.save(results, folder / f"{rank}.pt")
    if not _waited_in_vain:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""Model of the launches: how often each tensor of N tokens is read and written, and how many products are computed.

It serves to compare plans and to document the kernels. The tests compare it byte for byte with the loads, stores and
products of the kernels in Triton's interpreter. The model counts requests: repeated reads by the same program, or by
programs that run at the same time, are usually served by a cache.
"""

from __future__ import annotations

from typing import NamedTuple

from xformer_kernels.backends.triton import configs, plan


class Traffic(NamedTuple):
    """How often all B H N D elements of a tensor are read and written; number of products of B H N D^2 terms each."""

    reads: dict[str, int]
    writes: dict[str, int]
    products: int

    def over_least(self, least: int) -> float:
        """Elements moved, relative to the minimum of `least` tensors of B H N D elements: 4 forward, 7 backward."""
        return (sum(self.reads.values()) + sum(self.writes.values())) / least


def _gram(a: str, b: str, squares_of: str, D: int, side: int, norm_a: bool, norm_b: bool) -> dict[str, int]:
    """Reads of a Gram pass in tiles of `side` features."""
    tiles = plan.cdiv(D, side)
    reads = dict.fromkeys((a, b), tiles)
    if squares_of:
        reads[squares_of] = reads.get(squares_of, 0) + tiles
    for name, normalised in ((a, norm_a), (b, norm_b)):
        if normalised and tiles > 1:
            # each tile needs the norms of whole tokens
            reads[name] += tiles * tiles
    return reads


def _sum(*reads: dict[str, int]) -> dict[str, int]:
    return {name: sum(x.get(name, 0) for x in reads) for name in dict.fromkeys(name for x in reads for name in x)}


def forward(D: int, key_value: bool, token_norm: bool, gram: configs.Config, apply: configs.Config | None) -> Traffic:
    """xfa forward, in one launch if `apply` is None."""
    side = configs.block(D) if apply is None else min(gram.block_o, configs.block(D))
    x, b = ("q", "v") if key_value else ("v", "q")
    squares_of = "q" if key_value and token_norm else ""
    first = _gram("k", b, squares_of, D, side, not token_norm, not token_norm and not key_value)
    second = {x: 1 if apply is None else plan.cdiv(D, apply.block_o)}
    return Traffic(_sum(first, second), {"out": 1}, 2)


def backward(D: int, key_value: bool, token_norm: bool, gram: configs.Config, gradients: configs.Config) -> Traffic:
    """xfa backward: the Gram pass of x and dout, and the pass that computes dq, dk and dv."""
    x = "q" if key_value else "v"
    norm_x = key_value and not token_norm
    first = _gram(x, "dout", "", D, min(gram.block_o, configs.block(D)), norm_x, False)
    block = configs.block(D)
    whole, one_tile = gradients.block_k >= block, gradients.block_o >= block
    tiles = plan.cdiv(D, gradients.block_o)
    # dq and dk compute their product twice if they first need the component along each token
    passes = 1 if token_norm else 2
    mixed = {"dq": "dout", "dk": "v", "dv": "k"} if key_value else {"dq": "k", "dk": "q", "dv": "dout"}
    second = dict.fromkeys(("q", "k", "dout", *(["v"] if key_value else [])), 0)
    for name in second:
        second[name] += whole or (name in "qk" and (one_tile or not token_norm))
    for gradient, name in mixed.items():
        times = 1 if gradient == "dv" else passes
        if not whole:
            second[name] += tiles * times
        if gradient != "dv" and not one_tile:
            second[gradient[1:]] += times
    return Traffic(_sum(first, second), dict.fromkeys(("dq", "dk", "dv"), 1), 1 + 2 * passes + 1)

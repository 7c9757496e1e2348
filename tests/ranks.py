"""Script of the processes of tests/test_parallel.py: runs all cases as one rank, and saves the results to a file.

python tests/ranks.py RANK RANKS FOLDER
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import CASES, Case
from rank_modules import MODELS, PAIRS, compiled, exported, twice
from rank_refusals import EXTRA, REFUSALS, Refusal

WAIT = timedelta(seconds=15)


# ------------------------------------------------------------------------------------------ bytes of collectives


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts the bytes of the tensors passed to collectives, by the name of the collective."""
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
    """The result or the error, and the seconds that it took. After a timeout of a collective nothing more is run."""
    if _timed_out:
        return {"error": "not run", "words": _timed_out[0], "trace": _timed_out[0], "seconds": 0.0}
    start = time.monotonic()
    try:
        outcome = {"result": function()}
    except Exception as error:
        outcome = {"error": type(error).__name__, "words": str(error), "trace": traceback.format_exc()}
        if "imed out" in str(error) or "closed by peer" in str(error):
            _timed_out.append("after " + outcome["trace"])
    return {**outcome, "seconds": time.monotonic() - start}


_timed_out: list[str] = []


def in_step(group: Any, rank: int, ranks: int) -> bool:
    """Whether the collectives of the ranks are still in the same order."""
    if _timed_out:
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
    EXTRA["cuda"] = dist.new_group(backend="cuda:gloo")
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
    if not _timed_out:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

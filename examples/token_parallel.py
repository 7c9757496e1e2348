"""Attention over one image whose tokens are split over ranks: each makes, holds and attends from a strip of rows.

    torchrun --nproc-per-node 2 examples/token_parallel.py
    python examples/token_parallel.py --ranks 2                     starts its processes itself

A step of training, forward and backward, of an XFABlock over height * width tokens of C features. What goes from rank
to rank does not depend on the number of tokens: ``--height 16384 --width 16384 --channels 64`` sends no more than 128
pixels a side would, and is 69 GB of float32 tokens, of which a rank only ever has its strip.

Each rank prints how many tokens it holds and the bytes that it received during the step, as the kernel counts them for
its TCP connections, beside what the formula of docs/token_parallel.md says of the sums; the rest is headers and the
integers by which ranks compare. An image of up to ``--check-below`` numbers is also computed by one process, and the
results compared: the process ends with an error if they differ.
"""

from __future__ import annotations

import argparse
import os
import socket
import stat
import struct
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from xformer_kernels import XFABlock


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--height", type=int, default=200)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--form", choices=("auto", "gram", "direct"), default="gram")
    parser.add_argument("--check-below", type=int, default=2**24, help="numbers of an image that one process can hold")
    return parser.parse_args(argv)


def strip(first: int, last: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens and targets (1, N, C) of the image's rows from `first` to before `last`: a texture, and it shifted."""
    rows = torch.arange(first, last).view(-1, 1, 1)
    columns = torch.arange(args.width).view(1, -1, 1)
    k = torch.arange(1, args.channels + 1)
    phase = 0.013 * k * rows + 0.029 * (args.channels - k) * columns
    return phase.sin().flatten(0, 1)[None], (phase + 0.5).cos().flatten(0, 1)[None]


def step(block: XFABlock, x: Tensor, target: Tensor, tokens: int, group: dist.ProcessGroup | None) -> Tensor:
    """Forward and backward of the loss, a mean over all `tokens` of the image; the output."""
    y: Tensor = block(x, group=group)
    # every rank's part of one sum: its gradients are then parts of a sum too
    ((y - target).square().sum() / (tokens * x.shape[-1])).backward()
    return y.detach()


def bytes_received() -> int | None:
    """Of all TCP connections of this process, as Linux counts them; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    total = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not stat.S_ISSOCK(os.stat(fd).st_mode):
                continue
            with socket.socket(fileno=os.dup(fd)) as connection:
                if connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or not TCP
            continue
        if len(info) < 136:
            return None
        total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received of struct tcp_info
    return total


def predicted(args: argparse.Namespace, ranks: int) -> float:
    """Bytes that a rank receives in a step, by the formula: ring all-reduces of float32 numbers."""
    C, D = args.channels, args.channels // args.heads
    gram = (C + 1) + (C * C + C + 1) + (C * C + C)
    direct = 2 * (args.heads * D * D + 2 * args.heads * D)
    return 2 * (ranks - 1) / ranks * 4 * (direct if args.form == "direct" else gram)


def run(args: argparse.Namespace) -> None:
    """What each rank does, in the process group that has been initialised."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokens = args.height * args.width
    edges = [args.height * i // ranks for i in range(ranks + 1)]
    first, last = edges[rank], edges[rank + 1]
    torch.manual_seed(0)  # the same weights on all ranks
    block = XFABlock(args.channels, args.heads, qkv_bias=True, form=args.form)
    x, target = strip(first, last, args)
    x.requires_grad_()
    step(block, *strip(first, first, args), tokens, dist.group.WORLD)  # connects the ranks, which is not counted
    block.zero_grad()
    dist.barrier()

    before = bytes_received()
    y = step(block, x, target, tokens, dist.group.WORLD)
    after = bytes_received()
    for p in block.parameters():
        assert p.grad is not None
        dist.all_reduce(p.grad)

    megabytes, of = (n * args.channels * x.element_size() / 1e6 for n in (x.shape[1], tokens))
    counted = "bytes not counted on this system" if before is None or after is None else f"received {after - before} B"
    print(
        f"rank {rank}: rows {first} to {last}, {x.shape[1]} of {tokens} tokens, {megabytes:.2f} of {of:.2f} MB; "
        f"{counted} in the step, by the formula {predicted(args, ranks):.0f} B",
        flush=True,
    )
    if tokens * args.channels <= args.check_below:
        compare(args, block, x, y, first * args.width)


def compare(args: argparse.Namespace, block: XFABlock, x: Tensor, y: Tensor, start: int) -> None:
    """Raises unless output and all gradients are those that one process has."""
    torch.manual_seed(0)
    alone = XFABlock(args.channels, args.heads, qkv_bias=True, form=args.form)
    whole, target = strip(0, args.height, args)
    whole.requires_grad_()
    expected = step(alone, whole, target, whole.shape[1], None)
    part = slice(start, start + x.shape[1])
    assert x.grad is not None and whole.grad is not None
    pairs = [("output", y, expected[:, part]), ("gradient of tokens", x.grad, whole.grad[:, part])]
    for (name, p), q in zip(block.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        pairs.append((f"gradient of {name}", p.grad, q.grad))
    worst = 0.0
    for name, ours, theirs in pairs:
        if not ours.numel():
            continue
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        worst = max(worst, error)
        if not error < 1e-4:
            raise SystemExit(f"rank {dist.get_rank()}: {name} differs from that of one process by {error:.1e}")
    print(f"rank {dist.get_rank()}: output and all gradients agree with one process, to {worst:.1e}", flush=True)


def start(rank: int, store: str, args: argparse.Namespace) -> None:
    """A process of those that are started without torchrun."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    try:
        run(args)
    finally:
        dist.destroy_process_group()


def main(argv: list[str]) -> None:
    args = arguments(argv)
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("gloo")
        try:
            run(args)
        finally:
            dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(start, (f"{folder}/store", args), nprocs=args.ranks)


if __name__ == "__main__":
    main(sys.argv[1:])

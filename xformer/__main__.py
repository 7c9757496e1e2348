"""``python -m xformer COMMAND ...``"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from xformer.errors import UsageError
from xformer_kernels import __version__

COMMANDS = {
    "train": ("xformer.recipes.train", "train a model"),
    "eval": ("xformer.recipes.eval", "metrics of weights"),
    "predict": ("xformer.recipes.predict", "classes, objects or segments of images"),
    "export": ("xformer.recipes.export", "a model as a file for inference elsewhere"),
    "make-shapes": ("experiments.shapes", "scenes of shapes as COCO and Cityscapes files (in a clone)"),
}
"""Module and help of each command. The module has ``add_arguments(parser)`` and ``run(options)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 for user-facing errors, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("xformer", description="Light backbones of convolutions and transformer layers.")
    parser.add_argument("--version", action="version", version=f"xformer-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    command = next((word for word in argv if not word.startswith("-")), "")
    try:
        if command in COMMANDS:
            module = importlib.import_module(COMMANDS[command][0])
            module.add_arguments(parsers[command])
        options = parser.parse_args(argv)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
        return module.run(options) or 0
    except KeyboardInterrupt as stopped:
        say_once(f"{stopped}" or "stopped")
        return 130
    except UsageError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        missing = f"{error.name}".partition(".")[0]
        if missing == "xformer":
            raise
        hint = "install this one with the extras train and export"
        if missing == "experiments":
            hint = "it is not installed, use python -m xformer in a clone of the repository"
        said = f"{command} needs the package {error.name}: {hint}"
    say_once(f"error: {said}")
    return 2


def say_once(text: str) -> None:
    """Print to stderr, in only one of the processes that torchrun started: the first to get here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _is_first():
        print(text, file=sys.stderr, flush=True)


def _is_first() -> bool:
    from datetime import timedelta

    distributed: Any = importlib.import_module("torch.distributed")
    try:  # the store through which these processes rendezvous
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return bool(store.add(f"xformer/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):
        return True


if __name__ == "__main__":
    sys.exit(main())

"""``python -m xformer COMMAND ...``; each command's module adds its own options."""

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
    "train": "xformer.engine.commands",
    "eval": "xformer.engine.commands",
    "predict": "xformer.predict",
    "export": "xformer.export",
    "make-shapes": "xformer.data.shapes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; 2 for user-facing errors, 130 if interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("xformer", description="Light backbones of convolutions and transformer layers.")
    parser.add_argument("--version", action="version", version=f"xformer-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = [COMMANDS[argv[0]]] if argv and argv[0] in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in modules:
        importlib.import_module(module).add_parser(commands)
    options = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid text
    try:
        return options.run(options) or 0
    except KeyboardInterrupt as stopped:
        say_once(f"{stopped}" or "stopped")
        return 130
    except UsageError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xformer"):
            raise
        said = f"{options.command} needs the package {error.name}: install this one with the extras train and export"
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

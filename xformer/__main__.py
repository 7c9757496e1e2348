"""``python -m xformer COMMAND ...``; each command's module adds its own options."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from xformer.errors import UsageError

COMMANDS = {
    "train": "xformer.engine.commands",
    "eval": "xformer.engine.commands",
    "predict": "xformer.predict",
    "export": "xformer.export",
    "make-shapes": "xformer.data.shapes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: its exit code, or 2 for what the user can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("xformer", description="Light backbones of convolutions and transformer layers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = [COMMANDS[argv[0]]] if argv and argv[0] in COMMANDS else dict.fromkeys(COMMANDS.values())
    for module in modules:
        importlib.import_module(module).add_parser(commands)
    options = parser.parse_args(argv)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        return 130
    except UsageError as error:
        said = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("xformer"):
            raise
        said = f"{options.command} needs the package {error.name}: install this one with the extras train and export"
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

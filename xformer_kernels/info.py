"""``python -m xformer_kernels.info [--json]``: versions, build information, and the backends that run on this machine.

Unavailable backends are listed with the reason; for a compiled module that exists but cannot be loaded, the loader's
error is reported.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from xformer_kernels import __version__, dispatch
from xformer_kernels.backends import cuda_module

PACKAGE = Path(__file__).parent
UNBUILT = (
    "this is a source tree in which nothing is built, and Python prefers it in its folder: "
    "pip install -e . builds here; an installed copy is used in any other folder"
)


def collect() -> dict[str, Any]:
    """The printed information as plain data."""
    return {
        "versions": {
            "xformer_kernels": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "location": str(PACKAGE),
        "platform": {"system": platform.platform(), "processor": processor_name(), "threads": torch.get_num_threads()},
        "extension": _compiled("_C", "_no_extension.txt", partial(importlib.import_module, f"{__package__}._C")),
        "cuda extension": _compiled("_cuda", "_no_cuda.txt", cuda_module.load),
        "backends": {
            name: dispatch.reasons_against(name, "cpu", (torch.float32,), (32,), "token") for name in dispatch.names()
        },
        "auto": _auto("cpu"),
        "gpu": _gpu(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith("XFORMER_KERNELS_")},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _auto(device_type: str) -> str:
    """The backend of ``backend="auto"``, or why there is none: XFORMER_KERNELS_BACKEND is one that cannot serve."""
    try:
        return dispatch.choose("auto", device_type, (torch.float32,), (32,), "token")
    except (RuntimeError, ValueError) as error:
        return str(error)


def _gpu() -> dict[str, Any]:
    """The GPU that torch detects and the backends for it, or that there is no GPU."""
    if not torch.cuda.is_available():
        return {"device": "none that torch sees"}
    reasons = {
        name: dispatch.reasons_against(name, "cuda", (torch.float32,), (32,), "token") for name in dispatch.names()
    }
    return {
        "device": torch.cuda.get_device_name(),
        "auto": _auto("cuda"),
        **{name: "; ".join(found) or "yes" for name, found in reasons.items()},
    }


def processor_name() -> str:
    """The processor's model name, if the system provides it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _compiled(name: str, note_of_build: str, load: Callable[[], Any]) -> dict[str, Any]:
    """The build information of a compiled module, or why it is not used."""
    try:
        module = load()
    except ImportError as error:
        note = PACKAGE / note_of_build
        built = {"why it was not built": note.read_text().strip()} if note.exists() else {}
        files = [path.name for path in PACKAGE.glob(f"{name}*") if path.suffix in (".so", ".pyd")]
        missing = isinstance(error, ModuleNotFoundError) and not files and not built
        sources = missing and (PACKAGE.parent / "csrc").is_dir()
        cause = UNBUILT if sources else str(error)
        return {"loaded": False, "cause": cause, "files": files, **built}
    level = {"level in use": module.cpu_level() or None} if hasattr(module, "cpu_level") else {}
    distribution = module.__name__.partition(".")[0].replace("_", "-")
    return {"loaded": True, "distribution": distribution, "file": module.__file__, **level, **module.build_info()}


def _print(facts: dict[str, Any]) -> None:
    for section in ("versions", "platform", "gpu", "extension", "cuda extension", "environment"):
        print(f"{section}:")
        for key, value in facts[section].items():
            print(f"  {key}: " + str(value).replace("\n", "\n    "))
    if facts["auto"] not in facts["backends"]:
        print(f"auto: {facts['auto']}")
    print("backends (for float32 on the CPU):")
    for name, reasons in facts["backends"].items():
        print(
            f"  {name}: " + ("; ".join(reasons) if reasons else "yes") + (" <- auto" if name == facts["auto"] else "")
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m xformer_kernels.info", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    facts = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())

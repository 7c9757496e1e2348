"""Builds xformer_kernels._C with CMake and Ninja; needs a C++20 compiler and neither torch nor nvcc.

Environment:
    XFORMER_KERNELS_NO_EXTENSION=1       install pure Python: everything works through the reference
    XFORMER_KERNELS_REQUIRE_EXTENSION=1  a failed build is an error instead of a pure Python install
    XFORMER_KERNELS_WERROR=1             compiler warnings are errors
    XFORMER_KERNELS_SANITIZE=address,undefined   an instrumented build, for testing
    CMAKE_ARGS                           more arguments for CMake, such as -DXK_LEVELS=x86_64_v3
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def flag(name: str) -> bool:
    return os.environ.get(f"XFORMER_KERNELS_{name}", "0").lower() not in ("", "0", "false", "no", "off")


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        package = ROOT / "xformer_kernels" if getattr(self, "editable_mode", False) else target.parent
        why_not = package / "_no_extension.txt"
        for stale in (why_not, package / target.name):
            stale.unlink(missing_ok=True)
        try:
            self.run_cmake(target)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if flag("REQUIRE_EXTENSION"):
                raise
            why_not.write_text(f"{error}\n")
            banner = "*" * 100
            print(
                f"\n{banner}\nxformer_kernels._C WAS NOT BUILT: {error}\nInstalling pure Python: everything works, "
                f"through the slower reference.\nXFORMER_KERNELS_REQUIRE_EXTENSION=1 makes this an error.\n{banner}\n",
                file=sys.stderr,
                flush=True,
            )

    def run_cmake(self, target: Path) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise RuntimeError(f"{tool} is not on PATH")
        try:
            import pybind11
        except ImportError as error:
            raise RuntimeError("pybind11 is not installed") from error
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--fresh",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DXK_OUTPUT_DIRECTORY={target.parent}",
            f"-DXK_OUTPUT_NAME={target.name}",
            f"-DXK_VERSION={self.distribution.get_version()}",
            f"-DXK_WERROR={'ON' if flag('WERROR') else 'OFF'}",
            f"-DXK_SANITIZE={os.environ.get('XFORMER_KERNELS_SANITIZE', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            print(done.stdout, flush=True)
            if done.returncode:
                tail = "\n".join(done.stdout.strip().splitlines()[-30:])
                raise RuntimeError(f"{shlex.join(command[:2])} failed with exit status {done.returncode}:\n{tail}")


# Without the extension at all when it is not wanted, so that the wheel is a pure one.
extensions = [] if flag("NO_EXTENSION") else [Extension("xformer_kernels._C", sources=[], optional=True)]
if flag("NO_EXTENSION"):
    if flag("REQUIRE_EXTENSION"):
        sys.exit("XFORMER_KERNELS_NO_EXTENSION and XFORMER_KERNELS_REQUIRE_EXTENSION contradict each other")
    print(
        "XFORMER_KERNELS_NO_EXTENSION is set: installing pure Python, everything uses the slower reference",
        file=sys.stderr,
    )

setup(ext_modules=extensions, cmdclass={"build_ext": BuildWithCMake})

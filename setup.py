"""Builds xformer_kernels._C and, where a CUDA toolkit is found, xformer_kernels._cuda with CMake and Ninja.

_C needs a C++20 compiler; _cuda needs nvcc 12.0 or newer too: of CUDA_HOME or CUDA_PATH, on PATH, or of the wheels of
CUDA 13 (nvidia-cuda-nvcc, -crt, -runtime, -cccl and nvidia-nvvm). Neither needs torch, and no GPU is looked for.

Environment:
    XFORMER_KERNELS_NO_EXTENSION=1       install pure Python: everything works through the reference
    XFORMER_KERNELS_REQUIRE_EXTENSION=1  a failed build of _C is an error instead of a pure Python install
    XFORMER_KERNELS_CUDA=0|1             without _cuda; or with it, and then a missing toolkit or a failed build is an
                                         error. Neither: with it if there is a toolkit, without it if its build fails
    XFORMER_KERNELS_CUDA_ARCHS           by default 80;86;89;90a;100;120: the last one as PTX too
    XFORMER_KERNELS_WERROR=1             compiler warnings are errors
    XFORMER_KERNELS_SANITIZE=address,undefined   an instrumented _C, for testing
    CMAKE_ARGS                           more arguments for CMake, such as -DXK_LEVELS=x86_64_v3
    CMAKE_BUILD_PARALLEL_LEVEL           compilers at work at the same time, by default one a core
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
# Of each module: the file in the package that says why it is not there, what makes that an error, what is without it.
MODULES = {
    "_C": ("_no_extension.txt", "REQUIRE_EXTENSION", "pure Python: everything works, through the slower reference"),
    "_cuda": ("_no_cuda.txt", "CUDA", "without it: the kernels for the CPU and Triton's do not need it"),
}
OLDEST_NVCC = (12, 0)
LICENSE = "Apache-2.0"


def flag(name: str) -> bool:
    return os.environ.get(f"XFORMER_KERNELS_{name}", "0").lower() not in ("", "0", "false", "no", "off")


class NotWanted(RuntimeError):
    """There is no toolkit, or it is not to be used: no reason for a banner."""


def find_nvcc() -> str:
    """The first nvcc that is new enough."""
    if os.environ.get("XFORMER_KERNELS_CUDA") and not flag("CUDA"):
        raise NotWanted("XFORMER_KERNELS_CUDA=0 was set")
    folders = [Path(home) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    folders += map(Path, os.environ.get("PATH", "").split(os.pathsep))
    # With build isolation the environment's own packages are not on sys.path.
    for packages in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]):
        folders += sorted(Path(packages).glob("nvidia/cu[0-9]*/bin"), reverse=True)
    reasons = []
    for folder in dict.fromkeys(folders):
        nvcc = shutil.which("nvcc", path=str(folder))
        if nvcc is None:
            continue
        try:
            said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, errors="replace").stdout
        except OSError as error:
            said = str(error)
        release = re.search(r"release (\d+)\.(\d+)", said)
        if release and tuple(map(int, release.groups())) >= OLDEST_NVCC:
            return str(Path(nvcc).absolute())
        reasons.append(f"{nvcc} is release {'.'.join(release.groups())}" if release else f"{nvcc} does not run")
    asked = "XFORMER_KERNELS_CUDA=1 was set, and " if flag("CUDA") else ""
    wanted = "no CUDA toolkit of {}.{} or newer was found".format(*OLDEST_NVCC)
    looked = "; ".join(reasons) or "no nvcc in CUDA_HOME, CUDA_PATH, PATH and the wheels of CUDA 13"
    raise NotWanted(f"{asked}{wanted} ({looked})")


def remove_stale(package: Path) -> None:
    """No module of an earlier build by this Python, and no note, outlives a build that does not make it."""
    for name, (note, *_) in MODULES.items():
        for stale in (note, name + sysconfig.get_config_var("EXT_SUFFIX")):
            (package / stale).unlink(missing_ok=True)


class BuildPython(build_py):
    def run(self) -> None:
        if self.editable_mode:  # here, since without extensions the other command does not run
            remove_stale(ROOT / "xformer_kernels")
        super().run()


class BuildWithCMake(build_ext):
    def run(self) -> None:
        remove_stale(Path(self.build_lib) / "xformer_kernels")
        if flag("CUDA"):
            find_nvcc()  # an error now, and not after minutes of the other module
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        name = ext.name.rpartition(".")[2]
        note, require, without = MODULES[name]
        note_path = (ROOT / "xformer_kernels" if self.editable_mode else target.parent) / note
        try:
            if name == "_cuda":
                self.build_cuda(target)
            else:
                sanitize = os.environ.get("XFORMER_KERNELS_SANITIZE", "")
                self.run_cmake(ROOT, Path(self.build_temp), target, "--fresh", f"-DXK_SANITIZE={sanitize}")
        except NotWanted as reason:
            note_path.write_text(f"{reason}\n")
            print(f"{ext.name} was not built: {reason}; the CPU kernels do not need it", file=sys.stderr, flush=True)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if flag(require):
                raise
            note_path.write_text(f"{error}\n")
            banner = "*" * 100
            print(
                f"\n{banner}\n{ext.name} WAS NOT BUILT: {error}\nInstalling {without}.\n"
                f"XFORMER_KERNELS_{require}=1 makes this an error.\n{banner}\n",
                file=sys.stderr,
                flush=True,
            )

    def build_cuda(self, target: Path) -> None:
        nvcc = find_nvcc()
        # An editable install's own folder is gone after it: with this one, and all but its objects forgotten, the next
        # install compiles only what has changed.
        build = (ROOT / "build" if self.editable_mode else Path(self.build_temp)) / "cuda"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for facts in (build / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(facts)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or len(os.sched_getaffinity(0))
        archs = os.environ.get("XFORMER_KERNELS_CUDA_ARCHS")
        more = [f"-DXK_CUDA_ARCHS={archs}"] if archs else []
        self.run_cmake(
            ROOT / "csrc" / "cuda", build, target, f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DXK_CUDA_JOBS={jobs}", *more
        )

    def run_cmake(self, source: Path, build: Path, target: Path, *more: str) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise RuntimeError(f"{tool} is not on PATH")
        try:
            import pybind11
        except ImportError as error:
            raise RuntimeError("pybind11 is not installed") from error
        build = build.resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DXK_OUTPUT_DIRECTORY={target.parent}",
            f"-DXK_OUTPUT_NAME={target.name}",
            f"-DXK_VERSION={self.distribution.get_version()}",
            f"-DXK_WERROR={'ON' if flag('WERROR') else 'OFF'}",
            *more,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        for command in (configure, ["cmake", "--build", str(build)]):
            done = subprocess.run(command, **output)
            print(done.stdout, flush=True)
            if done.returncode:
                tail = "\n".join(done.stdout.strip().splitlines()[-30:])
                raise RuntimeError(f"{shlex.join(command[:2])} failed with exit status {done.returncode}:\n{tail}")


def main() -> None:
    # Without the extensions at all when they are not wanted, so that the wheel is a pure one.
    extensions = [Extension(f"xformer_kernels.{name}", sources=[], optional=True) for name in MODULES]
    if flag("NO_EXTENSION"):
        extensions.clear()
        for _, require, _ in MODULES.values():
            if flag(require):
                sys.exit(f"XFORMER_KERNELS_NO_EXTENSION=1 and XFORMER_KERNELS_{require}=1 contradict each other")
        print(
            "XFORMER_KERNELS_NO_EXTENSION is set: installing pure Python, all uses the slower reference",
            file=sys.stderr,
        )
    setup(license=LICENSE, ext_modules=extensions, cmdclass={"build_ext": BuildWithCMake, "build_py": BuildPython})


if __name__ == "__main__":  # tools/cuda_wheel/setup.py imports this file
    main()

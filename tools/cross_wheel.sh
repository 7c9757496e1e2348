#!/usr/bin/env bash
# Builds the wheel for Linux on aarch64 with Debian's cross compiler, and runs the smoke test of it under QEMU:
#   bash tools/cross_wheel.sh [OUT]        (by default dist)
# On Debian or Ubuntu on x86-64, as an ordinary user, in an environment with the packages build, setuptools, pybind11,
# cmake and ninja. Python must be the release's own minor version: headers and the interpreter for the test are those of
# its arm64 packages, which are downloaded and unpacked, not installed. PyTorch for the test comes from PyPI (0.2 GB).
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "${1:-$project/dist}"
out=$(cd "${1:-$project/dist}" && pwd)
torch=${CROSS_TORCH:-torch==2.10.0} # the oldest that is supported; its wheel for aarch64 is a CPU build
for tool in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg cmake ninja; do
  command -v $tool > /dev/null || { echo "$tool is missing (Debian: g++-aarch64-linux-gnu, qemu-user)" >&2; exit 1; }
done
version=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# apt with a state of its own, for which every package is of arm64 and none is installed
mkdir -p "$work"/state/lists/partial "$work"/cache/archives/partial "$root"
apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$work/state"
  -o Dir::State::status=/dev/null -o Dir::Cache="$work/cache" -o Debug::NoLocking=1 -o APT::Sandbox::User=)
"${apt[@]}" update
"${apt[@]}" install --download-only --no-install-recommends -y "python$version" "libpython$version-dev" libgomp1 \
  libstdc++6 > /dev/null
for package in "$work"/cache/archives/*.deb; do
  dpkg -x "$package" "$root"
done

# Python's own variables for cross compilation: the suffix of modules and the tag of the wheel are those of aarch64
mkdir "$work/sysconfig" "$work/include"
cp "$root/usr/lib/python$version/_sysconfigdata__aarch64-linux-gnu.py" "$work/sysconfig"
mkdir "$work/include/aarch64-linux-gnu"
ln -s "$root/usr/include/aarch64-linux-gnu/python$version" "$work/include/aarch64-linux-gnu/python$version"
_PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu \
  PYTHONPATH="$work/sysconfig" XFORMER_KERNELS_REQUIRE_EXTENSION=1 XFORMER_KERNELS_CUDA=0 \
  CMAKE_ARGS="--toolchain $project/tests/native/arm64.cmake -DPython_INCLUDE_DIR=$root/usr/include/python$version
    '-DCMAKE_CXX_FLAGS=-isystem $work/include'" \
  python -m build --no-isolation --outdir "$work/dist" "$project"
wheel=$(ls "$work"/dist/*-linux_aarch64.whl)
cp "$wheel" "$out"

pip=(python -m pip install -q --target "$work/site" --no-deps --only-binary=:all: --python-version "$version"
  --platform manylinux_2_28_aarch64 --platform linux_aarch64 --platform any)
"${pip[@]}" "$torch" typing_extensions filelock sympy mpmath networkx jinja2 markupsafe fsspec "$wheel"
PYTHONPATH=$work/site XFORMER_KERNELS_CALIBRATION=off \
  qemu-aarch64 -L "$root" "$root/usr/bin/python$version" "$project/tools/smoke.py"
echo "$out/$(basename "$wheel")"

#!/usr/bin/env bash
# Cross-compiles the CPU kernels for arm64 and runs the test of the C API under QEMU. As root, missing tools are
# installed with apt-get; otherwise a line says what is missing and that nothing was run.
set -euo pipefail
cd "$(dirname "$0")/../.."
missing() {
  for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ctest ninja; do
    command -v $tool > /dev/null || echo -n " $tool"
  done
}
if [[ $(missing) == *aarch64* && $(id -u) == 0 ]] && command -v apt-get > /dev/null; then
  packages=(g++-aarch64-linux-gnu qemu-user)
  { apt-get install -qq -y "${packages[@]}" || { apt-get update -qq && apt-get install -qq -y "${packages[@]}"; }; } \
    > /dev/null 2>&1 || true
fi
if [[ -n $(missing) ]]; then
  echo "arm64 was not run: missing$(missing) (Debian: g++-aarch64-linux-gnu, qemu-user), and apt-get did not install it"
  exit 0
fi
cmake -S . -B build/arm64 -G Ninja --toolchain tests/native/arm64.cmake -DXK_PYTHON=OFF -DXK_NATIVE_TESTS=ON \
  -DXK_WERROR=ON > /dev/null
cmake --build build/arm64 -j 1
ctest --test-dir build/arm64 --output-on-failure

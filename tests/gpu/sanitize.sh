#!/usr/bin/env bash
# tests/gpu/sanitize.sh PYTHON [LOGS]: tests/gpu/sanitize.py, alone and then under the tools of compute-sanitizer.
# Without PyTorch's cache of memory every tensor is an allocation whose ends the tools know.
set -uo pipefail
python=${1:?usage: tests/gpu/sanitize.sh PYTHON [LOGS]}
logs=${2:-$(mktemp -d)}
script=$(dirname "$0")/sanitize.py
mkdir -p "$logs"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device: there is nothing to sanitize"
    exit 1
fi
if ! command -v compute-sanitizer > /dev/null; then
    echo "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"
    exit 1
fi
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Compiles everything, so that the tools find it in Triton's cache.
"$python" "$script" || exit 1

tools=(memcheck racecheck initcheck)
pids=()
for tool in "${tools[@]}"; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" "$script" > "$logs/sanitize-$tool.log" 2>&1 &
    pids+=($!)
done
failed=0
for i in "${!tools[@]}"; do
    status=0
    wait "${pids[i]}" || status=$?
    echo "${tools[i]}: exit status $status, $(tail -n 1 "$logs/sanitize-${tools[i]}.log")"
    if ((status != 0)); then
        failed=1
        tail -n 40 "$logs/sanitize-${tools[i]}.log"
    fi
done
exit "$failed"

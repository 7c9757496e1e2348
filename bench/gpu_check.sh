#!/usr/bin/env bash
# bash bench/gpu_check.sh OUTDIR: builds, tests, measures and sanitizes on a GPU, offline, in less than ten minutes.
#
# Every step has a time limit, a log in OUTDIR and, once it succeeded, a stamp in OUTDIR/.stamps: a rerun with the same
# OUTDIR and the same sources does the rest. What is compiled is kept below TMPDIR, for reruns on the same machine.
# Exit status: 0, 1 if a step failed or was not run, 2 without a GPU.
#
# PYTHON: the interpreter that has torch. GPU_CHECK_SCALE: multiplies all limits. GPU_CHECK_QUICK=1: benchmarks are short
# and without torch.compile, a first look. XFORMER_KERNELS_COMMIT: what results say where the checkout has no .git.
set -uo pipefail

out=${1:?usage: bash bench/gpu_check.sh OUTDIR}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
scale=${GPU_CHECK_SCALE:-1}
deadline=$((580 * scale))

see='import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no CUDA device")'
if ! why=$("$python" -c "$see" 2>&1); then
    echo "no GPU: $(tail -n 1 <<< "$why")"
    exit 2
fi

mkdir -p "$out/.stamps"
out=$(cd "$out" && pwd)
stamps=$out/.stamps
sources=(csrc xformer_kernels xformer bench tests pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md
    CHANGELOG.md CONTRIBUTING.md LICENSE Makefile)
digest=$(cd "$root" && find "${sources[@]}" -type f ! -name '*.so' ! -name '*.pyc' ! -path 'bench/results/*' \
    -exec sha256sum {} + | sort -k 2 | sha256sum | cut -c 1-16)
work=${TMPDIR:-/tmp}/xformer-kernels-gpu-check-$(id -u)
tree=$work/$digest/tree # a copy of the checkout without the packages
site=$work/$digest/site # where the packages are installed

if [[ $(cat "$stamps/sources" 2> /dev/null) != "$digest" ]]; then
    rm -f "$stamps"/*
    echo "$digest" > "$stamps/sources"
fi
if [[ ! -d $site/xformer_kernels || ! -d $tree ]]; then
    rm -f "$stamps"/build*
fi

if [[ -z ${XFORMER_KERNELS_COMMIT:-} ]]; then
    XFORMER_KERNELS_COMMIT=$(git -C "$root" rev-parse --short=12 HEAD 2> /dev/null || echo unknown)
    if ! git -C "$root" diff --quiet HEAD -- . 2> /dev/null; then
        XFORMER_KERNELS_COMMIT+=-modified
    fi
fi
export XFORMER_KERNELS_COMMIT
export XDG_CACHE_HOME=$work/cache TRITON_CACHE_DIR=$work/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MPLCONFIGDIR=$work/matplotlib

failed=0
failures=()
table=()

note() { # NAME STATUS SECONDS
    table+=("$(printf '%-22s %-34s %7s' "$1" "$2" "$3")")
}

step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$(($2 * scale)) left=$((deadline - SECONDS)) begun=$SECONDS status=0
    shift 2
    if [[ -e $stamps/$name ]]; then
        note "$name" "done before" -
        return 0
    fi
    if ((left < 5)); then
        note "$name" "NOT RUN: no time is left" -
        failed=1
        return 1
    fi
    ((limit <= left)) || limit=$left
    echo "$name, at most $limit s ..."
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
    if ((status == 0)); then
        touch "$stamps/$name"
        note "$name" ok $((SECONDS - begun))
        return 0
    fi
    failed=1
    failures+=("$name")
    if ((SECONDS - begun >= limit)); then
        note "$name" "TIMEOUT after $limit s" $((SECONDS - begun))
    else
        note "$name" "FAILED with exit status $status" $((SECONDS - begun))
    fi
    return 1
}

# -------------------------------------------------------------------------------------------------------------- facts

# shellcheck disable=SC2329 # runs in the shell of its step
facts() {
    nvidia-smi
    nvcc --version
    "$python" -c '
import sys, torch, triton
print("python", sys.version)
print("torch", torch.__version__, "cuda", torch.version.cuda, "triton", triton.__version__)
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))'
    local status=$?
    echo "commit $XFORMER_KERNELS_COMMIT, sources $digest"
    return "$status"
}
export -f facts
export python digest
step facts 15 bash -c facts

# -------------------------------------------------------------------------------------------------------------- build
# Into a folder, not a virtual environment: one made from within another would not see torch. From a copy, since a build
# writes beside its sources; without the packages in it, so that nothing but what is installed can be imported.

install() { # NAME LIMIT VARIABLE
    if [[ ! -e $stamps/$1 ]]; then
        rm -rf "$tree" "$site"
        mkdir -p "$tree" "$site"
        (cd "$root" && cp -R "${sources[@]}" "$tree")
        rm -f "$tree"/xformer_kernels/{_C,_cuda}*.so
    fi
    step "$1" "$2" env "$3=1" "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" \
        "$tree" || return 1
    rm -rf "$tree/xformer_kernels" "$tree/xformer" "$tree/build" "$tree"/*.egg-info
}

# The CUDA module for this GPU alone.
export XFORMER_KERNELS_CUDA_ARCHS=${XFORMER_KERNELS_CUDA_ARCHS:-$("$python" -c '
import torch
print("{}{}".format(*torch.cuda.get_device_capability()))')}
installed=1
if install build 120 XFORMER_KERNELS_REQUIRE_EXTENSION; then
    export XFORMER_KERNELS_REQUIRE_EXTENSION=1
else # the kernels for the GPU need no compiler
    rm -f "$stamps/build-without-extension"
    install build-without-extension 30 XFORMER_KERNELS_NO_EXTENSION || installed=0
fi

# ---------------------------------------------------------------------------------------- tests, benchmarks, sanitizer

quick=()
[[ ${GPU_CHECK_QUICK:-0} == 0 ]] || quick=(--quick)
measure() { # NAME LIMIT ARGUMENTS OF BENCH. The last workload may begin 15 s before the limit: what is there is saved
    step "$1" "$2" "$python" -m bench "${@:3}" "${quick[@]}" --device cuda --seconds 0.4 \
        --stop-after $((($2 - 15) * scale)) --out "$out/results"
}

checks() {
    cd "$tree" || return 1
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} XFORMER_KERNELS_EXPECTED_LOCATION=$site
    local workers=()
    if "$python" -c 'import xdist' 2> /dev/null; then
        workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))" --dist loadgroup)
    fi
    step info 20 "$python" -m xformer_kernels.info
    # the reference is PyTorch's own operators
    step tests 270 "$python" -m pytest -m gpu -k "not reference-cuda" -v --tb=short -p no:cacheprovider \
        "${workers[@]}" tests

    measure bench-op-float32 80 op --dtype float32
    measure bench-op-bfloat16 80 op --dtype bfloat16
    measure bench-layer-bfloat16 40 layer --dtype bfloat16
    # torch.compile takes minutes for whole models: python -m bench model --device cuda has it
    measure bench-model-float32 30 model --dtype float32 --providers eager,triton,cuda
    measure bench-model-bfloat16 30 model --dtype bfloat16 --providers eager,triton,cuda

    if command -v compute-sanitizer > /dev/null; then
        step sanitize 45 bash tests/gpu/sanitize.sh "$python" "$out"
    else
        note sanitize "no compute-sanitizer on PATH" -
    fi
}

if ((installed)); then
    checks
else
    note "tests, bench, sanitize" "NOT RUN: nothing is installed" -
fi

summary() {
    for name in "${failures[@]}"; do
        printf '\n==> the end of %s.log\n' "$name"
        tail -n 25 "$out/$name.log"
    done
    printf '\n%-22s %-34s %7s\n' step status seconds
    printf '%s\n' "${table[@]}"
}
summary 2>&1 | tee "$out/summary.txt"
exit "$failed"

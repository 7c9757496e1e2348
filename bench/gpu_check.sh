#!/usr/bin/env bash
# bash bench/gpu_check.sh OUTDIR: measures, checks and sanitizes on a GPU, offline, in calls of less than ten minutes.
#
# The order is that of worth: the first 200 s are memory, each kernel alone and its counters; then the tuner, operators,
# calls of one image, layers; then a few cases for correctness, the sanitizers and, last, all tests for a GPU. Every step
# has a time limit, a log in OUTDIR and, once it succeeded, a stamp in OUTDIR/.stamps: another call with the same OUTDIR
# and the same sources does the rest. Three calls do all.
#
# `make gpu-prepare` leaves build/gpu/prepared.tar.xz, compiled beforehand for the Python and the Triton of the machine
# with the GPU: carried along, it saves the minutes that compiling takes. GPU_CHECK_PREPARED: another place of it.
# Exit status: 0, 1 if a step failed or was not run, 2 without a GPU.
#
# PYTHON: the interpreter that has torch. GPU_CHECK_SCALE: multiplies all limits. GPU_CHECK_ONLY: a regular expression of
# the steps that are run. GPU_CHECK_DRY=1: no GPU is needed; every step compiles, is interpreted or is only parsed.
# XFORMER_KERNELS_COMMIT: what results say where the checkout has no .git.
set -uo pipefail

out=${1:?usage: bash bench/gpu_check.sh OUTDIR}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$(command -v python || command -v python3)}
scale=${GPU_CHECK_SCALE:-1}
dry=${GPU_CHECK_DRY:-0}
only=${GPU_CHECK_ONLY:-.}
prepared=${GPU_CHECK_PREPARED:-$root/build/gpu/prepared.tar.xz}
deadline=$((580 * scale))

see='import sys, torch; sys.exit(not torch.cuda.is_available() and "torch sees no CUDA device")'
if ((!dry)) && ! why=$("$python" -c "$see" 2>&1); then
    echo "no GPU: $(tail -n 1 <<< "$why")"
    exit 2
fi

mkdir -p "$out/.stamps"
out=$(cd "$out" && pwd)
stamps=$out/.stamps
sources=(csrc xformer_kernels xformer bench tests pyproject.toml setup.py CMakeLists.txt Makefile)
others=(docs examples README.md CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in) # which tests read
digest=$(cd "$root" && find "${sources[@]}" -type f ! -name '*.so' ! -name '*.pyc' ! -path 'bench/results/*' \
    -exec sha256sum {} + | sort -k 2 | sha256sum | cut -c 1-16)
work=${TMPDIR:-/tmp}/xformer-kernels-gpu-check-$(id -u)
tree=$work/$digest # a copy of the checkout, with what was prepared

if [[ $(cat "$stamps/sources" 2> /dev/null) != "$digest" ]]; then
    rm -f "$stamps"/*
    echo "$digest" > "$stamps/sources"
fi

if [[ -z ${XFORMER_KERNELS_COMMIT:-} ]]; then
    XFORMER_KERNELS_COMMIT=$(git -C "$root" rev-parse --short=12 HEAD 2> /dev/null || echo unknown)
    if ! git -C "$root" diff --quiet HEAD -- . 2> /dev/null; then
        XFORMER_KERNELS_COMMIT+=-modified
    fi
fi
export XFORMER_KERNELS_COMMIT
export XDG_CACHE_HOME=$work/cache TRITON_CACHE_DIR=$tree/prepared/triton TORCHINDUCTOR_CACHE_DIR=$work/inductor
export XFORMER_KERNELS_CACHE=$out # the tuner's results
export PYTHONPATH=$tree PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=$work/matplotlib
export python digest tree prepared dry

failed=0
failures=()
table=()

note() { # NAME STATUS SECONDS
    table+=("$(printf '%-22s %-34s %7s' "$1" "$2" "$3")")
}

step() { # NAME LIMIT COMMAND...
    local name=$1 limit=$(($2 * scale)) left=$((deadline - SECONDS)) begun=$SECONDS status=0
    shift 2
    [[ $name =~ $only ]] || return 0
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

# What a step has in addition without a GPU: a driver that launches nothing, the interpreter on the CPU, or no run.
if ((dry)); then
    launches_nothing=(--dry) interpreted=(env TRITON_INTERPRET=1 XFORMER_KERNELS_CALIBRATION=off) collects=(--collect-only)
    of_op=(--device cpu --quick --shapes tiny --providers "eager,triton")
    of_latency=("${of_op[@]}") of_layer=("--help")
else
    launches_nothing=() interpreted=(env) collects=()
    of_op=(--device cuda --seconds 0.4 --shapes gpu --providers "eager,triton,cuda")
    of_latency=(--device cuda --seconds 0.2 --shapes gpu-latency --providers "eager,triton,cuda,triton+graphs,cuda+graphs")
    of_layer=(--device cuda --seconds 0.3 --shapes "gpu,gpu-latency" --providers "eager,triton,triton-gram,triton-direct")
fi

# ------------------------------------------------------------------------------------------------------- what there is

# shellcheck disable=SC2329 # runs in the shell of its step
facts() {
    if ((!dry)); then
        nvidia-smi || return 1
    fi
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

# shellcheck disable=SC2329
unpack() { # a module for another Python stays unused beside the one that is built below
    mkdir -p "$tree/prepared"
    [[ ! -f $prepared ]] || tar -xJf "$prepared" -C "$tree/prepared" || return 1
    find "$tree/prepared" -maxdepth 1 -name '_cuda*.so' -exec cp {} "$tree/xformer_kernels/" \;
    "$python" -m xformer_kernels.info
}
export -f facts unpack

step facts 15 bash -c facts
if [[ ! -d $tree ]]; then
    rm -f "$stamps/unpack"
    mkdir -p "$tree"
    (cd "$root" && cp -R "${sources[@]}" "${others[@]}" "$tree")
    rm -f "$tree"/xformer_kernels/{_C,_cuda}*.so
fi
cd "$tree" || exit 1
step unpack 30 bash -c unpack

# ---------------------------------------------------------------------------------------- memory, and each kernel alone

kernels=("$python" -m bench.gpu_kernels "${launches_nothing[@]}")
step memory 40 "$python" -m bench.gpu_memory "${launches_nothing[@]}" --out "$out/results"
step kernels-fixed 60 "${kernels[@]}" --fixed --out "$out/results"
for dtype in bfloat16 float32; do
    step "kernels-$dtype" 60 "${kernels[@]}" --dtype "$dtype" --out "$out/results/varied"
done

counters() { # NAME LIMIT ARGUMENTS: of each kernel by ncu, where it is and may read them; clocks stay as they are
    local sections=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section MemoryWorkloadAnalysis_Tables
        --section Occupancy --section WarpStateStats --print-details all)
    local watch=(ncu --clock-control none --target-processes all -k "regex:gram|apply|mix|forward|gradients|backward")
    if ((dry)); then
        step "$1" "$2" "${kernels[@]}" --once "${@:3}"
    elif command -v ncu > /dev/null; then
        step "$1" "$2" "${watch[@]}" "${sections[@]}" "${kernels[@]}" --once "${@:3}"
    else
        note "$1" "no ncu on PATH" -
    fi
}
counters ncu-bfloat16 40 --dtype bfloat16
counters ncu-float32 40 --dtype float32

# ------------------------------------------------------------------------------- the tuner, operators, calls of one image

tuned=(env XFORMER_KERNELS_AUTOTUNE=$((!dry)))
for dtype in bfloat16 float32; do
    step "tune-$dtype" 120 "${tuned[@]}" "${kernels[@]}" --once --dtype "$dtype"
done
step kernels-tuned 60 "${tuned[@]}" "${kernels[@]}" --fixed --out "$out/results/tuned"

# Compiled here where what was prepared is not for this Python: the CUDA module for this GPU alone.
# shellcheck disable=SC2329
build() {
    "$python" -c 'from xformer_kernels import _cuda; print(_cuda.build_info())' && return 0
    ((dry)) && return 0
    "$python" -m bench.gpu_prepare --no-triton --out "$tree/prepared" --cuda "$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + "a" * (major == 9))')" && cp "$tree"/prepared/_cuda*.so "$tree/xformer_kernels/"
}
export -f build
step build-cuda 120 bash -c build
((dry)) || step kernels-cuda 40 "${kernels[@]}" --backend cuda --out "$out/results"

bench() { # NAME LIMIT ARGUMENTS. The last workload may begin 15 s before the limit: what is there is saved
    step "$1" "$2" "${interpreted[@]}" "$python" -m bench "${@:3}" --stop-after $((($2 - 15) * scale)) --out "$out/results"
}
for dtype in bfloat16 float32; do
    bench "op-$dtype" 60 op --dtype "$dtype" "${of_op[@]}"
    bench "latency-$dtype" 45 op --dtype "$dtype" "${of_latency[@]}"
done
bench layer-bfloat16 60 layer --dtype bfloat16 "${of_layer[@]}"

# ------------------------------------------------------------------------------------------ correctness, sanitizers, tests

# the reference is PyTorch's own operators; files whose packages are missing keep no others from running
tests=("${interpreted[@]}" "$python" -m pytest -p no:cacheprovider --tb=short --continue-on-collection-errors)
tests+=("${collects[@]}")
((dry)) || tests+=(-m gpu)
step cases 60 "${tests[@]}" -q -k "test_shapes_and_dtypes and not reference and (196 or 64)" tests/test_xfa.py
if ((dry)); then
    step sanitize 60 bash -n tests/gpu/sanitize.sh
elif command -v compute-sanitizer > /dev/null; then
    step sanitize 120 bash tests/gpu/sanitize.sh "$python" "$out"
else
    note sanitize "no compute-sanitizer on PATH" -
fi
workers=()
if "$python" -c 'import xdist' 2> /dev/null && ((!dry)); then # no more than compile side by side without harm
    workers=(-n 4 --dist loadgroup)
fi
step tests 540 "${tests[@]}" -v -k "not reference-cuda" "${workers[@]}" tests

summary() {
    for name in "${failures[@]}"; do
        printf '\n==> the end of %s.log\n' "$name"
        tail -n 25 "$out/$name.log"
    done
    printf '\n%-22s %-34s %7s\n' step status seconds
    printf '%s\n' "${table[@]}"
}
summary 2>&1 | tee "$out/summary.txt"
tar -cJf "$work/all.tar.xz" --exclude=all.tar.xz -C "$out" . && mv "$work/all.tar.xz" "$out" # one file to carry back
exit "$failed"

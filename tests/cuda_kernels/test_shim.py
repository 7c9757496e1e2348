"""The emulation itself: kernels that are right (shim_right.h) give exact results in any order of their threads, and
each that is wrong (shim_wrong.h) is reported, with block, thread and line."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = HERE / "shim_cases.cpp"
SEEDS = (0, 1, 2, 3, 4)


def compiler():
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def compile_all(directory, sources, *flags):
    common = ["-std=c++20", "-DXK_EMULATED", "-I", HERE / "shim/include", "-I", HERE.parents[1] / "csrc/cuda", "-c"]
    objects = [directory / f"{source.stem}.o" for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        subprocess.run([compiler(), *common, *warnings, *flags, source, "-o", compiled], check=True)
    return objects


@pytest.fixture(scope="session")
def runtime(tmp_path_factory):
    """Never compiled with sanitizers."""
    sources = sorted((HERE / "shim").glob("*.cpp"))
    return compile_all(tmp_path_factory.mktemp("shim_runtime"), sources, "-O1")


def build(directory, runtime, *flags, sanitizer=None):
    if sanitizer:
        flags = (*flags, f"-fsanitize={sanitizer}")
        (directory / "probe.cpp").write_text("int main() {}")
        linked = [compiler(), flags[-1], directory / "probe.cpp", "-o", directory / "probe"]
        works = subprocess.run(linked, capture_output=True).returncode == 0
        if not works or subprocess.run([directory / "probe"], capture_output=True).returncode != 0:
            pytest.skip(f"no {flags[-1]} here")
    objects = compile_all(directory, [CASES], "-g", *flags)
    subprocess.run([compiler(), *flags, *objects, *runtime, "-pthread", "-o", directory / "shim_cases"], check=True)
    return directory / "shim_cases"


@pytest.fixture(scope="session")
def program(tmp_path_factory, runtime):
    return build(tmp_path_factory.mktemp("shim"), runtime, "-O1")


@pytest.fixture(scope="session")
def program_asan(tmp_path_factory, runtime):
    return build(tmp_path_factory.mktemp("shim_asan"), runtime, sanitizer="address,undefined")


@pytest.fixture(scope="session")
def program_tsan(tmp_path_factory, runtime):
    return build(tmp_path_factory.mktemp("shim_tsan"), runtime, sanitizer="thread")


def run(program, *names, seed=0, device="9.0"):
    """Output of each case, and what a sanitizer said."""
    environment = dict(
        os.environ,
        XK_EMULATION_SEED=str(seed),
        XK_EMULATION_DEVICE=device,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1",
        TSAN_OPTIONS="suppress_equal_addresses=0 atexit_sleep_ms=0",
    )
    done = subprocess.run([program, *names], capture_output=True, text=True, env=environment, timeout=60)
    return done.stdout.split("\n--\n")[:-1], done.stderr


def lines_with(text):
    return [number for number, line in enumerate((HERE / "shim_wrong.h").read_text().splitlines(), 1) if text in line]


RIGHT = ("sum", "layout", "concurrent", "cluster", "pipeline", "bf16", "fp16", "tf32")
# Products of mma.sync; and that one whose registers are in another order would be noticed.
RIGHT += ("registers_bf16", "registers_fp16", "registers_tf32", "registers_swapped")


@pytest.mark.parametrize("seed", SEEDS)
def test_right(program, seed):
    results, _ = run(program, *RIGHT, seed=seed)
    assert results == run(program, *RIGHT)[0]
    assert [result.split()[-1] for result in results] == ["0x1p+0"] * len(RIGHT)


WHERE = r"shim_wrong\.h:\d+"
REPORTS = {
    "divergent_barrier": rf"\(0, 0, 0\): 40 threads, the first 0, at __syncthreads, .*{WHERE}.*24 .* 40, exited",
    "mismatched_barrier": rf"thread \d+: __syncthreads at .*{WHERE}, while others .* at __syncthreads, .*{WHERE}",
    "barrier_in_warp_collective": rf"31 threads, .* at __syncwarp, .* 1 thread, the first 3, at __syncth.*{WHERE}",
    "cluster_barrier": rf"\(1, 0, 0\): 64 .* at cluster_sync, .*{WHERE}.*\(2, 0, 0\): 64 threads, .* exited",
    "lane_missing": rf"31 threads, .* at __shfl_xor_sync, .*{WHERE}.* 1 thread, the first 37, exited",
    "lane_elsewhere": rf"thread \d+: __shfl_\w+ at .*{WHERE}, while other lanes .* at __shfl_\w+, .*{WHERE}",
    "partial_mask": rf"__syncwarp at .*{WHERE}: mask 0000ffff",
    "array": rf"block \(1, 0, 0\) thread 63: index 64 of an array of 64, taken at .*{WHERE}",
    "negative_index": rf"block \(0, 0, 0\) thread 0: index -1 of an array of 64, taken at .*{WHERE}",
    "arena": rf"an array of 4100 bytes taken at .*{WHERE} ends at byte 4100 of the 4096 bytes",
    "past_shared": r"block \(0, 0, 0\) thread \d+: illegal access to address 0x\w+, past the shared memory",
    "before_shared": r"block \(0, 0, 0\) thread \d+: illegal access to address 0x\w+, before the shared memory",
    "rest_of_page": r"wrote to byte -4 of 3200 bytes",
    "global": r"block \(1, 0, 0\) thread 63: illegal access to address 0x\w+$",
    "null": r"illegal access to address (\(nil\)|0x\w{1,2})$",
    "stack": r"illegal access to address 0x\w+, the end of its stack",
    "peer_after_exit": r"block \([01], 0, 0\) thread \d+: .*, the shared memory of a block that has exited",
    "peer_rank": rf"peer at .*{WHERE}: rank 2 in a cluster of 2",
    "copy_alignment": rf"__pipeline_memcpy_async at .*{WHERE}: .* not both multiples of the size of 16",
    "copy_source_alignment": rf"__pipeline_memcpy_async at .*{WHERE}: .* not both multiples of the size of 8",
    "copy_size": rf"__pipeline_memcpy_async at .*{WHERE}: 12 bytes",
    "copy_bounds": rf"{WHERE}: 16 bytes from byte 240 of shared memory on, which are not in one array",
    "copy_to_global": rf"{WHERE}: not to shared memory",
    "load_alignment": rf"load_matrix_sync at .*{WHERE}: address 0x\w+, which is not a multiple of 32 bytes",
    "load_stride": rf"load_matrix_sync at .*{WHERE}: stride of 20 elements",
    "load_bounds": rf"load_matrix_sync at .*{WHERE}: 752 bytes from byte 0 .* not in one array",
    "store_bounds": rf"store_matrix_sync at .*{WHERE}: 1024 bytes from byte 0 .* not in one array",
    "load_differs": rf"load_matrix_sync at .*{WHERE}: its lanes give different addresses",
    "not_tf32": rf"mma_sync at .*{WHERE}: 0x1.555556p-2 is not rounded to tf32",
}


@pytest.mark.parametrize("seed", SEEDS[:3])
def test_wrong(program, seed):
    """All in one process: a kernel that failed leaves nothing behind, as the right one after it shows."""
    names = [name for case in REPORTS for name in (case, "sum")]
    results, _ = run(program, *names, seed=seed)
    assert len(results) == len(names)
    (expected,), _ = run(program, "sum")
    for case, report, after in zip(REPORTS, results[::2], results[1::2], strict=True):
        assert report.startswith("cudaErrorLaunchFailure: "), (case, report)
        assert re.search(REPORTS[case], report, re.DOTALL), (case, report)
        assert after == expected, (case, after)


def test_unwritten_is_nan(program):
    results, _ = run(program, "unwritten", "not_waited_for", "fragment")
    assert [result.strip("- ") for result in results] == ["nan"] * 3


def test_copies_land_early_or_late(program):
    assert len({run(program, "not_waited_for", seed=seed)[0][0] for seed in range(8)}) == 2


EMULATED = ("9.0", "8.0", "12.0")
LAUNCHES = {
    "shared_48k": ("cudaErrorInvalidValue: more dynamic shared memory than cudaFunc",) * 3,
    "shared_allowed": ("", "", ""),
    "shared_of_device": ("cudaErrorInvalidValue",) * 3,
    "cluster_2": ("", "cudaErrorInvalidClusterSize", ""),
    "cluster_and_grid": ("cudaErrorInvalidClusterSize", "cudaErrorInvalidClusterSize", "cudaErrorInvalidClusterSize"),
    "cluster_9": ("cudaErrorInvalidClusterSize",) * 3,
    "cluster_16": ("", "cudaErrorInvalidClusterSize", "cudaErrorInvalidClusterSize"),
    "threads": ("cudaErrorInvalidConfiguration",) * 3,
    "grid": ("cudaErrorInvalidConfiguration",) * 3,
}


@pytest.mark.parametrize("column", range(3), ids=EMULATED)
def test_launches(program, column):
    results, _ = run(program, *LAUNCHES, device=EMULATED[column])
    for case, result in zip(LAUNCHES, results, strict=True):
        expected = LAUNCHES[case][column]
        assert result.startswith(expected) and bool(result) == bool(expected), (case, result)


def test_tensor_cores_cut_off(program):
    """Sums of what is beyond 24 bits are cut, and so are multiplicands beyond tf32."""
    (result,), _ = run(program, "cut_off")
    assert [float.fromhex(x) for x in result.split()] == [1 + 2**-23, -1 - 2**-23, 1.0, float("inf")]


TIES = ((torch.float16, 1 << 12), (torch.bfloat16, 1 << 15))


def test_conversions(program):
    """All of float16's and bfloat16's values, what lies half way between them, and the neighbours of that."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    ties = torch.cat([halves.view(dtype).float().view(torch.int32) + tie for dtype, tie in TIES])
    bits = torch.cat([ties - 1, ties, ties + 1, torch.randint(-(2**31), 2**31, (10000,)).int()])
    subnormal = torch.arange(0, 2**11).float() * 2.0**-25
    x = torch.cat([bits.view(torch.float32), subnormal, -subnormal])
    done = subprocess.run([program, "convert"], input=x.numpy().tobytes(), capture_output=True, check=True).stdout
    out = torch.frombuffer(bytearray(done), dtype=torch.float32).view(-1, 3)
    assert len(out) == len(x)
    torch.testing.assert_close(out[:, 0], x.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(out[:, 1], x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    finite = x.isfinite()
    assert (out[finite, 2].view(torch.int32) & 0x1FFF == 0).all()
    normal = finite & (x.abs() >= 2.0**-126) & out[:, 2].isfinite()
    assert ((out[normal, 2] - x[normal]).abs() <= x[normal].abs() * 2.0**-11).all()


def test_asan(program_asan):
    good = [*RIGHT, *(case for case in REPORTS if case != "rest_of_page"), *RIGHT]
    results, said = run(program_asan, *good, seed=1)
    assert said == ""
    assert len(results) == len(good)
    for case in ("heap", "copy_from_heap", "between_arrays", "rest_of_page"):
        _, said = run(program_asan, case)
        assert "AddressSanitizer" in said and "shim_wrong.h" in said, case


RACES = ("no_barrier", "barrier_after_use", "copy_without_barrier", "between_blocks", "shuffle_is_no_fence")


@pytest.mark.nightly
def test_tsan(program_tsan):
    fast = [case for case in RIGHT if case != "concurrent"]
    for seed in SEEDS[:2]:
        results, said = run(program_tsan, *fast, *fast, seed=seed)
        assert said == ""
        assert [result.split()[-1] for result in results] == ["0x1p+0"] * len(fast) * 2
    for case in RACES:
        _, said = run(program_tsan, case)
        expected = set(lines_with(f"// {case}"))
        assert expected
        assert "data race" in said, case
        assert expected <= {int(line) for line in re.findall(r"shim_wrong\.h:(\d+)", said)}, (case, said)

"""The kernels under ThreadSanitizer: shared and global memory are used by one thread at a time, or have a barrier in
between. A program of its own (selection.cpp) goes once through all of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

SOURCES = Path(__file__).parents[2] / "csrc/cuda"
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if emulated.why_not():
        pytest.skip(emulated.why_not())
    directory = tmp_path_factory.mktemp("tsan")
    (directory / "probe.cpp").write_text("int main() {}")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")))
    linked = [compiler, "-fsanitize=thread", directory / "probe.cpp", "-o", directory / "probe"]
    if subprocess.run(linked, capture_output=True).returncode:
        pytest.skip("the compiler has no ThreadSanitizer")
    probe = subprocess.run([directory / "probe"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"ThreadSanitizer does not run on this machine: {probe.stderr.strip()[:200]}")
    return emulated.build(target="selection") / "selection"


def run(program, *calls, seed=0, planted=""):
    environment = dict(
        os.environ,
        XK_EMULATION_SEED=str(seed),
        XK_EMULATION_PLANTED=planted,
        TSAN_OPTIONS="suppress_equal_addresses=0 atexit_sleep_ms=0",
    )
    return subprocess.run([program, *calls], capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", SEEDS)
def test_no_races(program, seed):
    done = run(program, seed=seed)
    assert done.stderr == "" and done.returncode == 0, done.stderr[-4000:]
    calls = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    launched = {kernel for kernels in calls.values() for kernel in kernels.split()}
    launched.remove("fragment_gradients")  # is fragment_mix with three results
    kernels = {re.sub("_kernel$", "", name) for name in all_kernels()}
    assert launched == kernels, calls


def all_kernels():
    text = "".join(path.read_text() for path in SOURCES.iterdir() if path.suffix in (".h", ".cu"))
    return re.findall(r"(\w+_kernel)\(const __grid_constant__", text)


def steps():
    """Where barriers can be left out: (file, line)."""
    lines = ((path.name, *line) for path in SOURCES.glob("*.h") for line in enumerate(path.read_text().splitlines(), 1))
    return [(name, number) for name, number, line in lines if "XK_STEP(barrier," in line]


def spans(lines, at):
    """Whether some of these are shortly before the place, and some shortly after it."""
    before, after = [line for line in lines if line < at], [line for line in lines if line > at]
    return bool(before and after) and min(after) - max(before) < 80


def test_planted_races(program):
    """Of each barrier that is left out a race is told, between a line before and a line after it in its kernel."""
    done = run(program, "one block", "two passes", planted="barrier")
    races = []
    for text in re.split("(?=WARNING: ThreadSanitizer: data race)", done.stderr)[1:]:
        races.append([(name, int(line)) for name, line in re.findall(r"/csrc/cuda/(\w+\.h):(\d+)", text)])
    places = steps()
    assert places
    for name, at in places:
        found = [{line for file, line in race if file == name} for race in races]
        assert any(spans(lines, at) for lines in found), (
            f"no race across {name}:{at}, but {sorted({place for race in races for place in race})}"
        )

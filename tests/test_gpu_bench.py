"""Benchmarks of a GPU where there is none: the reader of machine code, the model, its page, and every step of a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels that are looked at are Triton's, which is not installed")

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
LOOP = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4] ;
.L_x_0:
        /*0020*/                   DEPBAR.LE SB0, 0x1 ;
.L_x_1:
        /*0030*/                   LDS R3, [R5] ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/                   LDGSTS.E.BYPASS.128 [R7], [R8] ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R7], [R9] ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   STG.E.64 [R8], R10 ;
        /*00a0*/              @!P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP;
"""


@pytest.fixture
def bench(monkeypatch):
    """Modules of this checkout's benchmark."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
        monkeypatch.delitem(sys.modules, name)

    def load(name):
        return __import__(f"bench.{name}", fromlist=["bench"])

    return load


def test_machine_code_is_read(bench):
    (code,) = bench("sass").read(LOOP).values()
    (loop,) = code.over_tokens
    assert len(code.instructions) == 13
    assert (loop.start, loop.stop) == (2, 11)
    assert code.units(loop) == 2.5 and code.loaded(loop) == 2
    assert code.executed(loop, 1) == 9
    assert code.executed(loop, 4) == 9 + 3 * 2
    assert code.ahead(loop) == 1


def test_model_takes_what_lasts_longest(bench):
    model = bench("gpu_model")
    (gpu, faster) = model.GPUS
    full = 132 * 4
    base = model.Launch(10**9, full, 4, 100, 1000, 0, 8192, 1)
    copied = base.moved / gpu.copy
    assert model.predict(base, gpu).binds == "memory"
    assert model.predict(base, gpu).seconds == pytest.approx(copied, rel=0.02)
    assert model.predict(base, faster).seconds < model.predict(base, gpu).seconds
    slow = base._replace(issued=10**6)
    assert model.predict(slow, gpu).binds == "issue"
    assert model.predict(slow, gpu).seconds == pytest.approx(model.predict(slow, faster).seconds)
    assert model.predict(base._replace(iterations=10**5, issued=10), gpu).binds == "latency"
    # one program too many is a wave of its own
    late = model.predict(base._replace(programs=full + 1), gpu)
    assert late.binds == "memory, waves"
    assert late.seconds == pytest.approx(2 * copied, rel=0.02)
    assert late.of_copy == pytest.approx(0.5, rel=0.02)


def test_pieces_are_read_and_copied(bench, triton_runs, monkeypatch):
    """In the interpreter, which gives no times; `measure` raises if a copy or a sum is wrong."""
    memory = bench("gpu_memory")
    monkeypatch.setattr(memory, "READ", 1 << 15)
    monkeypatch.setattr(memory, "PIECES", (64, 96))
    rows = list(memory.measure(1, 1e9, "cpu", False, checked=True))
    assert {(row.piece, row.access, row.program) for row in rows} == {
        (piece, access, program)
        for piece in (64, 96)
        for access in ("read", "copy")
        for program in ("a head", "whole rows")
    }


def test_results_are_judged(bench, need_backend, monkeypatch, capsys):
    """By backends that compute here; a wrong result is found in each output."""
    need_backend("cpp")
    kernels, launches, workloads = bench("gpu_kernels"), bench("gpu_launches"), bench("workloads")
    given = (workloads.OpShape(2, 40, 2, 16), torch.bfloat16, "cpu", None, "cpp")
    assert kernels.is_right(*given, judged=True) is True
    assert kernels.is_right(*given, judged=False) is None
    compute = launches.gradients
    for wrong, name in enumerate(kernels.RESULTS):

        def gradients(*args, wrong=wrong):
            return tuple(x * 1.1 if i == wrong else x for i, x in enumerate(compute(*args)))

        monkeypatch.setattr(launches, "gradients", gradients)
        assert kernels.is_right(*given, judged=True) is False
        assert f" {name}" in capsys.readouterr().out


def launched():
    """Names of the kernels that the model's calls launch now, and of their directions."""
    sys.path.insert(0, str(ROOT / "tests" / "triton_kernels"))
    import aot

    found = set()
    for D in (32, 48):
        for dtype in (torch.float32, torch.bfloat16):
            for name, launch in aot.launches(aot.Job("sm_90", dtype, D, "query_key-token")).items():
                if name in ("gram", "apply", "forward", "gram of dout", "map_backward", "gradients"):
                    found.add(launch.kernel.__name__)
    found.update(x.kernel.__name__ for x in aot.launches(aot.Job("sm_90", torch.bfloat16, 256, aot.LAYER)).values())
    return found


def test_table_of_the_page_is_current_in_form(bench):
    """The kernels that ops launch, at both dtypes and shapes; test_table_of_the_page_is_current has the numbers."""
    model = bench("gpu_model")
    text = PAGE.read_text()
    (body,) = re.findall(re.escape(model.BEGIN) + "(.*?)" + re.escape(model.END), text, re.S)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines() if line.startswith("|")
    ]
    assert tuple(lines[0]) == model.HEADINGS
    rows = [dict(zip(model.HEADINGS, line, strict=True)) for line in lines[2:] if len(line) == len(model.HEADINGS)]
    assert {row["kernel"].split(",")[0] + "_kernel" for row in rows} == launched()
    assert launched() <= set(bench("gpu_launches").TOKENS), "how many tensors does a new kernel read and write?"
    assert {(row["dtype"], row["(B,N,H,D)"]) for row in rows} == {
        (dtype, str(shape)) for dtype in ("float32", "bfloat16") for shape in (*model.SHAPES, model.LAYER)
    }


def run(*command, **environment):
    """A command as a user runs it, without the interpreter that the tests turn on."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


@pytest.mark.nightly
def test_table_of_the_page_is_current():
    import triton

    page = PAGE.read_text()
    if f"Compiled by Triton {triton.__version__} " not in page:
        pytest.skip(f"the page is by another version of Triton than {triton.__version__}")
    printed = run(sys.executable, "-m", "bench.gpu_model")
    made = printed[: printed.index("\n\nThe CUDA kernels")] if "\n\nThe CUDA kernels" in printed else printed.strip()
    assert made in page, "python -m bench.gpu_model --write docs/gpu.md"


@pytest.mark.nightly
def test_what_is_prepared_is_not_compiled_again(tmp_path):
    arguments = ("-m", "bench.gpu_prepare", "--out", tmp_path, "--jobs", "1", "--no-tuner", "--only", "1")
    first, second = (run(sys.executable, *arguments) for _ in range(2))
    assert not re.search(r"^0 compiled", first, re.M)
    assert re.search(r"^0 compiled, [1-9]\d* found", second, re.M), second
    assert (tmp_path / "prepared.tar.xz").stat().st_size < 10**6


@pytest.mark.nightly
def test_every_step_of_a_run_on_a_gpu(tmp_path):
    """Each step's command, with nothing launched: a second call finds all of them done."""
    environment = {"GPU_CHECK_DRY": "1", "GPU_CHECK_SCALE": "10", "TMPDIR": str(tmp_path), "PYTHON": sys.executable}
    run("bash", "bench/gpu_check.sh", tmp_path / "out", **environment)
    again = run("bash", "bench/gpu_check.sh", tmp_path / "out", **environment)
    assert len(re.findall("done before", again)) >= 15, again
    assert list((tmp_path / "out" / "results" / "dry").glob("kernels-triton-*.json"))

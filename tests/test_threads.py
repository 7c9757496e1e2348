"""The kernels use torch's OpenMP threads only, and respect torch.set_num_threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases import make_problem

import xformer_kernels as xk
from xformer_kernels.testing import assert_bitwise

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
needs_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")

PRELUDE = """
import os, sys, threading, time
import torch
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(1 << 22)
for _ in range(3):
    x.exp(); (x[:1000000].view(1000, 1000) @ x[:1000000].view(1000, 1000))   # torch starts the threads that it wants
def threads():
    return set(os.listdir("/proc/self/task"))
before = threads()
import xformer_kernels as xk
q, k, v = torch.randn(3, 1, 4, 60000, 32, requires_grad=True).unbind(0)
t = torch.ones(4)
def step():
    xk.xfa(q, k, v, t, backend="cpp").sum().backward()
"""


@pytest.fixture
def run_python(need_backend):
    """Runs a script in a new interpreter, where no other test has started threads."""
    need_backend("cpp")

    def run(script: str, threads: int, timeout: float = 120) -> str:
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(threads)]
        env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    return run


@linux
def test_one_openmp_library(run_python):
    """Two OpenMP runtimes in one process would each start threads, which would compete for the cores."""
    found = run_python(
        """
        step()
        paths = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in os.path.basename(line.split()[-1])}
        print(*sorted(p for p in paths if os.path.basename(p).startswith(("libgomp", "libomp", "libiomp"))), sep="\\n")
        """,
        2,
    )
    assert len(found.splitlines()) == 1, found


@linux
@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.nightly), 2, 4])
def test_no_additional_threads(threads, run_python):
    """torch's autograd engine may start threads; a forward, and a second backward, must not start any."""
    new = run_python(
        """
        with torch.no_grad():
            xk.xfa(q, k, v, t, backend="cpp")
        print(len(threads() - before))
        torch.ones(1 << 22, requires_grad=True).exp().sum().backward()
        before = threads()
        step(); step()
        print(len(threads() - before))
        """,
        threads,
    )
    assert new.split() == ["0", "0"]


@linux
@needs_cores
def test_set_num_threads_is_respected(run_python):
    """By CPU time per thread: only the caller with 1 thread, one more with 2, and only the caller with 1 again."""
    workers = run_python(
        """
        def used():
            return {task: int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in threads()}
        def workers(count):
            torch.set_num_threads(count)
            with torch.no_grad():
                xk.xfa(q, k, v, t, backend="cpp")
                time.sleep(0.3)   # idle threads of the call before stop spinning
                start = used()
                for _ in range(20):
                    xk.xfa(q, k, v, t, backend="cpp")
                return sum(time - start.get(task, 0) > 10_000_000 for task, time in used().items())
        print(workers(1), workers(2), workers(1))
        """,
        4,
    )
    assert workers.split() == ["1", "2", "1"]


@linux
def test_after_fork(run_python):
    """A forked child process, such as a DataLoader worker, gets the same result with one thread and does not hang."""
    output = run_python(
        """
        with torch.no_grad():
            expected = xk.xfa(q, k, v, t, backend="cpp")
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                os._exit(0 if torch.equal(xk.xfa(q, k, v, t, backend="cpp"), expected) else 1)
            deadline = time.time() + 60
            while (done := os.waitpid(child, os.WNOHANG))[0] == 0 and time.time() < deadline:
                time.sleep(0.05)
            if done[0] == 0:
                os.kill(child, 9)
            print("hangs" if done[0] == 0 else os.waitstatus_to_exitcode(done[1]))
        """,
        2,
    )
    assert output == "0"


def test_calls_from_many_python_threads(kernel, device, slow, interpreted):
    """The kernels release the GIL: concurrent calls must not share scratch memory."""
    least = 50 if interpreted else 300 if slow else 1100
    problems = [make_problem((2, least + 100 * i, 2, 24), seed=i, device=device) for i in range(4)]
    expected = [p.run(xk.xfa, backend=kernel) for p in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: problems[i % 4].run(xk.xfa, backend=kernel), range(12 if slow else 48)))
    for i, result in enumerate(results):
        for name, x in result.items():
            assert_bitwise(x, expected[i % 4][name], f"{name} of call {i}")

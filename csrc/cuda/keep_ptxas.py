"""Runs nvcc and keeps what its assembler says of each kernel (-Xptxas -v: registers, spills, shared memory).

    keep_ptxas.py nvcc ... -o OBJECT    writes OBJECT.ptxas, and prints only what else nvcc says
    keep_ptxas.py --join LOG OBJECT...  all of them in one file

A file beside each object, since a build that compiles some of them anew still has to know about the others.
"""

import re
import subprocess
import sys
from pathlib import Path

ABOUT_KERNELS = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def compile_one(command: list[str]) -> int:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines = done.stdout.splitlines(keepends=True)
    kept = [line for line in lines if ABOUT_KERNELS.match(line)]
    sys.stdout.writelines(line for line in lines if not ABOUT_KERNELS.match(line))
    Path(command[command.index("-o") + 1] + ".ptxas").write_text("".join(kept))
    return done.returncode


if __name__ == "__main__":
    if sys.argv[1] == "--join":
        Path(sys.argv[2]).write_text("".join(Path(name + ".ptxas").read_text() for name in sorted(sys.argv[3:])))
    else:
        sys.exit(compile_one(sys.argv[1:]))

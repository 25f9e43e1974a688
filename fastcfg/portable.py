"""Arithmetic that is the same on every x86 processor with AVX2, for results that are compared to the last bits of float32.

torch's libraries choose their code by the processor, and each choice adds up in another order. Held to instructions that all
have, they round alike everywhere. They read the choice when they first compute, so it belongs in a process's environment.
NumPy's, which Triton's interpreter uses, are not among them.
"""

from __future__ import annotations

import os
import subprocess
import sys

ENVIRONMENT = {
    "MKL_CBWR": "COMPATIBLE",  # MKL's one mode that is the same on Intel's processors and on others
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


def active() -> bool:
    """Whether this process was started with it."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`fastcfg` with these arguments in a process that has it: exit code and output."""
    command = [sys.executable, "-c", "from fastcfg.cli import main; main(prog_name='fastcfg')", *arguments]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)

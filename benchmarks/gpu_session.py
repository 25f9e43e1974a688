"""All that a GPU must show, in one command from a bare checkout: correctness first, then ceilings, kernels and loops.

    python benchmarks/gpu_session.py                          # under 9 minutes; writes benchmarks/results/<gpu>.csv
    python benchmarks/gpu_session.py --sections tune          # one section, with all the time to itself
    TRITON_INTERPRET=1 python benchmarks/gpu_session.py --dry-run --out /tmp/dry    # the code paths, tiny, without a GPU

Needs torch and triton, no installation and no network. Rows are written as they come. A section that fails is a row with
its message, and one that takes too long is stopped; the others go on. Exit code 1 if anything was wrong.

"tune" also writes <gpu>.json beside the CSV: the tiles that won on this GPU. Name its path in FASTCFG_TUNED to use it; a table
in kernels/tables is used wherever that GPU is. The other sections run with the table that was in use when they began.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

TOTAL = 525.0  # seconds, of which each section gets what it says here or what is left
GRACE = 1.3  # a section is interrupted at this many times its own length, should it not stop by itself


def sections() -> dict[str, tuple[float, Callable[[Any], None]]]:
    """name: (seconds, what it runs), in order."""
    from gpu import correctness, loops, speed, tune

    return {
        "correctness": (75, correctness.kernels),
        "golden": (30, correctness.golden),
        "invariance": (35, correctness.invariance),
        "graphs": (35, correctness.graphs),
        "ceilings": (10, speed.ceilings),
        "kernels": (45, speed.kernels),
        "fused": (90, loops.fused),
        "eager": (45, loops.eager),
        "diffusers": (25, loops.diffusers),
        "spans": (30, loops.spans),
        "tune": (45, tune.tune),
        "compiled": (150, loops.compiled),
    }


def main() -> int:
    known = sections()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    parser.add_argument("--sections", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    arguments = parser.parse_args()
    session = _session(arguments.dry_run, arguments.out)
    begin, failures = time.monotonic(), 0
    for name in arguments.sections:
        left = TOTAL - (time.monotonic() - begin)
        alone = len(arguments.sections) == 1
        seconds = min(TOTAL if alone or arguments.dry_run else known[name][0], left)
        failures += _run(session, name, known[name][1], seconds)
    session.report.close()
    bad = [row for row in session.report.path.read_text().splitlines() if "EXCEEDS" in row or "DIFFER" in row]
    print(f"\n{session.report.path}: {failures} sections failed, {len(bad)} checks did not hold", *bad, sep="\n")
    return int(bool(failures or bad))


def _session(dry: bool, out: Path) -> Any:
    import torch
    from gpu.report import Report, Session

    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("a dry run interprets the kernels: set TRITON_INTERPRET=1")
    if not dry and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: use --dry-run to try the code paths")
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    return Session(device, dry, Report(out, device), {})


def _run(session: Any, name: str, function: Callable[[Any], None], seconds: float) -> int:
    """Runs a section; 1 if it failed."""
    session.report.section = name
    if seconds <= 0:
        session.report.row(name, "left out: out of time", "note")
        return 0
    session.begin(seconds)
    begin = time.monotonic()
    try:
        with _interrupted_after(seconds * GRACE):
            function(session)
    except Exception as error:  # whatever it is, the other sections are still to run
        traceback.print_exc()
        session.report.row(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", "error")
        return 1
    finally:
        session.report.row(name, time.monotonic() - begin, "seconds of the section")
        _release()
    return 0


def _release() -> None:
    """Gives a section's memory back."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

"""All that a GPU must show, in one command from a bare checkout: correctness first, then ceilings, kernels and loops.

    python benchmarks/gpu_session.py                          # under 9 minutes; writes benchmarks/results/<gpu>.csv
    python benchmarks/gpu_session.py --sections tune          # one section, with all the time to itself
    TRITON_INTERPRET=1 python benchmarks/gpu_session.py --dry-run --out /tmp/dry    # the code paths, tiny, without a GPU

Needs torch and triton, no installation and no network. Rows are written as they come. A section that fails is a row with
its message, one that takes too long is stopped, and one that hangs or breaks the device loses its process; the others go on.
Rows of sections that are not run stay in the CSV. Exit code 1 if anything was wrong.

"tune" also writes <gpu>.json beside the CSV: the tiles that won on this GPU. Name its path in FASTCFG_TUNED to use it; a table
in kernels/tables is used wherever that GPU is. "tuned" runs with the new table, the other sections with what was in use before.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

TOTAL = 525.0  # seconds, of which each section gets what it says here or what is left
GRACE = 1.3  # a section is interrupted at this many times its own length, should it not stop by itself
AGAIN = 5.0  # seconds after which it is interrupted once more: a library may have taken the first for its own


def sections() -> dict[str, tuple[float, Callable[[Any], None]]]:
    """name: (seconds, what it runs), in order: what may be left out for time comes last."""
    from gpu import correctness, loops, speed, tune

    return {
        "correctness": (75, correctness.kernels),
        "golden": (25, correctness.golden),
        "network": (15, correctness.network),
        "invariance": (30, correctness.invariance),
        "graphs": (35, correctness.graphs),
        "ceilings": (10, speed.ceilings),
        "kernels": (40, speed.kernels),
        "fused": (90, loops.fused),
        "eager": (40, loops.eager),
        "compiled": (120, loops.compiled),
        "diffusers": (20, loops.diffusers),
        "spans": (25, loops.spans),
        "tune": (75, tune.tune),
        "tuned": (45, loops.tuned),
    }


def main() -> int:
    known = sections()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the CSV")
    parser.add_argument("--sections", nargs="+", choices=known, default=list(known), metavar="NAME", help=", ".join(known))
    parser.add_argument("--here", type=float, metavar="SECONDS", help="in this process, which nobody then watches over")
    arguments = parser.parse_args()
    if arguments.here is not None:
        return _here(arguments, known)
    return _watched(arguments)


def _watched(arguments: argparse.Namespace) -> int:
    """The sections in processes that may be lost."""
    from gpu.supervise import supervise

    def command(names: Sequence[str], seconds: float) -> list[str]:
        options = ["--out", str(arguments.out), "--here", f"{seconds:.0f}", *["--dry-run"] * arguments.dry_run]
        return [sys.executable, str(Path(__file__).resolve()), *options, "--sections", *names]

    def lost(section: str, why: str, path: str) -> None:
        from gpu.report import add_lost

        add_lost(Path(path), section, why)

    return int(supervise(command, arguments.sections, TOTAL, lost) > 0)


def _here(arguments: argparse.Namespace, known: dict[str, tuple[float, Callable[[Any], None]]]) -> int:
    from gpu.supervise import LOST, begin

    session = _session(arguments)
    end, failures = time.monotonic() + arguments.here, 0
    for name in arguments.sections:
        left = end - time.monotonic()
        # A section that runs alone has all the time, and a dry run's times mean nothing
        seconds = left if len(arguments.sections) == 1 or arguments.dry_run else min(known[name][0], left)
        limit = min(seconds * GRACE, left)
        begin(name, limit, session.report.path)
        failures += _run(session, name, known[name][1], seconds, limit)
        if not _usable(session):
            return LOST
    session.report.close()
    bad = [row for row in session.report.path.read_text().splitlines() if "EXCEEDS" in row or "DIFFER" in row]
    print(f"\n{session.report.path}: {failures} sections failed, {len(bad)} checks did not hold", *bad, sep="\n")
    return int(bool(failures or bad))


def _session(arguments: argparse.Namespace) -> Any:
    import torch
    from gpu.report import Report, Session

    dry = arguments.dry_run
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("a dry run interprets the kernels: set TRITON_INTERPRET=1")
    if not dry and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: use --dry-run to try the code paths")
    # What kernels and engines are compared with is float32 where it says so: torch rounds convolutions to TF32 by itself
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())
    return Session(device, dry, Report(arguments.out, device, arguments.sections))


class OutOfTime(BaseException):
    """Not an Exception: libraries catch those, and go on."""


def _run(session: Any, name: str, function: Callable[[Any], None], seconds: float, limit: float) -> int:
    """Runs a section; 1 if it failed."""
    session.report.section = name
    if seconds <= 0:
        session.report.row(name, "left out: out of time", "note")
        return 0
    session.begin(seconds)
    begin = time.monotonic()
    try:
        with _interrupted_after(limit):
            function(session)
    except OutOfTime:
        session.report.row(name, f"stopped after {limit:.0f} s", "note")
    except Exception as error:  # whatever it is, the other sections are still to run
        traceback.print_exc()
        session.report.row(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", "error")
        return 1
    finally:
        session.report.row(name, time.monotonic() - begin, "seconds of the section")
    return 0


def _usable(session: Any) -> bool:
    """Gives a section's memory back. False where the device answers with an error, as it does for good after a fault."""
    import torch

    gc.collect()
    if session.device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(session.device)
        torch.cuda.empty_cache()
    except RuntimeError:
        traceback.print_exc()
        return False
    return True


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

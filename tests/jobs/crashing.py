"""Killing a job's run again and again: the harness of the crash tests, and, as a command, their long form.

    python tests/jobs/crashing.py --kills 50

starts `fastcfg job run` in a process group of its own, kills the group with SIGKILL at a random moment, starts it again, and
so on; then lets it end, and compares every unit with an uninterrupted run's. Runners: local with one and two workers, and Ray
with two actors where Ray is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 120.0  # seconds in which a run must get further
WHOLE = 3600.0  # and those in which one must end that is not killed, in the long form
MOST = 5  # units that a run may write while it waits for its kill


@dataclass(frozen=True)
class Kill:
    """A run that was killed: the units there before and after it, and whether it left a half-written file."""

    before: int
    after: int
    half: bool


@dataclass(frozen=True)
class Started:
    """A run under way, the leader of its own process group. wait() -> its exit code, -N where signal N ended it.

    log: what it printed, where that is kept.
    """

    pid: int
    poll: Callable[[], int | None]
    log: Path | None = None

    @property
    def printed(self) -> str:
        assert self.log is not None
        return self.log.read_text()

    def wait(self, limit: float = LIMIT) -> int:
        deadline = time.monotonic() + limit
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"still running after {limit:g} s"
            time.sleep(0.005)
        return code

    def send(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signum)


Start = Callable[..., Started]


def start_command(arguments: Sequence[str], log: Path | None = None) -> Started:
    """`fastcfg ARGUMENTS` as a user starts it. log: a file for what it prints."""
    code = "from fastcfg.cli import main; main()"
    with open(log or os.devnull, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], start_new_session=True, stdout=output, stderr=output
        )  # fmt: skip
    return Started(process.pid, process.poll, log)


@contextmanager
def forking() -> Any:
    """Yields a Start whose runs are forked from one process that has imported all there is to import.

    Importing torch takes longer than all else in a tiny job; so a test can kill many runs at moments that matter.
    Its keywords: log, a file for what the run prints; fsize, the most bytes that the run may write to one file; sync, how
    many seconds its disk takes.
    """
    code = "import sys; sys.path.insert(0, sys.argv[1]); import crashing; crashing._serve()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process is forked safely before torch has threads
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(*question: Any) -> Any:
        print(json.dumps(question), file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    def start(
        arguments: Sequence[str], log: Path | None = None, fsize: int = resource.RLIM_INFINITY, sync: float = 0.0
    ) -> Started:
        pid = ask("start", [list(arguments), str(log or os.devnull), fsize, sync])
        return Started(pid, lambda: ask("poll", pid), log)

    try:
        yield start
    finally:
        server.stdin.close()
        server.wait(LIMIT)


def _serve() -> None:
    """The process that `forking` forks runs from; it answers questions of one line each."""
    from fastcfg.checkpoints import load
    from fastcfg.cli import job  # noqa: F401 - imported for the runs
    from fastcfg.jobs import local_runner

    load("fashion-mnist")  # brings what torch imports when it is first needed
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(null, stream)
    local_runner._start = _start_by_fork
    for line in questions:
        question, argument = json.loads(line)
        if question == "start":
            pid = os.fork()
            if pid == 0:
                _run(*argument)
            answer: int | None = pid
        else:
            done, status = os.waitpid(argument, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        print(json.dumps(answer), file=answers, flush=True)


def _run(arguments: list[str], log: str, fsize: int, sync: float) -> None:
    """The command in a forked process, which ends with it."""
    from fastcfg.cli import main

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fsize, fsize))
    if sync:
        real = os.fsync
        os.fsync = lambda file: (time.sleep(sync), real(file))[1]
    code = 70
    try:
        main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_by_fork(theirs: Any) -> Any:
    """`fastcfg.jobs.local_runner._start` without a new interpreter."""
    from fastcfg.jobs import local_runner

    before = signal.pthread_sigmask(signal.SIG_BLOCK, local_runner.SIGNALS)
    pid = os.fork()
    if pid == 0:
        for descriptor in range(3, 256):  # as a new process: above all, no parent's end of a pipe
            if descriptor != theirs.fileno():
                with suppress(OSError):
                    os.close(descriptor)
        local_runner.serve(theirs.fileno())
        os._exit(70)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _Forked(pid)


class _Forked:
    """As much of a subprocess.Popen as a runner asks of its workers."""

    def __init__(self, pid: int):
        self.pid = pid

    def wait(self, timeout: float | None = None) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def unit_hashes(out: Path) -> dict[str, str]:
    """SHA-256 of every unit's file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (out / "units").glob("[!.]*")}


def kill_until_done(
    start: Start,
    command: Sequence[str],
    out: Path,
    kills: int,
    early: float,
    draw: random.Random,
    on_kill: Any = id,
    late: float = 0.06,
    last: float = LIMIT,
) -> list[Kill]:
    """Runs `command`, which writes a job to `out`, and kills `kills` of the runs; one more must end within `last` seconds.

    Two in five are killed within `early` seconds: while they start, make the job's files or compute their first unit. The
    others within `late` seconds after one to three units of theirs appeared; and any, should the machine be faster than it was,
    before it has written `MOST` more. on_kill(kill) is called after each.
    """
    killed: list[Kill] = []
    while len(killed) < kills:
        before, begin, want = _count(out), time.monotonic(), draw.choice([0, 0, 1, 2, 3])
        run = start(command)
        while _count(out) < before + want and run.poll() is None:
            assert time.monotonic() < begin + LIMIT, f"no unit in {LIMIT:g} s"
            time.sleep(0.002)
        moment = time.monotonic() + draw.uniform(0, early if want == 0 else late)
        while time.monotonic() < moment and _count(out) < before + want + MOST:
            time.sleep(0.002)
        run.send(signal.SIGKILL)
        code = run.wait()
        assert code == -signal.SIGKILL, f"the run ended by itself ({code}) after {len(killed)} kills: it needs more units"
        half = any((out / "units").glob(".*.tmp")) if (out / "units").is_dir() else False
        killed.append(Kill(before, _count(out), half))
        on_kill(killed[-1])
    code = start(command).wait(last)
    assert code == 0, f"the last run ended with exit code {code}"
    return killed


def _count(out: Path) -> int:
    return sum(1 for _ in (out / "units").glob("[!.]*"))


SPEC = """\
checkpoint = "fashion-mnist"
count = {count}
scales = [1.0, 2.0]
steps = 10
dtype = "fp32"
unit_size = 4
batch = 4
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each runner's runs")
    parser.add_argument("--early", type=float, default=6.0, help="seconds in which a run has started")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # 4 units a kill: more than a run gets to write
        (folder / "spec.toml").write_text(SPEC.format(count=8 * options.kills))
        assert start_command(["job", "run", str(folder / "spec.toml"), "--out", str(folder / "whole")]).wait(WHOLE) == 0
        _crash("local, 1 worker", start_command, ["--workers", "1"], folder, options)
        _crash("local, 2 workers", start_command, ["--workers", "2"], folder, options)
        if importlib.util.find_spec("ray"):
            from ray_cluster import ENVIRONMENT, two_nodes

            os.environ.update(ENVIRONMENT)
            with two_nodes() as cluster:
                _crash("Ray, 2 actors", _with_actors(cluster), ["--ray", cluster.address], folder, options)


def _crash(name: str, start: Start, arguments: Sequence[str], folder: Path, options: argparse.Namespace) -> None:
    out = folder / name
    command = ["job", "run", str(folder / "spec.toml"), "--out", str(out), *arguments]
    draw = random.Random(f"{options.seed} {name}")
    killed = kill_until_done(start, command, out, options.kills, options.early, draw, _show, last=WHOLE)
    assert unit_hashes(out) == unit_hashes(folder / "whole"), f"{name}: units differ from the uninterrupted run's"
    print(
        f"{name}: {len(killed)} runs killed, {sum(kill.after > kill.before for kill in killed)} of them after writing units, "
        f"{sum(kill.half for kill in killed)} while writing one; all {len(unit_hashes(out))} units are equal",
        flush=True,
    )


def _with_actors(cluster: Any) -> Start:
    """A Start whose runs take the cluster's actors along when they are killed, as when a machine's plug is pulled."""

    class Run(Started):
        def send(self, signum: int) -> None:
            super().send(signum)
            if signum == signal.SIGKILL:
                cluster.kill_workers()

    def start(arguments: Sequence[str]) -> Started:
        started = start_command(arguments)
        return Run(started.pid, started.poll)

    return start


def _show(kill: Kill) -> None:
    print(f"  killed with {kill.before} -> {kill.after} units{', one half written' if kill.half else ''}", file=sys.stderr)


if __name__ == "__main__":
    main()

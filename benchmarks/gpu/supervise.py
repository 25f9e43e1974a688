"""Running a session's sections in a process that may be lost: a kernel that hangs or faults takes no later section along.

The sections run one after another in one child, so that what a section compiled serves the next. The child says when it begins
one, and for how long. One that neither ends nor is interrupted in its time is killed, and a child that is gone, whatever took
it, is followed by another with the sections that are left. This process itself never touches the GPU.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

BEGINS = "== section "  # name, seconds and the report's path follow, on a line of their own
LOST = 75  # the exit code of a child whose device can be used no more
MARGIN = 15.0  # seconds for a section to stop by itself
START = 60.0  # and for a child to begin its first

Command = Callable[[Sequence[str], float], Sequence[str]]
Lost = Callable[[str, str, str], None]


def supervise(command: Command, sections: Sequence[str], seconds: float, lost: Lost, margin: float = MARGIN) -> int:
    """Runs the sections in children, `command(sections, seconds)` each, for so many seconds in all; how much went wrong.

    lost(section, why, path) is called for each section that took its child along; path: of the report. A child that begins
    no section is the last.
    """
    end, left, wrong = time.monotonic() + seconds, list(sections), 0
    while left and (remaining := end - time.monotonic()) > 0:
        child = _Child(command(left, remaining), end)
        why = child.follow(margin)
        wrong += bool(why) or child.code != 0
        if not child.section:
            break
        if why:
            lost(child.section, why, child.path)
        left = left[left.index(child.section) + 1 :] if why else []
    return wrong


def begin(section: str, seconds: float, path: Path) -> None:
    """Said by the child."""
    print(f"{BEGINS}{section} {seconds:.1f} {path}", flush=True)


class _Child:
    """A process, the leader of its own group, whose lines are passed on. section: the one it began last. end: of all."""

    def __init__(self, command: Sequence[str], end: float):
        self.section, self.path, self.code = "", "", 0
        self._end = end
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def follow(self, margin: float) -> str:
        """Why it was lost, once it is gone; "" if it ended by itself, its sections done. margin: beyond a section's time."""
        try:
            in_time = self._passed_on(margin)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # its compilers too
            self.code = self._process.wait()
        if not in_time:
            return "hung, and was killed"
        return "" if self.code in (0, 1) else f"took its process along: exit code {self.code}"

    def _passed_on(self, margin: float) -> bool:
        """Passes its lines on; whether it ended within the time of the section that it was in."""
        limit = time.monotonic() + START
        while time.monotonic() < min(limit, self._end) + margin:
            ended = self._process.poll() is not None  # and what it said is there, or will be in a moment
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if ended:
                    return True
                continue
            if line.startswith(BEGINS):
                self.section, seconds, self.path = line.removeprefix(BEGINS).rstrip().split(" ", 2)
                limit = time.monotonic() + float(seconds)
            else:
                print(line, end="", flush=True)
        return False

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

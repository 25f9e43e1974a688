"""What can end a job other than bad input: each is a `fastcfg.Error`, with the exit code of the command line."""

from __future__ import annotations

import signal

from fastcfg.errors import Error


class JobError(Error):
    """The job was sound and did not go through: a full disk, no permission, units that kept failing. Exit code 1.

    What was written before stays, and the same command goes on from it.
    """

    exit_code = 1


class StoppedError(Error):
    """SIGINT or SIGTERM ended a run, between units, or an export. Exit code 130 or 143, as shells count signals."""

    def __init__(self, signum: int, left: str = ""):
        """left: what remains, where there is something to say of that."""
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f": {left}" if left else ""))
        self.signum = signum
        self.exit_code = 128 + signum


class Signalled(BaseException):
    """SIGINT or SIGTERM, where it found the main thread; `fastcfg.jobs.run.signals` makes a StoppedError of it at the end.

    No Exception: what is caught as an error of a spec, or as a reason to do without a compiler, must not be a signal.
    """

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class DamagedError(Error):
    """A unit's file is not what was written: cut short, changed, or another unit's. The message says which. Exit code 1."""

    exit_code = 1

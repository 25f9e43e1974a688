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

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum


class DamagedError(Error):
    """A unit's file is not what was written: cut short, changed, or another unit's. The message says which. Exit code 1."""

    exit_code = 1

"""The commit that a row was measured at."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def commit(but: str = "") -> str:
    """HEAD, marked where files that it has were changed. but: a folder, from the top, whose changes do not count."""
    git = ("git", "-C", os.fspath(Path(__file__).parent))
    where = (":(top)", f":(top,exclude){but}") if but else ()
    try:
        head, changes = (
            subprocess.run((*git, *command), capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no", "--", *where))
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}, changed" if changes else head

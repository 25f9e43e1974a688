"""kill -9 of a run's whole process group, again and again: the job ends as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import Start, kill_until_done, unit_hashes

KILLS = 12


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_runs_end_as_one_that_was_not(
    start: Start, write_spec: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    # 180 units, more than the runs to be killed can write, even should each go on for a few while its kill is on the way
    spec = write_spec(count=1080, steps=120, unit_size=12)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(["job", "run", str(spec), "--out", str(whole)]).wait() == 0
    written = sorted(path.stat().st_mtime for path in (whole / "units").iterdir())
    unit_seconds = (written[-1] - written[0]) / 179
    command = ["job", "run", str(spec), "--out", str(out), "--workers", str(workers)]
    early, late = 0.05 + 4 * unit_seconds, 2 * unit_seconds
    killed = kill_until_done(start, command, out, KILLS, early, random.Random(workers), late=late)
    assert unit_hashes(out) == unit_hashes(whole)
    assert len(unit_hashes(out)) == 180
    assert not list((out / "units").glob(".*")), "temporary files are left"
    # The kills fell at different stages: some before their run wrote a unit, some after, at many places of the job.
    assert any(kill.after == kill.before for kill in killed)
    assert len({kill.after for kill in killed}) >= 5

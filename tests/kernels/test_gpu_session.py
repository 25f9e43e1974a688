"""The GPU session's code paths, in its dry run: every section, on tiny shapes, without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SESSION = Path(__file__).parents[2] / "benchmarks" / "gpu_session.py"
SECTIONS = (
    "correctness", "golden", "invariance", "graphs", "ceilings", "kernels", "fused", "eager", "diffusers", "spans",
    "compiled",
)  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SESSION, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    done = run("--dry-run", "--out", str(out))
    return done, list(csv.DictReader((out / "dry-run.csv").open()))


def test_every_section_runs_and_holds(dry_run):
    done, rows = dry_run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    assert [row for row in rows if row["unit"] == "error"] == []


def test_rows_say_where_they_were_measured(dry_run):
    _, rows = dry_run
    assert all(row["gpu"] == "dry run" and row["torch"] and row["triton"] and row["commit"] for row in rows)
    timed = [row for row in rows if row["p50_ms"]]
    assert len(timed) > 12
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in timed)


def test_every_kernel_is_checked_and_timed(dry_run):
    _, rows = dry_run
    kernels = {"adaln", "linear qkv", "linear proj", "linear fc1", "linear fc2", "attention", "guided_step", "patch_embed",
               "step_boundary", "noise"}  # fmt: skip
    for section in ("correctness", "kernels"):
        assert {row["name"] for row in rows if row["section"] == section} >= kernels


def test_a_section_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['session', '--dry-run', '--out', {str(tmp_path)!r}, '--sections', 'ceilings', 'eager']\n"
        f"sys.path[:0] = [{str(SESSION.parents[1])!r}, {str(SESSION.parent)!r}]\n"
        "from gpu import speed\n"
        "def broken(session): raise ValueError('planted')\n"
        "speed.ceilings = broken\n"
        f"runpy.run_path({str(SESSION)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    rows = list(csv.DictReader((tmp_path / "dry-run.csv").open()))
    assert done.returncode == 1
    assert [row["value"] for row in rows if row["unit"] == "error"] == ["ValueError: planted"]
    assert any(row["name"] == "torch eager" for row in rows)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "--dry-run" in done.stderr

"""The GPU session's code paths, in its dry run: every section, on tiny shapes, without a GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import randn

from fastcfg.kernels import attention as attention_module
from fastcfg.kernels import tuned

SESSION = Path(__file__).parents[2] / "benchmarks" / "gpu_session.py"
SECTIONS = (
    "correctness", "golden", "invariance", "graphs", "ceilings", "kernels", "fused", "eager", "diffusers", "spans",
    "tune", "compiled",
)  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SESSION, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("session")
    done = run("--dry-run", "--out", str(out))
    return done, list(csv.DictReader((out / "dry-run.csv").open())), out / "dry-run.json"


def test_every_section_runs_and_holds(dry_run):
    done, rows, _ = dry_run
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    assert [row for row in rows if row["unit"] == "error"] == []


def test_rows_say_where_they_were_measured(dry_run):
    _, rows, _ = dry_run
    assert all(row["gpu"] == "dry run" and row["torch"] and row["triton"] and row["commit"] for row in rows)
    timed = [row for row in rows if row["p50_ms"]]
    assert len(timed) > 12
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in timed)


def test_every_kernel_is_checked_and_timed(dry_run):
    _, rows, _ = dry_run
    kernels = {"adaln", "linear qkv", "linear proj", "linear fc1", "linear fc2", "attention", "guided_step", "patch_embed",
               "step_boundary", "noise"}  # fmt: skip
    for section in ("correctness", "kernels"):
        assert {row["name"] for row in rows if row["section"] == section} >= kernels


def test_the_tuned_table_says_where_it_was_measured_and_is_used(dry_run, monkeypatch):
    _, rows, path = dry_run
    table = tuned.read_table(path)
    assert [entry.kernel for entry in table.entries] == ["attention", "linear"]
    assert all(entry.measured["torch"] == torch.__version__ and entry.measured["date"] for entry in table.entries)
    assert all(set(entry.ms) == {"batch 2", "batch 1"} and min(map(min, entry.ms.values())) > 0 for entry in table.entries)
    assert any(str(path) in row["value"] and tuned.VARIABLE in row["value"] for row in rows if row["section"] == "tune")
    entry = table.entries[0]
    tokens, width = entry.shape["tokens"], entry.shape["head_dim"]
    launched = []
    monkeypatch.setattr(attention_module, "launch", lambda kernel, grid, device, config, **_: launched.append(config))
    for variable in (str(path), ""):
        monkeypatch.setenv(tuned.VARIABLE, variable)
        attention_module.attention(randn(1, tokens, 3 * width, dtype=torch.float16), 1)
    assert launched[0] == entry.config != launched[1]


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

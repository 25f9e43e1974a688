"""`fastcfg job`: what it prints, its exit codes, and how damage is found and put right."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from crashing import Start, unit_hashes
from making import make_job

from fastcfg.cli import main
from fastcfg.jobs import Spec, get_unit
from fastcfg.jobs.local_store import LocalStore

WriteSpec = Callable[..., Path]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def done(start: Start, tiny_spec_path: Path, tmp_path: Path) -> Path:
    """A complete job of 7 units."""
    out = tmp_path / "job"
    assert start(["job", "run", str(tiny_spec_path), "--out", str(out)]).wait() == 0
    return out


@pytest.mark.parametrize("command", ["run", "status", "export"])
def test_help_has_an_example(command: str) -> None:
    result = invoke("job", command, "--help")
    assert result.exit_code == 0
    assert f"fastcfg job {command} " in result.output


def test_example_in_python_does_as_it_stands(tiny_spec_path: Path, tmp_path: Path) -> None:
    """docs/jobs.md's, in a process that has imported nothing; a tiny job in the place of its own."""
    document = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", document, re.S)
    code = code.replace('"spec.toml"', repr(str(tiny_spec_path))).replace("scale=1.5", "scale=3.0")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "7 of 7 units, 40 of 40 images in runs/50k\n"
    with np.load(tmp_path / "samples.npz") as archive:
        assert len(archive["arr_0"]) == 20


def test_status_of_a_job_under_way_and_of_none(done: Path, tmp_path: Path) -> None:
    assert invoke("job", "status", done).output == f"7 of 7 units, 40 of 40 images in {done}\n"
    for k in (1, 2, 6):
        (done / "units" / f"unit-00000{k}.safetensors").unlink()
    result = invoke("job", "status", done)
    assert result.exit_code == 0
    assert result.output.splitlines() == [f"4 of 7 units, 24 of 40 images in {done}", "missing: units 1-2, 6"]
    result = invoke("job", "status", tmp_path / "none")
    assert result.exit_code == 2
    assert "no job at" in result.output


def test_damage_is_found_and_computed_again(done: Path, start: Start, tiny_spec_path: Path) -> None:
    """Cut short, a flipped bit, two swapped; and a stale temporary file, which is nobody's unit and is removed."""
    whole = unit_hashes(done)
    paths = [done / "units" / f"unit-{k:06d}.safetensors" for k in range(7)]
    paths[0].write_bytes(paths[0].read_bytes()[:-10])
    content = bytearray(paths[2].read_bytes())
    content[-50] ^= 4
    paths[2].write_bytes(content)
    swapped = paths[3].read_bytes()
    paths[3].write_bytes(paths[5].read_bytes())
    paths[5].write_bytes(swapped)
    stale = done / "units" / f".unit-000001.safetensors.{'a' * 16}.tmp"
    stale.write_bytes(b"half a unit")

    quick = invoke("job", "status", done)  # sizes alone
    assert quick.exit_code == 1
    assert re.findall(r"damaged: unit (\d+)", quick.output) == ["0"]
    assert unit_hashes(done) != whole
    assert stale.exists(), "status changes nothing"

    found = invoke("job", "status", done, "--verify")
    assert found.exit_code == 1
    assert "3 of 7 units, 16 of 40 images" in found.output
    for words in ("unit 0: ", "unit 2: its content", "unit 3: it is unit 5", "unit 5: it is unit 3", "moved to damaged/"):
        assert words in found.output
    assert {path.name for path in (done / "damaged").iterdir()} == {paths[k].name for k in (0, 2, 3, 5)}

    assert start(["job", "run", str(tiny_spec_path), "--out", str(done)]).wait() == 0
    assert unit_hashes(done) == whole
    assert not stale.exists()
    again = invoke("job", "status", done, "--verify")
    assert again.exit_code == 0
    assert again.stdout == f"7 of 7 units, 40 of 40 images in {done}\n"


def test_damage_that_a_run_is_at_is_left_to_it(tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "job"
    job = make_job(tiny_spec, out)
    for k in (1, 2):
        job.store.write(get_unit(job.spec, k).name, [b"half"])
    monkeypatch.setattr(LocalStore, "claim", lambda _, number: number != 1)
    result = invoke("job", "status", out, "--verify")
    assert result.exit_code == 1
    assert "\ndamaged files were moved to damaged/" in result.output
    assert "\nnot moved: units 1, which a run is computing, or which are no longer damaged\n" in result.output
    assert list(job.store.sizes("damaged")) == ["unit-000002.safetensors"]


def test_damage_that_an_export_meets_is_no_bad_input(tiny_spec: Spec, tmp_path: Path) -> None:
    job = make_job(tiny_spec, tmp_path / "job")
    job.store.write(get_unit(job.spec, 2).name, [bytes(job.store.read(get_unit(job.spec, 3).name))])
    result = invoke("job", "export", tmp_path / "job", "--format", "png", "--out", tmp_path / "x")
    assert result.exit_code == 1
    assert "unit-000002.safetensors is damaged: it is unit 3" in result.output


@pytest.mark.parametrize("command", [["status", "--verify"], ["export", "--format", "png", "--out"]], ids=["status", "export"])
def test_a_unit_that_may_not_be_read_is_one_error(
    command: list[str], tiny_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a run of another user wrote; tests may run as root, who is denied nothing."""
    out = tmp_path / "job"
    make_job(tiny_spec, out)
    real = LocalStore.read

    def read(store: LocalStore, name: str) -> Any:
        if name.endswith("3.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(store, name)

    monkeypatch.setattr(LocalStore, "read", read)
    result = invoke("job", command[0], out, *command[1:], *([tmp_path / "x"] if "export" in command else []))
    assert result.exit_code == 1
    assert f"error: cannot read {out}/units/unit-000003.safetensors: Permission denied\n" in result.output


def test_a_short_file_is_computed_again_without_verifying(done: Path, start: Start, tiny_spec_path: Path) -> None:
    whole = unit_hashes(done)
    (done / "units" / "unit-000004.safetensors").write_bytes(b"")
    assert start(["job", "run", str(tiny_spec_path), "--out", str(done)]).wait() == 0
    assert unit_hashes(done) == whole


REFUSALS: dict[str, tuple[dict[str, object], list[str], tuple[str, ...]]] = {
    "another seed": ({"seed": 6}, [], ("another spec", "seed: 5 there, 6 here")),
    "another unit size": ({"unit_size": 7}, [], ("unit_size: 6 there, 7 here",)),
    "another dtype": ({"dtype": "bf16"}, [], ("dtype: 'fp32' there, 'bf16' here",)),
    "another checkpoint": ({"checkpoint": "fashion-mnist"}, [], ("another checkpoint", "SHA-256")),
    "GPU for a CPU's job": ({}, ["--devices", "0"], ("GPUs",)),
    "no devices": ({}, ["--devices", "x"], ('"cpu"', "'x'")),
    "workers of none": ({}, ["--workers", "0"], ("workers", "0")),
    "Ray and devices": ({}, ["--ray", "auto", "--devices", "cpu"], ("Ray",)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_exit_with_2_and_change_nothing(done: Path, write_spec: WriteSpec, case: str) -> None:
    changes, options, words = REFUSALS[case]
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    result = invoke("job", "run", write_spec("other.toml", **changes), "--out", done, *options)
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def test_out_with_other_things_in_it_is_refused(tiny_spec_path: Path, tmp_path: Path) -> None:
    result = invoke("job", "run", tiny_spec_path, "--out", tmp_path)
    assert result.exit_code == 2
    assert "other things (spec.toml)" in result.output
    result = invoke("job", "run", tiny_spec_path, "--out", tiny_spec_path)
    assert result.exit_code == 2
    assert "Not a directory" in result.output
    result = invoke("job", "run", tiny_spec_path, "--out", "s3:/bucket/job")
    assert result.exit_code == 2
    assert "want a local path, or a URL with both its slashes" in result.output

"""The GPU session's code paths, in its dry run: every section, on tiny shapes, without a GPU."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreted import randn

from fastcfg.kernels import attention as attention_module
from fastcfg.kernels import tuned
from fastcfg.verify import Comparison

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import correctness, loops
from gpu.report import add_lost
from gpu.supervise import supervise

SESSION = Path(__file__).parents[2] / "benchmarks" / "gpu_session.py"
SECTIONS = (
    "correctness", "golden", "network", "invariance", "graphs", "ceilings", "kernels", "fused", "eager", "compiled",
    "diffusers", "spans", "tune", "tuned",
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


def test_the_new_table_is_what_the_tuned_section_runs_with(dry_run, monkeypatch, tmp_path):
    _, rows, _ = dry_run
    names = [row["name"] for row in rows if row["section"] == "tuned"]
    assert names == ["1 of 3 rows, fp32", "3 of 3 rows, fp32", "fastcfg, tuned", "tuned"]
    said, seen = Said(), []
    said.path = tmp_path / "gpu.csv"
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    for name in ("invariance", "_fused"):
        monkeypatch.setattr(loops, name, lambda *_: seen.append(os.environ.get(tuned.VARIABLE)))
    loops.tuned(said)
    assert (said.rows, seen) == ([("tuned", "there is no gpu.json", "note")], [])
    table = tmp_path / "gpu.json"
    table.touch()
    loops.tuned(said)
    assert seen == [str(table)] * 2
    assert tuned.VARIABLE not in os.environ


def planted(
    out: Path, program: str, sections: list[str], seconds: int = 99, timeout: float | None = None
) -> subprocess.CompletedProcess:
    """A dry run of these sections for which `program` has changed what `gpu.speed` holds."""
    arguments = ["session", "--dry-run", "--here", str(seconds), "--out", str(out), "--sections", *sections]
    code = f"""
import runpy, sys, time
sys.argv = {arguments!r}
sys.path[:0] = [{str(SESSION.parents[1])!r}, {str(SESSION.parent)!r}]
from gpu import speed
{program}
runpy.run_path({str(SESSION)!r}, run_name="__main__")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)


def test_a_section_that_fails_is_a_row_and_the_others_go_on(tmp_path):
    done = planted(
        tmp_path,
        """
def broken(session):
    raise ValueError("planted")

speed.ceilings = broken
""",
        ["ceilings", "eager"],
    )
    rows = list(csv.DictReader((tmp_path / "dry-run.csv").open()))
    assert done.returncode == 1
    assert [row["value"] for row in rows if row["unit"] == "error"] == ["ValueError: planted"]
    assert any(row["name"] == "torch eager" for row in rows)


@pytest.mark.parametrize("verdict", ["relative, EXCEEDS", "bits DIFFER"])
def test_a_check_that_does_not_hold_ends_the_session_with_1(tmp_path, verdict):
    done = planted(tmp_path, f"speed.ceilings = lambda session: session.report.row('planted', 3.5, {verdict!r})", ["ceilings"])
    assert done.returncode == 1
    assert "0 sections failed, 1 checks did not hold\nceilings,planted," in done.stdout


def test_torch_computes_in_float32_what_kernels_are_compared_with(tmp_path, monkeypatch):
    """An error of TF32, which torch's convolutions have unless told otherwise, would allow a kernel twice as much."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")  # as some images have it: products, too
    program = """
def tf32(session):
    from torch import backends
    session.report.row("tf32", int(backends.cudnn.allow_tf32 or backends.cuda.matmul.allow_tf32), "note")

speed.ceilings = tf32
"""
    planted(tmp_path, program, ["ceilings"])
    (row,) = (row for row in csv.DictReader((tmp_path / "dry-run.csv").open()) if row["name"] == "tf32")
    assert row["value"] == "0"


class Said:
    """In place of a session: what its sections report."""

    dry, device = True, torch.device("cpu")

    def __init__(self):
        self.rows, self.report = [], self

    def row(self, name, value, unit, **_):
        self.rows.append((name, value, unit))

    def left(self):
        return 1.0


def test_a_kernel_may_err_twice_as_much_as_torch_or_by_two_rounding_steps(monkeypatch):
    exact = torch.tensor([8.0, -1.0], dtype=torch.float64)

    def case(name, got, low, dtype=torch.float32):
        """Errors of the second value, as parts of the largest."""
        outputs, lows = (exact.clone(), exact.clone()), (exact.clone(), exact.clone())
        outputs[1][1] += 8 * got
        lows[1][1] += 8 * low
        one = {"outputs": lambda: [o.to(dtype) for o in outputs], "exact": lambda: [exact, exact], "low": lambda: lows}
        return SimpleNamespace(name=name, shape="", **one)

    eps = torch.finfo(torch.float16).eps
    given = [
        case("as torch", 1e-3, 1e-3),
        case("nearly twice", 1.99e-3, 1e-3),
        case("over twice", 2.01e-3, 1e-3),
        case("torch is exact", 1e-3, 0.0),
        case("two steps", 2 * eps, 0.0, torch.float16),
        case("more than two steps", 2.5 * eps, 0.0, torch.float16),
        case("no number", float("nan"), 1e-3),
    ]
    monkeypatch.setattr(correctness, "cases", lambda *_: given)
    said = Said()
    correctness.kernels(said)
    assert [(name, unit.removeprefix("relative, ")) for name, _, unit in said.rows] == [
        ("as torch", "ok"), ("nearly twice", "ok"), ("over twice", "EXCEEDS"), ("torch is exact", "EXCEEDS"),
        ("two steps", "ok"), ("more than two steps", "EXCEEDS"), ("no number", "EXCEEDS"),
    ]  # fmt: skip
    assert said.rows[2][1] == pytest.approx(2.01e-3, rel=1e-4)


@pytest.mark.parametrize(("times", "verdict"), [(1.9, "ok"), (2.1, "EXCEEDS"), (float("nan"), "EXCEEDS")])
def test_a_sample_may_lose_twice_what_the_reference_engine_does(monkeypatch, times, verdict):
    lost = {("reference", "fp32"): 0.0, ("reference", "fp16"): 1.0, ("cuda", "fp16"): times}
    base = torch.full((4,), 10.0)
    monkeypatch.setattr(
        correctness, "sampler", lambda session, batch, module, dtype, engine, **_: lambda *_: base + lost[engine, dtype]
    )
    said = Said()
    correctness.network(said)
    assert [unit for _, _, unit in said.rows] == [f"relative, {verdict}"] * 2


def test_a_golden_loop_that_any_processor_may_miss_is_marked(monkeypatch):
    names = ("forward", "ddim10_clip_cfg3", "ddim10_cfg3")
    monkeypatch.setattr(correctness, "verify", lambda *_, **__: [Comparison(name, 1.0, 1.5e-5) for name in names])
    said, shapes = Said(), {}
    said.dry, said.row = False, lambda name, value, unit, shape, **_: shapes.update({name: (unit, shape)})
    correctness.golden(said)
    marked = "ill-conditioned: docs/design.md, Exactness"
    assert shapes == {name: ("relative, EXCEEDS", marked if "clip" in name else "") for name in names}


def test_bits_that_differ_are_said():
    said, one = Said(), torch.ones(2)
    correctness._equal(said, "same", one, one.clone())
    correctness._equal(said, "other", one, torch.tensor([1.0, 1.0 + 2**-23]))
    assert said.rows == [("same", 1, "bits equal"), ("other", 0, "bits DIFFER")]


def test_a_baselines_steps_are_timed_in_a_row(monkeypatch):
    """As in a loop, where the host runs ahead: alone, a step would be charged with the host's way to its first launch."""
    made, timed = [], []

    def measure(call, *_, **__):
        before = len(made)
        call()
        timed.append(len(made) - before)
        return 10.0, 20.0, 30.0

    monkeypatch.setattr(loops, "measure", measure)
    said = Said()
    loops._baseline(said, "torch", "tiny", 2, lambda step: lambda *given: made.append(step(*given).shape))
    assert timed == [loops.IN_A_ROW]
    assert loops.IN_A_ROW >= 10
    assert set(made) == {(2, 4, 8, 8)}
    assert said.rows == [("torch", 20.0 / loops.IN_A_ROW, f"ms a guided step ({loops.IN_A_ROW} steps x 5)")]


def test_rows_of_sections_that_are_not_run_stay_and_their_ceilings_are_used(dry_run, tmp_path):
    _, before, path = dry_run
    shutil.copy(path.with_suffix(".csv"), tmp_path)
    assert run("--dry-run", "--here", "99", "--out", str(tmp_path), "--sections", "fused").returncode == 0
    rows = list(csv.DictReader((tmp_path / "dry-run.csv").open()))
    kept = [row for row in before if row["section"] != "fused"]
    assert rows[: len(kept)] == kept
    assert [row["section"] for row in rows[len(kept) :]] == ["fused"] * 2
    assert float(rows[len(kept)]["fraction"]) > 0  # of the product's rate in the run before


CHILD = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from pathlib import Path
from types import SimpleNamespace
from gpu.supervise import LOST, begin
for name in {sections!r}:
    begin(name, 0.2, Path("the report"))
    print(name, flush=True)
    if name == "hangs":
        time.sleep(60)
    if name == "faults":
        sys.exit(LOST)
    if name == "dies":
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "leaves-others":
        import subprocess
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
"""


def watched(sections, seconds=60.0, child=CHILD):
    """(what went wrong, what was lost) of sections that do what their names say."""
    lost = []

    def command(left, seconds):
        assert 0 < seconds <= 60
        return [sys.executable, "-c", child.format(benchmarks=str(SESSION.parent), sections=list(left))]

    wrong = supervise(command, sections, seconds, lambda *what: lost.append(what), margin=1.0)
    return wrong, lost


def test_a_section_that_takes_its_process_along_costs_no_other(capfd):
    wrong, lost = watched(["fine", "hangs", "last", "faults", "dies", "leaves-others"])
    assert capfd.readouterr().out.split("\n")[:-1] == ["fine", "hangs", "last", "faults", "dies", "leaves-others"]
    assert [(section, path) for section, _, path in lost] == [
        (name, "the report\n"[:-1]) for name in ("hangs", "faults", "dies")
    ]
    assert "hung" in lost[0][1]
    assert ("75" in lost[1][1], "-9" in lost[2][1]) == (True, True)
    assert wrong == 3


def test_a_process_that_cannot_begin_is_not_started_again(capfd):
    assert watched(["fine", "last"], child="import sys; print('no GPU'); sys.exit(1)") == (1, [])
    assert capfd.readouterr().out == "no GPU\n"


def test_a_session_ends_in_its_time():
    begin = time.monotonic()
    wrong, lost = watched(["fine", "hangs", "last"], seconds=2.0)
    assert time.monotonic() - begin < 10
    assert (wrong, [section for section, *_ in lost]) == (1, ["hangs"])


def test_a_lost_section_is_a_row(dry_run, tmp_path):
    _, rows, path = dry_run
    copy = tmp_path / "some.csv"
    copy.write_bytes(path.with_suffix(".csv").read_bytes())
    add_lost(copy, "kernels", "hung, and was killed")
    *before, last = csv.DictReader(copy.open())
    assert before == rows
    assert (last["section"], last["unit"], last["value"], last["gpu"]) == (
        "kernels",
        "error",
        "hung, and was killed",
        "dry run",
    )


def test_a_section_lost_before_any_row_is_the_first(dry_run, tmp_path):
    copy = tmp_path / "some.csv"
    copy.write_text(dry_run[2].with_suffix(".csv").read_text().splitlines(keepends=True)[0])  # the header alone
    add_lost(copy, "correctness", "hung, and was killed")
    (row,) = csv.DictReader(copy.open())
    assert (row["section"], row["unit"], row["value"]) == ("correctness", "error", "hung, and was killed")


def test_running_out_of_time_goes_through_what_catches_exceptions(tmp_path):
    done = planted(
        tmp_path,
        """
def patient(session):
    while True:
        try:
            time.sleep(30)
        except Exception:
            pass

speed.ceilings = patient
""",
        ["ceilings", "eager"],
        seconds=1,
        timeout=60,
    )
    rows = [(row["section"], row["value"]) for row in csv.DictReader((tmp_path / "dry-run.csv").open())]
    assert done.returncode == 0, done.stderr
    assert ("ceilings", "stopped after 1 s") in rows
    assert ("eager", "left out: out of time") in rows


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "--dry-run" in done.stderr

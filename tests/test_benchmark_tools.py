"""What benchmarks share: the comparison of two commits, and the plot of any table."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from fastcfg import Error
from fastcfg.files import slug

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import compare  # noqa: E402 - after the path
import plot  # noqa: E402
from cpu.report import Report, this_machine  # noqa: E402


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "intel-xeon-processor-2-50ghz"),
        ("../AMD EPYC", "amd-epyc"),
    ],
)
def test_results_are_files_named_by_their_device(device: str, name: str) -> None:
    assert slug(device) == name


class Measured(compare.Side):
    """A side whose benchmarks take what each round says, and which notes when it was asked."""

    def __init__(self, name: str, rounds: list[dict[str, float]], order: list[str]):
        super().__init__(Path(), Path())
        object.__setattr__(self, "_given", (name, iter(rounds), order))

    def run(self, only: str | None) -> dict[str, float]:
        name, rounds, order = self._given  # type: ignore[attr-defined]
        order.append(name)
        return next(rounds)


def test_sides_take_turns_and_only_what_every_round_agrees_on_counts(tmp_path: Path) -> None:
    order: list[str] = []
    base = [{"a": 1.0, "b": 1.0, "c": 2.0, "old": 1.0}, {"a": 2.0, "b": 1.0, "c": 2.0, "old": 1.0}]
    tree = [{"a": 1.5, "b": 1.2, "c": 1.0, "new": 3.0}, {"a": 3.0, "b": 0.9, "c": 1.0, "new": 3.0}]
    sides = {"base": Measured("base", base, order), "tree": Measured("tree", tree, order)}
    rounds = [compare._round(sides, None, backwards) for backwards in (False, True)]
    assert order == ["base", "tree", "tree", "base"]
    report = Report(tmp_path / "compare.csv", this_machine(2))
    compare._tell(rounds, report, "main")
    told = {row["name"]: (row["value"], row["unit"]) for row in report.rows}
    assert told == {
        "a": (1.5, "times main's: slower"),
        "b": (pytest.approx(1.05), "times main's: no change beyond noise"),
        "c": (0.5, "times main's: faster"),
        "old": ("only in main", "note"),
        "new": ("new", "note"),
        "by chance": (1.5, "of 3 are called faster or slower if nothing changed"),
    }
    assert [row["name"] for row in report.rows][:2] == ["a", "c"]  # the largest change first


@pytest.mark.alone  # pytest-benchmark measures nothing in one of several processes
def test_the_working_tree_is_installed_apart_and_measured_as_it_is(tmp_path: Path) -> None:
    side = compare._as_it_is(tmp_path)
    found = side.python("-c", "import fastcfg, fastcfg.kernels; print(fastcfg.__file__); print(fastcfg.kernels.__file__)")
    assert all(Path(file).is_relative_to(tmp_path / "packages") for file in found.split())
    measured = side.run("test_plan")
    assert list(measured) == ["test_bench_sampler.py::test_plan"]
    assert 1e-5 < measured["test_bench_sampler.py::test_plan"] < 1


def test_an_unknown_revision_is_one_clear_error(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "compare.py"), "no-such-revision", "--out", str(tmp_path / "x.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: git archive")
    assert "Traceback" not in done.stderr


def test_any_table_can_be_drawn(tmp_path: Path) -> None:
    report = Report(tmp_path / "table.csv", this_machine(2))
    report.row("loop", "fastcfg", 1.0, "GFLOP/s", shape="a", dtype="fp32", times=(1.0, 2.0, 3.0))
    report.row("loop", "a peer", 1.0, "GFLOP/s", shape="a", dtype="fp32", times=(2.0, 3.0, 4.0))
    report.row("job", "job", 12.5, "images/s", shape="b")
    report.row("note", "load", "1.82", "tasks")
    report.row("note", "peer", "left out", "note")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    plot.draw(rows, tmp_path / "all.png")
    plot.draw(rows, tmp_path / "one.png", sections=["loop"])
    assert (tmp_path / "all.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5000
    with pytest.raises(Error, match="no row to draw: the sections of the table are job, loop, note"):
        plot.draw(rows, tmp_path / "none.png", sections=["ratio"])
    assert not (tmp_path / "none.png").exists()

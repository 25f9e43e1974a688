"""The study of the trade-off: what its arms ask for, what its report says of a table, and its way from arms to a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

from fastcfg.sweep import Row, Sweep, read_rows, write_rows

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import tradeoff_study as study  # noqa: E402 - after the path
from tradeoff import arms, report  # noqa: E402


@pytest.mark.parametrize("arm", study.ALL, ids=lambda arm: arm.name)
def test_arms_are_sweeps_of_equal_strengths(arm: arms.Arm, tmp_path: Path) -> None:
    path = tmp_path / "arm.toml"
    path.write_text(arm.toml(500, arms.SCALES, "/data"))
    sweep = Sweep.from_toml(path)
    (spec,) = sweep.jobs.values()
    strengths = [scale + arm.less for scale in spec.scales]
    assert strengths == [s for s in arms.SCALES if not (arm.from_cfg and s == 1)]
    assert (spec.count, spec.steps, spec.seed, spec.labels, spec.dtype) == (500, 25, 0, "balanced", "fp32")
    assert sweep.reference == "/data:test"


def row(setting: str, scale: float, frechet: float, others: float, error: float = 0.1, gflop: float = 20.0) -> Row:
    cells = {"setting": setting, "scale": f"{scale:g}", "steps": "25", "samples": "500", "gflop_a_sample": f"{gflop:g}"}
    for name in report.SHOWN:
        value = frechet if name == report.FD else others
        cells |= {name: f"{value:g}", f"{name}_low": f"{value - 1.96 * error:g}", f"{name}_high": f"{value + 1.96 * error:g}"}
    return cells


def test_findings_are_the_tables(tmp_path: Path) -> None:
    rows = [
        row("CFG", 8, 30, 0.9), row("CFG", 1, 5, 0.5), row("CFG", 2, 4, 0.7),
        row("CFG in an interval", 2, 3.9, 0.6, gflop=15), row("classifier on conditional", 7, 35, 0.9),
        row("dropout 0.1", 1, 7, 0.1), row("dropout 0.5", 1, 9, 0.1), row("dropout 0.5", 2, 8, 0.1),
    ]  # fmt: skip
    write_rows(tmp_path / "table.csv", rows)
    assert read_rows(tmp_path / "table.csv") == rows
    found = list(report.findings(rows))
    assert found[0].startswith("CFG: best Frechet distance 4 ± 0.2 at s = 2, against 5 ± 0.2 at s = 1: smaller by 1 (7.1")
    assert "CFG: class accuracy rises with every scale: 0.5 ± 0.2 at s = 1, 0.9 ± 0.2 at s = 8" in found
    assert "CFG: recall does not fall: 0.5 ± 0.2 at s = 1, 0.9 ± 0.2 at s = 8" in found
    interval = next(line for line in found if line.startswith("CFG in an interval"))
    assert "3.9 ± 0.2 at scale 2, 0.1 (0.7 standard errors) below CFG's best, for 75% of its FLOPs" in interval
    assert interval.endswith("; at equal strength its distance is below CFG's at 1 of 1 scales")
    assert (
        "classifier on conditional: no scale has a smaller Frechet distance than no guidance (5 ± 0.2); "
        "at equal strength its distance is below CFG's at 0 of 1 scales"
    ) in found
    assert found[-2:] == [
        "dropout 0.1: best Frechet distance 7 ± 0.2 at s = 1, 1 (7.1 standard errors) below that of dropout 0.5; "
        "7 ± 0.2 at s = 1",
        "dropout 0.5: best Frechet distance 8 ± 0.2 at s = 2; 9 ± 0.2 at s = 1",
    ]
    table = report.text(rows)
    assert table.splitlines()[2].startswith("| CFG | 1 | 20 | 5 ± 0.2 | 0.5 ± 0.2 |")
    report.draw(rows, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"tradeoff-guidance.png", "tradeoff-dropout.png"}
    # the interval's line begins at CFG's unguided point, which is its own
    assert [point["scale"] for point in report.line(rows, arms.KINDS[1])] == ["1", "2"]


@pytest.mark.parametrize(
    ("values", "way"),
    [
        ((0.5, 0.7, 0.9), "rises with every scale: 0.5 ± 0.2 at s = 1, 0.9 ± 0.2 at s = 8"),
        (
            (0.5, 0.4, 0.9),
            "is highest at the last scale, and does not rise with every one: 0.5 ± 0.2 at s = 1, 0.9 ± 0.2 at s = 8",
        ),
        ((0.5, 0.9, 0.7), "is highest at s = 2 (0.9 ± 0.2): 0.5 ± 0.2 at s = 1, 0.7 ± 0.2 at s = 8"),
        ((0.9, 0.7, 0.8), "does not rise: 0.9 ± 0.2 at s = 1, 0.8 ± 0.2 at s = 8"),
    ],
)
def test_a_finding_says_which_way_a_figure_goes(values: tuple[float, ...], way: str) -> None:
    rows = [row("CFG", scale, 5, value) for scale, value in zip((1, 2, 8), values, strict=True)]
    assert f"CFG: class accuracy {way}" in list(report.findings(rows))


@pytest.mark.parametrize("line", ["", "--show --reduced", "data", "data --show --out x"])
def test_what_does_not_go_together_is_refused(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tradeoff_study.py", *line.split()])
    with pytest.raises(SystemExit, match="2"):
        study.main()
    assert "error: want DATA and --out, or --show" in capsys.readouterr().err


def write_idx(folder: Path, prefix: str, count: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
    head = np.array([0x803, *images.shape], ">u4").tobytes()
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    labels = np.arange(count, dtype=np.uint8) % 10
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">u4").tobytes() + labels.tobytes())


def test_the_study_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms, two scales, few samples; a second run samples nothing."""
    monkeypatch.setattr(arms, "REDUCED", (1.0, 3.0))
    monkeypatch.setattr(arms, "STEPS", 2)
    write_idx(tmp_path, "train", 60)
    write_idx(tmp_path, "t10k", 50)
    names = ["CFG", "classifier on conditional"]
    options = argparse.Namespace(
        data=str(tmp_path), out=tmp_path / "out", samples=20, arms=names, reduced=True, engine="auto", workers=1
    )
    study.run(options, tmp_path / "tradeoff.csv")
    rows = read_rows(tmp_path / "tradeoff.csv")
    assert [(r["setting"], r["scale"]) for r in rows] == [
        ("real images", ""), ("CFG", "1"), ("CFG", "3"), ("classifier on conditional", "2"),
    ]  # fmt: skip
    assert all(float(r["class_accuracy"]) >= 0 and r["frechet_distance_low"] for r in rows)
    assert all(r["cpu"] for r in rows[1:])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    study.run(options, tmp_path / "tradeoff.csv")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    assert read_rows(tmp_path / "tradeoff.csv") == rows

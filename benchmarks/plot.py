"""Bars of any benchmark's CSV: a panel for each shape, a bar for each name and dtype.

    python benchmarks/plot.py benchmarks/results/amd-epyc.csv --sections loop              # the README's plot
    python benchmarks/plot.py benchmarks/results/job_throughput.csv --units images/s
    python benchmarks/plot.py benchmarks/results/nvidia-h200.csv --sections fused eager compiled

Rows with times are drawn by their median, with a line from the 20th to the 80th percentile; others by their value. Writes the
CSV's name with .png, or --out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcfg.errors import Error
from fastcfg.files import write_file
from fastcfg.plots import pyplot

COLORS = {"fastcfg": "tab:green", "diffusers": "tab:orange", "OpenVINO": "tab:blue"}
TIMES = "ms (median; line: 20th to 80th percentile)"

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a CSV that a benchmark wrote")
    parser.add_argument("--sections", nargs="+", help="only rows of these")
    parser.add_argument("--units", nargs="+", help="only rows of these; rows with times have the unit ms")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        rows = list(csv.DictReader(options.table.read_text().splitlines()))
        draw(rows, options.out or options.table.with_suffix(".png"), options.sections, options.units)
    except (Error, OSError, KeyError) as error:
        sys.exit(f"error: {options.table}: {error}")


def draw(rows: Sequence[Row], path: Path, sections: Sequence[str] | None = None, units: Sequence[str] | None = None) -> None:
    """Raises Error where the rows have nothing to draw."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (sections is None or row["section"] in sections) and _number(row) is not None:
            unit = "ms" if row["p50_ms"] else row["unit"]
            if units is None or unit in units:
                panels.setdefault((row["shape"], unit), []).append(row)
    if not panels:
        raise Error("no row to draw: the sections of the table are " + ", ".join(sorted({r["section"] for r in rows})))
    plt = pyplot()
    heights = [0.6 + 0.27 * len(members) for members in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, sum(heights) + 0.7), height_ratios=heights, layout="constrained", squeeze=False
    )
    for panel, ((shape, unit), members) in zip(axes[:, 0], panels.items(), strict=True):
        _bars(panel, members)
        panel.set_title(shape, fontsize=10)
        panel.set_xlabel(TIMES if unit == "ms" else unit)
    figure.suptitle(_where(rows[0]), fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    names = [", ".join(part for part in (row["name"], row["dtype"]) if part) for row in rows]
    middle = [_number(row) or 0.0 for row in rows]
    spread = None
    if all(row["p50_ms"] for row in rows):
        below = [float(row["p50_ms"]) - float(row["p20_ms"]) for row in rows]
        spread = [below, [float(row["p80_ms"]) - float(row["p50_ms"]) for row in rows]]
    colors = [next((color for name, color in COLORS.items() if row["name"].startswith(name)), "0.6") for row in rows]
    bars = axes.barh(range(len(rows)), middle, xerr=spread, color=colors)
    axes.bar_label(bars, [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in middle], padding=4)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _number(row: Row) -> float | None:
    try:
        return float(row["p50_ms"] or row["value"])
    except ValueError:
        return None


def _where(row: Row) -> str:
    """The machine and the day of a table: of a CPU's columns or a GPU's."""
    machine = row.get("gpu") or f"{row.get('cpu', '')}, {row.get('cores', '')} cores"
    return ", ".join(part for part in (machine, row.get("date", "")) if part)


if __name__ == "__main__":
    main()

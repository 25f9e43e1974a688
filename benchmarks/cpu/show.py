"""A session's rows as the README's tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu.report import Report
from fastcfg.errors import missing_extra
from fastcfg.files import write_file

COLORS = {"fastcfg": "tab:green", "diffusers": "tab:orange", "OpenVINO": "tab:blue"}


def tables(report: Report) -> str:
    """Markdown: times, ratios and overhead, with the machine and the date."""
    where, loops, ratios = report.machine, _of(report, "loop"), _of(report, "ratio")
    times = {(f"{row['name']}, {row['dtype']}", row["shape"]): f"{_ms(row['p50_ms'])} ({row['fraction']:.0%})" for row in loops}
    rates = {(f"{row['name']}, {row['dtype']}", row["shape"]): f"{row['value']:.0f} GFLOP/s" for row in _of(report, "rate")}
    gains = {(f"{row['dtype']} against {row['name']}", row["shape"]): f"{row['value']:.2f}x" for row in ratios}
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "diffusers", "openvino") if where[name])
    lines = [
        f"{where['cpu']}, {where['cores']} cores ({where['flags']}); {versions}; {where['date']}.",
        "Milliseconds of a guided step, and its FLOP/s as a share of the matrix rate in that precision:",
        "",
        *_table(times | rates),
        "",
        *_table(gains),
        "",
        *(
            f"{row['shape']}, {row['dtype']}: {row['value']:.0%} of a call is outside its {row['name']}."
            for row in _of(report, "overhead")
            if row["name"] != "call"
        ),
    ]
    return "\n".join(lines)


def pyplot() -> Any:
    """matplotlib, for files. Raises Error where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("plot", "the plot", error) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(plt: Any, report: Report, path: Path) -> None:
    """Bars of ms a guided step for each case, to a PNG."""
    rows = _of(report, "loop")
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, panels = plt.subplots(len(shapes), 1, figsize=(8, 3.2 * len(shapes)), layout="constrained", squeeze=False)
    for axes, shape in zip(panels[:, 0], shapes, strict=True):
        _draw(axes, [row for row in rows if row["shape"] == shape])
        axes.set_title(shape)
    panels[-1, 0].set_xlabel("ms a guided step (median; line: 20th to 80th percentile)")
    figure.suptitle(f"{report.machine['cpu']}, {report.machine['cores']} cores, {report.machine['date']}", fontsize=10)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [f"{row['name']}, {row['dtype']}" for row in rows]
    middle = [row["p50_ms"] for row in rows]
    spread = [[row["p50_ms"] - row["p20_ms"] for row in rows], [row["p80_ms"] - row["p50_ms"] for row in rows]]
    colors = [COLORS[row["name"].split(",")[0].split("'")[0]] for row in rows]
    bars = axes.barh(names, middle, xerr=spread, color=colors)
    axes.bar_label(bars, [_ms(ms) for ms in middle], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)


def _of(report: Report, section: str) -> list[dict[str, Any]]:
    return [row for row in report.rows if row["section"] == section]


def _table(cells: dict[tuple[str, str], str]) -> Iterator[str]:
    """Markdown of {(row, column): text}, rows and columns as they come."""
    rows, columns = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for row in rows:
        yield f"| {row} | {' | '.join(cells.get((row, column), '') for column in columns)} |"


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"

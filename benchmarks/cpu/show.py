"""A session's rows as the README's tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpu.report import Report


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

"""What every table of measurements shares: its first columns, and how times become three of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

MEASURED = ("section", "name", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "value", "unit", "fraction")
Times = tuple[float, float, float]  # 20th, 50th and 80th percentile in ms


def percentiles(seconds: Sequence[float]) -> Times:
    """In ms. One measurement is all three."""
    if len(seconds) == 1:
        seconds = [*seconds, *seconds]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[1] * 1e3, cuts[4] * 1e3, cuts[7] * 1e3


def shown(cell: object) -> str:
    """A cell of a table, to five digits; empty for None."""
    return "" if cell is None else f"{cell:.5g}" if isinstance(cell, float) else str(cell)

"""The rows of a session: what was measured and where, in a CSV that is whole at any time."""

from __future__ import annotations

import csv
import io
import platform
import statistics
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from revision import commit

from fastcfg.engines.choice import machine
from fastcfg.files import write_file

# The first ten are those of a GPU session's CSV
MEASURED = ("section", "name", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "value", "unit", "fraction")
MACHINE = ("cpu", "cores", "flags", "torch", "diffusers", "openvino", "python", "commit", "date")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve")
Times = tuple[float, float, float]  # 20th, 50th and 80th percentile in ms


@dataclass
class Report:
    """Rows so far, printed and stored as they come. shape of a row: the case; fraction: of the matrix rate, or of a target."""

    path: Path
    machine: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def row(
        self,
        section: str,
        name: str,
        value: Any,
        unit: str,
        *,
        shape: str = "",
        dtype: str = "",
        times: Times | None = None,
        fraction: float | None = None,
    ) -> None:
        p20, p50, p80 = times or (None, None, None)
        cells = (section, name, shape, dtype, p20, p50, p80, value, unit, fraction)
        self.rows.append(dict(zip(MEASURED, cells, strict=True)))
        write_file(self.path, lambda temporary: temporary.write_text(self._text()))
        print(" ".join(shown for shown in map(_shown, cells) if shown), flush=True)

    def _text(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, (*MEASURED, *MACHINE), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shown(cell) for name, cell in row.items()} | self.machine for row in self.rows)
        return text.getvalue()


def this_machine(cores: int) -> dict[str, str]:
    """The columns that say where and with what a session ran."""
    return {
        "cpu": machine().rsplit(", torch", 1)[0],
        "cores": str(cores),
        "flags": " ".join(_flags()),
        **{name: _version(name) for name in ("torch", "diffusers", "openvino")},
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def percentiles(seconds: list[float]) -> Times:
    """In ms. One measurement is all three."""
    if len(seconds) == 1:
        seconds = seconds * 2
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[1] * 1e3, cuts[4] * 1e3, cuts[7] * 1e3


def _shown(cell: Any) -> str:
    return "" if cell is None else f"{cell:.5g}" if isinstance(cell, float) else str(cell)


def _flags() -> list[str]:
    """Those of the CPU's features that decide how fast products are; none where the system does not say."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in FLAGS if flag in words]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""

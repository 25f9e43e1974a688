"""The rows of a session: what was measured and where, in a CSV that is whole at any time."""

from __future__ import annotations

import csv
import io
import platform
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from revision import commit
from table import MEASURED, Times, shown

from fastcfg.engines.choice import machine
from fastcfg.files import write_file

MACHINE = ("cpu", "cores", "flags", "torch", "diffusers", "openvino", "python", "commit", "date")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve")


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
        print(" ".join(text for text in map(shown, cells) if text), flush=True)

    def _text(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, (*MEASURED, *MACHINE), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: shown(cell) for name, cell in row.items()} | self.machine for row in self.rows)
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

"""What every section of a GPU session shares: the CSV it writes, the clock it must keep to, and how a call is timed."""

from __future__ import annotations

import csv
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

import torch
import triton
from revision import commit
from table import MEASURED, Times, percentiles, shown

from fastcfg.engines.capture import collector_off
from fastcfg.files import slug

MACHINE = ("gpu", "driver", "torch", "triton", "python", "commit", "date")
COLUMNS = (*MEASURED, *MACHINE)
UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12}
FLUSH_BYTES = 256 * 2**20  # written between calls: more than any L2 holds


@dataclass
class Session:
    """Where a session runs and what it has found: `ceilings` in bytes/s ("copy") and FLOP/s ("product"), at first those that
    the report keeps."""

    device: torch.device
    dry: bool
    report: Report
    deadline: float = 0.0

    def __post_init__(self) -> None:
        kept = [row for row in self.report.kept if row["section"] == "ceilings" and row["unit"] in UNITS]
        self.ceilings = {row["name"]: float(row["value"]) * UNITS[row["unit"]] for row in kept}

    def begin(self, seconds: float) -> None:
        """Starts a section of this length."""
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left to the section."""
        return self.deadline - time.monotonic()


class Report:
    """Writes rows as they come, to the file and to stdout. kept: those of sections that are not run now, which stay."""

    def __init__(self, folder: Path, device: torch.device, sections: Sequence[str]):
        self.section = ""
        self.machine = _machine(device)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{slug(self.machine['gpu'])}.csv"
        self.kept = [row for row in rows_of(self.path) if row["section"] not in sections]
        self._file: IO[str] = self.path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, extrasaction="ignore")
        self._writer.writeheader()
        self._writer.writerows(self.kept)
        self._file.flush()

    def row(
        self,
        name: str,
        value: Any,
        unit: str,
        *,
        shape: object = "",
        dtype: torch.dtype | None = None,
        times: Times | None = None,
        fraction: float | None = None,
    ) -> None:
        """value and unit: what was found, a message for unit "note" or "error". fraction: of the ceiling, or the limit."""
        cells = (self.section, name, shape, short(dtype), *(times or (None, None, None)), value, unit, fraction)
        texts = dict(zip(MEASURED, map(shown, cells), strict=True))
        self._writer.writerow(texts | self.machine)
        self._file.flush()
        print(" ".join(text for text in texts.values() if text), flush=True)

    def close(self) -> None:
        self._file.close()


def rows_of(path: Path) -> list[dict[str, str]]:
    """A report's rows; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def add_lost(path: Path, section: str, why: str) -> None:
    """Adds a row for a section whose process is gone, on the machine of the rows before, if there are any."""
    machine = {name: row[name] for row in rows_of(path)[-1:] for name in MACHINE}
    row = {"section": section, "name": section, "value": why, "unit": "error"} | machine
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(row)
    print(f"{section}: {why}", flush=True)


def short(dtype: torch.dtype | None) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` as a replay of a CUDA graph, so that the host's launch is no part of its time; itself without a GPU."""
    if device.type != "cuda":
        return call
    call()
    sync(device)
    graph = torch.cuda.CUDAGraph()
    # A capture that fails may leave its stream the current one, which the outer context takes back
    with collector_off(), torch.cuda.stream(torch.cuda.current_stream(device)), torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(call: Callable[[], object], device: torch.device, seconds: float = 0.4, least: int = 5, most: int = 200) -> Times:
    """Percentiles of the time of a call, caches cold: between `least` and `most` calls, `seconds` where that is in between."""
    return interleaved([call], device, seconds, least, most)[0]


def interleaved(
    calls: Sequence[Callable[[], object]], device: torch.device, seconds: float = 0.4, least: int = 5, most: int = 200
) -> list[Times]:
    """`measure` of several calls, which take turns, so that a slower clock or a busy moment falls on all of them."""
    for call in calls:
        call()
    sync(device)
    if device.type != "cuda":
        return [percentiles([_host_seconds(call) for _ in range(2)]) for call in calls]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    begin = time.monotonic()
    taken: list[list[float]] = [[] for _ in calls]
    while len(taken[0]) < least or (len(taken[0]) < most and time.monotonic() - begin < seconds):
        for call, times in zip(calls, taken, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
    return [percentiles(times) for times in taken]


def _host_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _machine(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "dry run",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit(but="benchmarks/results"),  # which this writes
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"

"""What every section of a GPU session shares: the CSV it writes, the clock it must keep to, and how a call is timed."""

from __future__ import annotations

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import triton

from fastcfg.files import slug

COLUMNS = (
    "section", "name", "shape", "dtype", "p20_ms", "p50_ms", "p80_ms", "value", "unit", "fraction",
    "gpu", "driver", "torch", "triton", "python", "commit",
)  # fmt: skip
FLUSH_BYTES = 256 * 2**20  # written between calls: more than any L2 holds
Times = tuple[float, float, float]  # 20th, 50th and 80th percentile in ms


@dataclass
class Session:
    """Where a session runs and what it has found: `ceilings` in bytes/s ("copy") and FLOP/s ("product")."""

    device: torch.device
    dry: bool
    report: Report
    ceilings: dict[str, float]
    deadline: float = 0.0

    def begin(self, seconds: float) -> None:
        """Starts a section of this length."""
        self.deadline = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left to the section."""
        return self.deadline - time.monotonic()


class Report:
    """Writes rows as they come, to the file and to stdout."""

    def __init__(self, folder: Path, device: torch.device):
        self.section = ""
        self.machine = _machine(device)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{slug(self.machine['gpu'])}.csv"
        self._file: IO[str] = self.path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()

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
        ms = dict(zip(("p20_ms", "p50_ms", "p80_ms"), times or ("", "", ""), strict=True))
        cells = {"section": self.section, "name": name, "shape": str(shape), "dtype": short(dtype), **ms, "value": value}
        cells |= {"unit": unit, "fraction": "" if fraction is None else fraction}
        shown = {key: f"{cell:.5g}" if isinstance(cell, float) else cell for key, cell in cells.items()}
        self._writer.writerow(shown | self.machine)
        self._file.flush()
        print(" ".join(str(cell) for cell in shown.values() if cell != ""), flush=True)

    def close(self) -> None:
        self._file.close()


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
    with torch.cuda.graph(graph):
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
        return [_percentiles([_host_seconds(call) for _ in range(2)]) for call in calls]
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
    return [_percentiles(times) for times in taken]


def _host_seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _percentiles(seconds: list[float]) -> Times:
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return cuts[1] * 1e3, cuts[4] * 1e3, cuts[7] * 1e3


def _machine(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "dry run",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"

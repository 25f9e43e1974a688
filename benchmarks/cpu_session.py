"""The CPU benchmark: fastcfg beside diffusers and OpenVINO, on the same weights, labels and noise, taking turns in one process.

    python benchmarks/cpu_session.py                            # about 12 minutes on two cores that do nothing else
    python benchmarks/cpu_session.py --dry-run --out /tmp/dry   # the code paths, tiny, in seconds

Prints rows as they come, then the tables of the README; writes <cpu>.csv and .png to --out. benchmarks/README.md says how
each figure is taken. Peers that are not installed are left out, and said to be. Exit code 1 if samples do not agree.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

import torch
from cpu.cases import make_cases, overhead_case
from cpu.contenders import absent
from cpu.rates import matrix_products
from cpu.report import Report, this_machine
from cpu.sections import loops, overhead
from cpu.show import tables
from cpu.timing import Rounds
from plot import draw

from fastcfg.errors import Error
from fastcfg.files import slug
from fastcfg.plots import pyplot

DTYPES = ["fp32", "bf16", "int8"]
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, two rounds, nothing compiled")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="these and fp32 alone, where others crawl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plot")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    machine = this_machine(cores)
    path = arguments.out / ("cpu-dry-run.csv" if arguments.dry_run else f"{slug(machine['cpu'])}.csv")
    try:
        pyplot()  # before the work
        report = Report(path, machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        _session(report, cores, ["fp32", *arguments.dtypes], arguments.dry_run)
        print(tables(report))
        draw(list(csv.DictReader(path.read_text().splitlines())), path.with_suffix(".png"), ["loop"])
    except Error as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


def _session(report: Report, cores: int, dtypes: list[str], dry: bool) -> None:
    report.row("note", "load average of the machine at the start", f"{os.getloadavg()[0]:.2f}", "tasks")
    for peer in absent():
        report.row("note", peer, "left out: not installed", "note")
    products = list(matrix_products(cores, dtypes, dry))
    for case in make_cases(dry):
        loops(report, case, products, _rounds(90, dry), cores, dry)
    overhead(report, overhead_case(dry), [p.dtype for p in products if p.dtype != "int8"], _rounds(10, dry))


def _rounds(seconds: float, dry: bool) -> Rounds:
    return Rounds(0, least=2) if dry else Rounds(seconds)


if __name__ == "__main__":
    sys.exit(main())

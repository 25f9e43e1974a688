"""fastcfg sweep: a grid of guidance settings, sampled from the same noise, judged and plotted."""

from __future__ import annotations

from pathlib import Path

import click

from fastcfg import plots
from fastcfg.sweep import run_sweep


@click.command("sweep")
@click.argument("spec", type=Path)
@click.option("--out", required=True, type=Path, help="Folder of the sweep; an existing sweep is resumed.")
@click.option("--devices", default=None, help='"cpu" or numbers of GPUs: 0,1. [default: every GPU, else the CPU]')
@click.option("--workers", default=None, type=int, help="Processes on the CPU, which share its cores. [default: 1]")
@click.option("--ray", default=None, help='Run on a Ray cluster: "auto" or its address.')
def command(spec: Path, out: Path, devices: str | None, workers: int | None, ray: str | None) -> None:
    """Samples and judges the grid in SPEC, a TOML file: a job's spec with [grid] and [eval].

    OUT receives sweep.csv, sweep.png and the jobs' samples. Killed at any time, the same command resumes it.

    \b
    fastcfg sweep sweep.toml --out runs/sweep
    """
    plots.pyplot()  # before the work, which may take hours
    rows = run_sweep(spec, out, devices=devices, workers=workers, ray=ray)
    plots.plot_tradeoff(rows, out / "sweep.png")
    click.echo(f"{len(rows)} points in {out / 'sweep.csv'}")

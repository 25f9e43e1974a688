"""fastcfg job: many samples in units that survive crashes; run, status, export."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import click

from fastcfg.jobs.export import export
from fastcfg.jobs.run import Status, run, set_aside, status


@click.group("job")
def command() -> None:
    """Batch generation that loses nothing: many samples, across crashes, devices and machines (docs/jobs.md).

    \b
    fastcfg job run spec.toml --out runs/50k
    """


@command.command("run")
@click.argument("spec", type=Path)
@click.option("--out", required=True, help="Folder or URL (s3://, gs://) of the job; an existing job is resumed.")
@click.option("--devices", default=None, help='"cpu" or numbers of GPUs: 0,1. [default: every GPU, else the CPU]')
@click.option("--workers", default=None, type=int, help="Processes on the CPU, which share its cores. [default: 1]")
@click.option("--ray", default=None, help='Run on a Ray cluster: "auto" or its address.')
def run_command(spec: Path, out: str, devices: str | None, workers: int | None, ray: str | None) -> None:
    """Computes what is missing of the job in SPEC, a TOML file.

    Killed at any time, it loses at most the units under way; the same command resumes it. Exit codes: 0 all units are there,
    1 some are not (the message says why), 2 bad input, 130 or 143 stopped by SIGINT or SIGTERM.

    \b
    fastcfg job run spec.toml --out runs/50k
    fastcfg job run spec.toml --out s3://bucket/50k --ray auto
    """
    result = run(spec, out, devices=devices, workers=workers, ray=ray)
    click.echo(f"{result} ({result.computed} units computed here)")


@command.command("status")
@click.argument("out", metavar="DIR")
@click.option("--verify", is_flag=True, help="Read every file whole; set damaged ones aside, to be computed again.")
@click.pass_context
def status_command(context: click.Context, out: str, verify: bool) -> None:
    """How far the job in DIR is. Exit code 1 where files are damaged.

    Without --verify files are judged by their sizes, and nothing is changed.

    \b
    fastcfg job status runs/50k --verify
    """
    found = status(out, verify=verify, progress=True)
    click.echo(found)
    _describe(found)
    if found.damaged:
        if verify:
            moved = set_aside(out, found.damaged)
            left = [k for k in found.damaged if k not in moved]
            if moved:
                click.echo("damaged files were moved to damaged/; the next `fastcfg job run` computes their units again")
            if left:
                click.echo(f"not moved: units {_ranges(left)}, which a run is computing, or which are no longer damaged")
        context.exit(1)


@command.command("export")
@click.argument("out_dir", metavar="DIR")
@click.option("--format", "kind", required=True, help="adm-npz, png or webdataset")
@click.option("--out", required=True, type=Path, help="The file or folder to write, which must not exist.")
@click.option("--scale", default=None, type=float, help="Only the samples of this guidance scale. [default: all]")
@click.option("--shard-size", default=10_000, show_default=True, help="Samples in a tar of webdataset.")
def export_command(out_dir: str, kind: str, out: Path, scale: float | None, shard_size: int) -> None:
    """Writes the samples of the complete job in DIR, in the order of their numbers, for other tools.

    \b
    fastcfg job export runs/50k --format adm-npz --scale 1.5 --out samples.npz
    """
    count = export(out_dir, kind, out, scale=scale, shard_size=shard_size)
    click.echo(f"{count} samples in {out}")


def _describe(found: Status) -> None:
    if found.missing:
        click.echo(f"missing: units {_ranges(found.missing)}")
    for k, reason in found.damaged.items():
        click.echo(f"damaged: unit {k}: {reason}")


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs = [[n for _, n in group] for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

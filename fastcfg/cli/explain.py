"""fastcfg explain: the plan, its cost and its launches, before anything runs."""

from __future__ import annotations

import json
from typing import Any

import click

from fastcfg.ceilings import STATED
from fastcfg.checkpoints import load
from fastcfg.cli.options import make_sampler, sampler_options
from fastcfg.errors import Error
from fastcfg.explain import MEASURED


@click.command("explain")
@sampler_options
@click.option(
    "--ceilings", metavar="GPU", help=f"Launches and floor times on that GPU, which need not be here: {', '.join(STATED)}."
)
@click.option("--measure", is_flag=True, help="Measure the machine's ceilings, for floor times. A second or two.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(ceilings: str | None, measure: bool, as_json: bool, **options: Any) -> None:
    """The plan row by row, model rows, FLOPs and bytes of a batch; for a DiT launch by launch.

    \b
    fastcfg explain --steps 25 --interval 100:800 --batch 64 --measure
    fastcfg explain --classifier fashion-mnist
    fastcfg explain --checkpoint DiT-XL-2-256x256.pt --ceilings h100
    """
    if measure and ceilings is not None:
        raise Error(f"give one: --measure for this machine, or --ceilings {ceilings}")
    sampler = make_sampler(load(options["checkpoint"]), options)
    explanation = sampler.explain(MEASURED if measure else ceilings)
    click.echo(json.dumps(explanation.to_json(), indent=2) if as_json else str(explanation))

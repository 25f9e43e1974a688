"""fastcfg explain: the plan and its cost, before anything runs."""

from __future__ import annotations

import json
from typing import Any

import click

from fastcfg.checkpoints import load
from fastcfg.cli.options import make_sampler, sampler_options


@click.command("explain")
@sampler_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool, **options: Any) -> None:
    """The plan row by row, model rows, FLOPs and bytes of a batch.

    \b
    fastcfg explain --steps 25 --interval 100:800 --batch 64
    """
    explanation = make_sampler(load(options["checkpoint"]), options).explain()
    click.echo(json.dumps(explanation.to_json(), indent=2) if as_json else str(explanation))

"""fastcfg verify: recomputes golden files."""

from __future__ import annotations

from pathlib import Path

import click

from fastcfg.engines import DTYPES, ENGINES
from fastcfg.verify import TOLERANCE
from fastcfg.verify import verify as run_verify


@click.command("verify")
@click.argument("weights", type=Path)
@click.argument("expected", type=Path)
@click.option("--engine", default="auto", show_default=True, help=f"auto, {', '.join(ENGINES)}")
@click.option("--dtype", default="fp32", show_default=True, help=", ".join(DTYPES))
def command(weights: Path, expected: Path, engine: str, dtype: str) -> None:
    """Recomputes every tensor of a golden pair and prints max abs difference and its ratio to the largest value.

    Exits 1 if any exceeds 1e-5 of the largest value or is missing.

    \b
    fastcfg verify tests/golden/dit_tiny.weights.safetensors tests/golden/dit_tiny.expected.safetensors
    """
    bad = 0
    for comparison in run_verify(weights, expected, engine, dtype):
        click.echo(str(comparison))
        bad += not comparison.ok
    click.echo(f"{bad} beyond {TOLERANCE:g} or missing" if bad else f"all within {TOLERANCE:g}")
    raise SystemExit(1 if bad else 0)

"""fastcfg verify: recomputes golden files."""

from __future__ import annotations

from pathlib import Path

import click

from fastcfg import portable
from fastcfg.engines import DTYPES, ENGINES
from fastcfg.verify import TOLERANCE
from fastcfg.verify import verify as run_verify


@click.command("verify")
@click.argument("weights", type=Path)
@click.argument("expected", type=Path)
@click.option("--engine", default="auto", show_default=True, help=f"auto, {', '.join(ENGINES)}")
@click.option("--dtype", default="fp32", show_default=True, help=", ".join(DTYPES))
@click.option("--native", is_flag=True, help="With this processor's own instructions, as sampling has them.")
def command(weights: Path, expected: Path, engine: str, dtype: str, native: bool) -> None:
    """Recomputes every tensor of a golden pair and prints max abs difference and its ratio to the largest value.

    In float32 it computes with instructions that every x86 processor with AVX2 has, in a process of its own, so that it
    comes to the same everywhere: clipped loops magnify a float32 rounding a hundredfold, and differ by more than the limit
    between processors, the official code's too. With --native, or in another dtype, it computes as sampling does.

    Exits 1 if any exceeds 1e-5 of the largest value or is missing.

    \b
    fastcfg verify tests/golden/dit_tiny.weights.safetensors tests/golden/dit_tiny.expected.safetensors
    """
    if dtype == "fp32" and not native and not portable.active():
        there = portable.run("verify", str(weights), str(expected), "--engine", engine)
        click.echo(there.stdout, nl=False)
        click.echo(there.stderr, nl=False, err=True)
        raise SystemExit(there.returncode)
    bad = 0
    for comparison in run_verify(weights, expected, engine, dtype):
        click.echo(str(comparison))
        bad += not comparison.ok
    click.echo(f"{bad} beyond {TOLERANCE:g} or missing" if bad else f"all within {TOLERANCE:g}")
    raise SystemExit(1 if bad else 0)

"""fastcfg kernels: what the GPU kernels compile to."""

from __future__ import annotations

import click

from fastcfg.errors import Error


@click.group("kernels")
def command() -> None:
    """What the GPU kernels compile to."""


@command.command("check")
@click.option("--target", "targets", multiple=True, help="sm_80, sm_90, sm_100, sm_120, gfx942; repeatable. [default: all]")
def check(targets: tuple[str, ...]) -> None:
    """Compiles every kernel variant for every target, no GPU needed, and prints registers, spills and shared memory.

    Exits 1 if any spills, exceeds a limit, or lacks the matrix unit or the asynchronous copies that it should use.

    \b
    fastcfg kernels check --target sm_90
    """
    try:
        from fastcfg.kernels.check import TARGETS, check_kernels
    except ImportError as error:
        raise Error(f"compiling kernels needs Triton, which cannot be imported here: {error}") from error
    failed = check_kernels(targets or TARGETS, click.echo)
    click.echo("\n".join(["", "failed:", *failed]) if failed else "all pass")
    raise SystemExit(1 if failed else 0)

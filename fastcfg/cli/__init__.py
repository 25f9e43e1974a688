"""The command line, `fastcfg`: one file a command."""

from __future__ import annotations

import importlib
from typing import Any

import click

from fastcfg.errors import Error

COMMANDS = ("sample", "train", "verify", "explain", "plot", "kernels")


class _Commands(click.Group):
    """Imports a command's file when it is asked for, and turns `fastcfg.Error` into a message and exit code 2."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"fastcfg.cli.{name}").command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except Error as error:
            click.echo(f"error: {error}", err=True)
            context.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastcfg")
def main() -> None:
    """Sampling with classifier-free guidance.

    Exit codes: 0 done, 1 a check failed, 2 bad input (nothing was written).
    """

"""The command line, `fastcfg`: one file a command."""

from __future__ import annotations

import importlib
from typing import Any

import click

from fastcfg.errors import Error

COMMANDS = ("sample", "train", "train-classifier", "verify", "explain", "plot", "eval", "job", "sweep", "kernels")


class _Commands(click.Group):
    """Imports a command's file when it is asked for, and turns `fastcfg.Error` and SIGINT into a message and an exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"fastcfg.cli.{name.replace('-', '_')}").command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (KeyboardInterrupt, click.Abort):
            click.echo("\nerror: stopped by SIGINT", err=True)  # on a line of its own, after a progress bar
            context.exit(130)
        except Error as error:
            click.echo(f"error: {error}", err=True)
            context.exit(getattr(error, "exit_code", 2))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastcfg")
def main() -> None:
    """Sampling with classifier-free guidance.

    Exit codes: 0 done, 1 a check or the work failed, 2 bad input (nothing was written), 130 and 143 stopped by a signal.
    """

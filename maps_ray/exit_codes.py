"""How a command ends that does not end well: a message on the error output, no traceback, and an exit code."""

from __future__ import annotations

import os

import typer

FAILED = 1
"""What was asked could not be completed."""
# As click ends on an option that it does not know (`click.UsageError.exit_code`).
REFUSED = 2
"""What was asked is at fault: a value, a file, a combination of options."""
STOPPED = 130
"""Ctrl-C ended it, as shells have it; what was begun can be continued."""


def failed(message: str = "", code: int = FAILED) -> typer.Exit:
    """Says why a command fails; raise what it returns."""
    if message:
        # As no-color.org has it; typer asks for it in its help alone.
        typer.secho(message, fg=None if os.environ.get("NO_COLOR") else "red", err=True)
    return typer.Exit(code)


def stopped(message: str = "") -> typer.Exit:
    """Says that a command was stopped, and how it goes on; raise what it returns."""
    if message:
        typer.echo(message, err=True)
    return typer.Exit(STOPPED)

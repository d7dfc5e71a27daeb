"""The command line; docs/reference/command-line.md lists the commands."""

from __future__ import annotations

import sys

from ..errors import MissingExtraError, require


def main() -> None:
    """Run the command line; imports are in here, so that a missing extra can be named."""
    try:
        for package in ("typer", "rich"):
            require(package, "cli", "The command line")
    except MissingExtraError as error:
        print(f"lamina: {error}", file=sys.stderr)
        sys.exit(2)
    from .app import app

    app(prog_name="lamina")


__all__ = ["main"]

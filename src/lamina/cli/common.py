"""Errors, warnings and interruptions of a command, without tracebacks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from .._util import startup as _startup
from ..errors import LaminaError, LaminaWarning, printable
from ..training.interrupts import raising_on_terminate, signal_of


@contextmanager
def cli_errors() -> Iterator[None]:
    """Print errors as one paragraph with exit code 2, interruptions as a line; no traceback.

    The exit code of an interruption is the usual one: 130 after Ctrl-C, 143 after SIGTERM.
    """
    _startup.raise_on_ctrl_c()
    try:
        with warnings.catch_warnings(), raising_on_terminate():
            warnings.showwarning = _show_warning
            # A resumed run lists what its load left out among its changes.
            warnings.filterwarnings("ignore", "the saved state was loaded, but", LaminaWarning)
            yield
    except LaminaError as error:
        print(f"lamina: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        print("lamina: interrupted; nothing more was saved.", file=sys.stderr)
        raise typer.Exit(128 + signal_of(error)) from None
    finally:
        if _startup.is_command_line():
            _startup.end_quietly_on_signals()


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Print lamina's own warnings as it prints errors: there is no line of the user's."""
    if issubclass(category, LaminaWarning):
        print(f"lamina: {printable(' '.join(str(message).split()))}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

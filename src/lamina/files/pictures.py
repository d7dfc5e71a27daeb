"""Pictures as files that are whole or absent."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import LaminaError
from .atomic import atomic

_KINDS = (".png", ".svg", ".pdf")


def check_picture(path: Path, option: str = "") -> None:
    """Raise `LaminaError` unless a picture can be written there.

    Args:
        path: the file.
        option: the option that names it, for the message.
    """
    if path.suffix not in _KINDS or not path.parent.is_dir():
        raise LaminaError(
            f"{f'{option} {path}'.lstrip()}: the picture cannot be written there; expected a .png, "
            ".svg or .pdf file in a folder that exists."
        )


def write_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib, in the form that the suffix says.

    Args:
        figure: the figure.
        path: the file, replaced if it exists.

    Raises:
        LaminaError: if it cannot be written; what was there stays.
    """
    check_picture(path)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=160, format=path.suffix[1:])
    with atomic(path) as file:
        file.write(drawn.getvalue())

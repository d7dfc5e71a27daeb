"""A preview as plain data, such as JSON can hold."""

from __future__ import annotations

import math
from typing import Any

from .shown import Row, Shown

_LEFT_OUT = ("lr", "active")


def preview_data(preview: Shown, digest: str) -> dict[str, Any]:
    """Return a preview as plain data: the run, each group, findings, the hash.

    Args:
        preview: the preview.
        digest: its hash.
    """
    return {
        "steps": preview.run.steps,
        "steps_per_epoch": preview.run.steps_per_epoch,
        "hash": digest,
        "groups": [
            {**_row_data(row), "names": _names(preview, index)}
            for index, row in enumerate(preview.rows)
        ],
        "findings": [
            {"code": each.code, "message": each.message, "fix": each.fix}
            for each in preview.findings
        ],
    }


def _names(preview: Shown, index: int) -> list[str]:
    return [info.name for info in preview.resolved.cells[index].parameters]


def _row_data(row: Row) -> dict[str, Any]:
    values = {key: value for key, value in vars(row).items() if key not in _LEFT_OUT}
    return {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; it has no infinity."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value

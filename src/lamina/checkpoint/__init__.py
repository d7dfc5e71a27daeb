"""Checkpoint files that verify themselves, and the folder that holds the last and the best."""

from __future__ import annotations

from .checkpoint import (
    FOLDER,
    FORMAT,
    Found,
    candidates,
    is_whole,
    load_safely,
    mark_best,
    newest,
    prune,
    read,
    save,
    step_of,
    tidy,
)

__all__ = [
    "FOLDER",
    "FORMAT",
    "Found",
    "candidates",
    "is_whole",
    "load_safely",
    "mark_best",
    "newest",
    "prune",
    "read",
    "save",
    "step_of",
    "tidy",
]

"""Saved optimizer state: its form, and how it is matched to a plan by name."""

from __future__ import annotations

from .extend import Resumed, resume_from
from .load import Loaded, prepare
from .report import Changed, LoadReport
from .schema import FORMAT, run_record

__all__ = [
    "FORMAT",
    "Changed",
    "LoadReport",
    "Loaded",
    "Resumed",
    "prepare",
    "resume_from",
    "run_record",
]

"""What will happen in a run: rows, tables and plots of it, and the comparison afterwards."""

from __future__ import annotations

from .compare import PlanDiff
from .diff import diff
from .preview import Preview, preview_of

__all__ = ["PlanDiff", "Preview", "diff", "preview_of"]

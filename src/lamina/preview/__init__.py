"""What will happen in a run: rows, tables and plots of it, and the comparison afterwards."""

from __future__ import annotations

from .preview import Preview, preview_of

__all__ = ["Preview", "preview_of"]

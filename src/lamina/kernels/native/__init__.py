"""Compiled loops for the CPU: all tensors of all groups in one call, each read and written once."""

from __future__ import annotations

from .kernel import Native

__all__ = ["Native"]

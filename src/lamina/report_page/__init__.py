"""The report of a run: one HTML file that works without a network."""

from .compare import write_comparison
from .page import write_report

__all__ = ["write_comparison", "write_report"]

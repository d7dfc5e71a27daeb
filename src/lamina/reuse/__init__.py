"""Reuse the outputs of what is frozen, with the same bits; see docs/how-to/reuse.md."""

from .door import reuse, reuse_settings
from .examples import IndexedDataset
from .forecast import Forecast, StageForecast
from .session import Reuse

__all__ = ["Forecast", "IndexedDataset", "Reuse", "StageForecast", "reuse", "reuse_settings"]

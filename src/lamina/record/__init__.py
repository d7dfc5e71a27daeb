"""The record of a run: what was applied and measured, by group and step, in bounded memory."""

from .record import METRICS, Record, RecordEvent
from .recorder import Recorder
from .writers import JsonLines, Logger, TensorBoard

__all__ = ["METRICS", "JsonLines", "Logger", "Record", "RecordEvent", "Recorder", "TensorBoard"]

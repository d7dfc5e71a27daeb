"""The record of a run: what was applied and measured, by group and step, in bounded memory."""

from .record import METRICS, Record, RecordEvent

__all__ = ["METRICS", "Record", "RecordEvent"]

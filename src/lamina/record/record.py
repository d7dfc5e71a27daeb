"""What a run really did: values by group and step, metrics, events and findings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StateError
from ..model.finding import Finding
from . import lines
from .pending import Pending
from .series import Floats, Series, Steps

#: the group of what belongs to the run as a whole: `record.series(METRICS, "val_loss")`
METRICS = ""
#: events and findings are kept up to this number: the first half of it and the latest ones
_MOST_EVENTS = 2000
#: curves beyond this number are not recorded; an event says so
_MOST_SERIES = 100_000
_LAST_STEP = 2**53


@dataclass(frozen=True)
class RecordEvent:
    """Something that does not happen at every step, such as a thaw."""

    step: int
    kind: str
    text: str
    groups: tuple[str, ...] = ()


class Record:
    """Holds what a run did, in bounded memory.

    Of every curve the newest points are kept in full; older ones are thinned evenly, the lowest and
    the highest of each span of steps staying, so that no spike disappears.

    Args:
        capacity: how many of the newest points of a curve are kept in full (up to twice as many).
        points: about how many older points of a curve are kept.
        batch: how many tensors are read together; see `add`.

    Example:
        >>> record = Record()
        >>> record.add(0, "head", lr=1e-3, grad_norm=torch.tensor(2.0))
        >>> record.metrics(0, loss=0.7)
        >>> record.series("head", "grad_norm")
        (array([0]), array([2.]))
    """

    def __init__(self, capacity: int = 512, *, points: int = 1000, batch: int = 1024) -> None:
        for name, given, least in (
            ("capacity", capacity, 1),
            ("points", points, 4),
            ("batch", batch, 1),
        ):
            if type(given) is not int or given < least:
                raise StateError(
                    f"Record was given {name}={given!r}; expected a whole number of at least "
                    f"{least}."
                )
        self._capacity, self._points = capacity, points
        self._series: dict[tuple[str, str], Series] = {}
        self._groups: dict[str, None] = {}
        self._events: list[RecordEvent] = []
        self._findings: dict[Finding, None] = {}
        self._pending = Pending(Series.add, batch)
        #: events that were left out, because there were too many
        self.dropped_events = 0
        #: lines of a file that could not be read
        self.damaged_lines = 0

    # --- writing -------------------------------------------------------------------------------

    def add(self, step: int, group: str, /, **values: float | torch.Tensor | None) -> None:
        """Record values of a parameter group at a step.

        Args:
            step: the optimizer step, counted from 0.
            group: the name of the group.
            **values: names and numbers; None is left out. Scalar tensors are read later, many at
                once, so that nothing waits for an accelerator here; they must not be changed in
                place afterwards.

        Raises:
            StateError: for a step that is no whole number, or a value that is no number.
        """
        if type(step) is not int or not 0 <= step < _LAST_STEP:
            raise StateError(f"a record was given step={step!r}; expected a whole number from 0.")
        if group not in self._groups and group != METRICS:
            self._groups[group] = None
        for name, value in values.items():
            if value is None:
                continue
            series = self._series.get((group, name)) or self._curve(group, name)
            if series is None:
                continue
            if type(value) is float:  # the usual case, without a look at anything else
                series.add(step, value)
            elif isinstance(value, torch.Tensor):
                self._add_tensor(series, step, name, value)
            elif isinstance(value, (bool, int, float, np.number)):
                series.add(step, float(value))
            else:
                raise StateError(
                    f"a record was given {name}={value!r} for {group!r}; expected a number or a "
                    "tensor with one element."
                )

    def metrics(self, step: int, /, **values: float | torch.Tensor | None) -> None:
        """Record numbers of the run as a whole, such as `loss` or `val_accuracy`; see `add`."""
        self.add(step, METRICS, **values)

    def event(self, step: int, kind: str, text: str, groups: Iterable[str] = ()) -> None:
        """Record something that does not happen at every step.

        Args:
            step: the first step it holds for.
            kind: a word, such as `"thaw"`, `"freeze"`, `"plateau"`, `"skipped"`.
            text: one line for people.
            groups: the names of the groups it is about.
        """
        if len(self._events) >= _MOST_EVENTS:
            del self._events[_MOST_EVENTS // 2]
            self.dropped_events += 1
        self._events.append(RecordEvent(int(step), str(kind), str(text), tuple(groups)))

    def finding(self, finding: Finding) -> None:
        """Record a finding, once."""
        if len(self._findings) < _MOST_EVENTS:
            self._findings[finding] = None

    def cut(self, step: int) -> None:
        """Forget this step and all that follows it: a run goes on from an earlier state."""
        self._pending.flush()
        for series in self._series.values():
            series.cut(step)
        self._events = [event for event in self._events if event.step < step]

    # --- reading -------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of all groups, in the order in which they came."""
        return tuple(self._groups)

    @property
    def events(self) -> tuple[RecordEvent, ...]:
        """All events, in the order in which they came."""
        return tuple(self._events)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, in the order in which they came."""
        return tuple(self._findings)

    @property
    def last_step(self) -> int | None:
        """The largest step of any curve; None of an empty record."""
        self._pending.flush()
        ends = [steps[-1] for steps, _ in map(Series.arrays, self._series.values()) if len(steps)]
        return max(map(int, ends), default=None)

    def names(self, group: str = METRICS) -> tuple[str, ...]:
        """Return the names of the values of a group; of the metrics by default."""
        return tuple(name for its_group, name in self._series if its_group == group)

    def series(self, group: str, name: str) -> tuple[Steps, Floats]:
        """Return the steps and values of a curve, as far as they are kept; empty if unknown.

        Tensors that wait are read first, which waits for the accelerator.

        Args:
            group: the name of a group, or `METRICS`.
            name: the name of the value.

        Returns:
            Whole numbers in ascending order, and as many floats.
        """
        self._pending.flush()
        found = self._series.get((group, name))
        return Series(1, 4).arrays() if found is None else found.arrays()

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record as JSON lines; the file appears whole or not at all.

        Raises:
            LaminaError: if it cannot be written.
        """
        lines.save(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], **sizes: int) -> Record:
        """Read a record that `save` wrote, or the `metrics.jsonl` of a run.

        The file is data and is parsed as such. A last line that a kill has cut off is passed over,
        damaged lines are counted in `damaged_lines`, and fields of later versions are ignored.

        Args:
            path: the file.
            **sizes: as for `Record`; a file with more points than that is thinned while it is read.

        Raises:
            StateError: if the file cannot be read, or no line of it is one of a record.
        """
        record = cls(**sizes)
        lines.read(record, Path(path))
        return record

    # --- parts ---------------------------------------------------------------------------------

    def _curve(self, group: str, name: str) -> Series | None:
        found = self._series.get((group, name))
        if found is not None:
            return found
        if len(self._series) >= _MOST_SERIES:
            self._refuse_series()
            return None
        return self._series.setdefault((group, name), Series(self._capacity, self._points))

    def _refuse_series(self) -> None:
        text = f"more than {_MOST_SERIES:,} curves; those that came later are not recorded"
        if not any(event.kind == "record-full" for event in self._events):
            self.event(0, "record-full", text)

    def _add_tensor(self, series: Series, step: int, name: str, value: torch.Tensor) -> None:
        if value.numel() != 1 or value.is_complex():
            raise StateError(
                f"a record was given a tensor of shape {tuple(value.shape)} and {value.dtype} as "
                f"{name}; expected a real tensor with one element."
            )
        if value.is_meta:  # it has no number
            series.add(step, float("nan"))
        else:
            self._pending.add(series, step, value)

    def curves(self) -> list[tuple[str, str, Steps, Floats]]:
        """Return every curve with its group and its name."""
        self._pending.flush()
        return [(*key, *series.arrays()) for key, series in self._series.items()]

    def put(self, group: str, name: str, steps: Any, values: Any) -> None:
        """Add many points of a curve at once."""
        if group not in self._groups and group != METRICS:
            self._groups[group] = None
        series = self._curve(group, name)
        if series is not None:
            series.extend(np.asarray(steps, np.int64), np.asarray(values, np.float64))

"""What a report shows, gathered from a record and a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..model.finding import Finding
from ..record.planned import ParameterEntry, Planned, PlannedGroup
from ..record.record import METRICS, Record
from ..record.series import Floats, Steps
from .colours import group_colours

#: groups whose curves are drawn; of more, so many are chosen evenly
DRAWN = 60


@dataclass(frozen=True, eq=False)
class Source:
    """A run as a report sees it: what was recorded, what was planned, and the model.

    Args:
        record: what happened; empty for a preview.
        planned: what was meant, if that is known.
        parameters: the parameters of the model; by default those of the plan.
        title: what the page is about.
        facts: what else is known, by name.
    """

    record: Record
    planned: Planned | None = None
    parameters: Sequence[ParameterEntry] = ()
    title: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    _curves: dict[tuple[str, str], tuple[Steps, Floats]] = field(default_factory=dict, repr=False)

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """The names of all groups, those of the plan first."""
        planned = () if self.planned is None else (group.name for group in self.planned.groups)
        return tuple(dict.fromkeys([*planned, *self.record.groups]))

    @cached_property
    def plan_of(self) -> Mapping[str, PlannedGroup]:
        """What was planned for each group."""
        return {} if self.planned is None else {group.name: group for group in self.planned.groups}

    @cached_property
    def entries(self) -> Sequence[ParameterEntry]:
        """The parameters of the model, as far as they are known."""
        if self.parameters or self.planned is None:
            return self.parameters
        return self.planned.parameters

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of the plan and of the run, each once, problems before advice."""
        planned = () if self.planned is None else self.planned.findings
        every = dict.fromkeys([*self.record.findings, *planned])
        return tuple(sorted(every, key=lambda finding: finding.severity == "advice"))

    def actual(self, group: str, name: str) -> tuple[Steps, Floats]:
        """Return a curve of the record; it is put together once."""
        key = (group, name)
        if key not in self._curves:
            self._curves[key] = self.record.series(group, name)
        return self._curves[key]

    def planned_lr(self, group: str) -> tuple[Steps, Floats]:
        """Return the planned lr of a group where it trains; gaps are NaN."""
        plan = self.plan_of.get(group)
        if plan is None or self.planned is None:
            return np.empty(0, np.int64), np.empty(0)
        return self.planned.steps, np.where(plan.active, plan.lr, np.nan)

    @cached_property
    def peaks(self) -> Mapping[str, float | None]:
        """The largest lr of each group, as recorded or else as planned; None if it never trains."""
        found = {}
        for group in self.groups:
            peak = 0.0
            for _, lr in (self.actual(group, "lr"), self.planned_lr(group)):
                finite = lr[np.isfinite(lr)]
                if len(finite):
                    peak = max(peak, float(finite.max()))
            found[group] = peak or None
        return found

    @cached_property
    def states(self) -> Mapping[str, str]:
        """Whether each group trains from the start, "later", or is "frozen"."""
        found = {}
        for group, peak in self.peaks.items():
            spans = self.planned_spans(group) or self.spans(group)
            found[group] = "later" if spans and spans[0][0] > 0 else "trains"
            if peak is None:
                found[group] = "frozen"
        return found

    @cached_property
    def colours(self) -> Mapping[str, str]:
        """The colour of each group."""
        return group_colours(self.groups, [self.peaks[group] is not None for group in self.groups])

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """The groups whose curves are drawn: those that train, evenly chosen if they are many."""
        training = [group for group in self.groups if self.peaks[group] is not None]
        if len(training) <= DRAWN:
            return tuple(training)
        places = np.unique(np.linspace(0, len(training) - 1, DRAWN).astype(int))
        return tuple(training[place] for place in places)

    @cached_property
    def steps_taken(self) -> int:
        """How many steps were recorded; a validation after the last one is none of them."""
        ends = [steps[-1] for steps, _ in (self.actual(g, "lr") for g in self.groups) if len(steps)]
        return max(map(int, ends), default=-1) + 1

    @cached_property
    def last_step(self) -> int:
        """The last step that is known, recorded or planned."""
        ends = [max(0, self.steps_taken - 1)]
        if self.planned is not None and self.planned.total:
            ends.append(self.planned.total - 1)
        return max(ends)

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of the run, without the norms of clip scopes and the ratios of layers."""
        names = self.record.names(METRICS)
        return tuple(name for name in names if not name.startswith(("norm/", "ratio/")))

    @cached_property
    def scopes(self) -> tuple[str, ...]:
        """The rules with a clip norm of their own."""
        names = self.record.names(METRICS)
        return tuple(name.removeprefix("norm/") for name in names if name.startswith("norm/"))

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers whose updates were measured apart from the groups."""
        names = self.record.names(METRICS)
        return tuple(name.removeprefix("ratio/") for name in names if name.startswith("ratio/"))

    def spans(self, group: str) -> list[tuple[int, int]]:
        """Return where the recorded lr is above 0: first step and the one after the last."""
        steps, lr = self.actual(group, "lr")
        return _spans(steps, lr > 0, self.steps_taken)

    def planned_spans(self, group: str) -> list[tuple[int, int]]:
        """Return where the plan trains a group: first step and the one after the last."""
        plan = self.plan_of.get(group)
        if plan is None or self.planned is None:
            return []
        return _spans(self.planned.steps, plan.active, self.last_step + 1)


def _spans(steps: Steps, active: Any, end: int) -> list[tuple[int, int]]:
    """Return the spans of steps in which something holds; each lasts until the next sample."""
    edges = np.flatnonzero(np.diff(active.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return [
        (int(steps[first]), int(steps[last]) if last < len(steps) else end) for first, last in edges
    ]

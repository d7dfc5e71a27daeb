"""What will happen, before it does: rows as data, text, a picture, and explanations."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import nn

from .._util.text import listed
from ..errors import PlanError
from ..model.finding import Finding
from ..model.parameters import observe, walk
from ..plan.plan import Plan
from ..record.planned import Planned
from ..record.record import Record
from ..resolve.explain import Explanation, explain
from ..resolve.resolve import resolve_owned
from ..resolve.resolved import Resolved
from ..resolve.timeline import NO_FEEDBACK, Feedback, Spliced, Values, values_at
from ..runtime.flags import Flags, flags_of
from ..schedules.duration import Run
from ..state.extend import Resumed, resume_from
from . import rows, sampling
from .shown import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult

    from .compare import PlanDiff


class Preview:
    """What a plan will do to every part of a model; prints as a table.

    Args:
        resolved: a plan, settled for a model and a run.
        feedback: what happened in a run so far; nothing by default.
        flags: what the wrapping of the model means for `requires_grad`; by default, nothing.
        resumed: the saved run that goes on, whose values are shown up to its clock.

    Example:
        >>> from torch import nn
        >>> print(Plan("SGD", lr=0.1).preview(nn.Linear(2, 1), steps=10))
        10 steps · SGD · 1 group · 3 of 3 parameters train
        weight decay 0 · no clipping
        <BLANKLINE>
                     params
        group    in tensors   lr
        ───────  ──────────  ───
        default      3 in 2  0.1
    """

    def __init__(
        self,
        resolved: Resolved,
        feedback: Feedback = NO_FEEDBACK,
        *,
        flags: Flags | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        self.resolved = resolved
        self.feedback = feedback
        self.resumed = resumed
        #: what keeps requires_grad on while it is frozen, since DDP needs it
        self.flags = flags or Flags({})

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is legal in the plan but suspicious."""
        found = list(self.resolved.findings)
        if self.resumed is not None and self.resumed.jumps:
            fix = "If that is not meant, extend='hold' keeps the saved schedules."
            found.append(Finding("value-jumps", f"{listed(self.resumed.jumps)}.", fix))
        return (*found, *self.flags.findings, *self._held_at_zero())

    def _held_at_zero(self) -> list[Finding]:
        """Return a held run that learns nothing more, because its schedules end at 0."""
        end, last = self.resolved.settled_for.steps, self.run.steps
        if self.resumed is None or end is None or last is None or last <= end:
            return []
        values = self.values(np.arange(end, last))
        if any(np.any(values.lr(index)) for index in range(len(self.resolved.cells))):
            return []
        return [
            Finding(
                "held-at-zero",
                f"every lr is 0 from step {end} on, where the saved schedules end.",
                "Use extend='stretch', or a schedule that ends above 0.",
            )
        ]

    @property
    def run(self) -> Run:
        """The length of the run, as far as it is known."""
        return self.resolved.run

    @cached_property
    def peaks(self) -> tuple[tuple[float, int], ...]:
        """The largest lr of each group over all steps, and the first step that has it."""
        return sampling.peaks(self)

    @cached_property
    def steps(self) -> npt.NDArray[np.int64]:
        """The steps at which `Row.lr` is sampled: all, or about 2000 of a long run.

        Among them are the first and the last, every thaw and freeze, the bounds of the phases of
        schedules, and the peaks. Of a run of unknown length: where groups begin to train.
        """
        return sampling.sampled(self)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """One row for each parameter group."""
        return rows.rows(self)

    @cached_property
    def hash(self) -> str:
        """The SHA-256 of what each parameter does at each step, for tests of a recipe.

        It is the same in every process, on every machine and under every version of Python, and
        for all plans that do the same, however their rules are written. It differs if anything
        that is applied differs: an optimizer, a value while its parameters train, when they train,
        what is clipped together, the length of the run, what happens at a gradient that is not
        finite. Shapes, dtypes and names of groups are left out, so that a small model of the same
        names has the hash of the large one.

        Numbers count up to 2^-24 of the largest one of a group over the run, which is what 32-bit
        arithmetic keeps of them: machines do not agree about the last bits of a cosine. Of a run
        of more than 4 million steps a part is looked at. Functions on gradients count by their
        names, since their code cannot be compared.

        Example:
            >>> from torch import nn
            >>> one = Plan("SGD", lr=0.1).preview(nn.Linear(2, 1), steps=10)
            >>> other = Plan("SGD", lr=1.0, schedule="constant(0.1)")
            >>> one.hash == other.preview(nn.Linear(2, 1), steps=10).hash
            True
        """
        from .digest import digest

        return digest(self)

    def diff(self, other: Preview) -> PlanDiff:
        """Return what another preview does otherwise: for which parameters, when, which values.

        Args:
            other: the preview to compare with; this one is the earlier.

        Returns:
            The differences; false if there are none. Prints as text.

        Raises:
            PlanError: if `other` is no preview.
        """
        from .compare import compare

        if not isinstance(other, Preview):
            raise PlanError(
                f"diff was given {type(other).__name__}; expected the preview of another plan, "
                "such as other_plan.preview(model, steps=1000)."
            )
        return compare(self, other)

    def values(self, step: Any) -> Values:
        """Return every value at a step or an array of steps, by the present groups."""
        after = values_at(self.resolved, step, self.feedback)
        if self.resumed is None or self.resumed.before is None:
            return after
        before = values_at(self.resumed.before, step, self.resumed.past)
        return Spliced(before, after, step, self.resumed.clock)

    def _feedback_at(self, step: int) -> tuple[Resolved, Feedback]:
        """Return the resolved plan at a step: before its clock, a resumed run had another."""
        resumed = self.resumed
        if resumed is None or resumed.before is None or step >= resumed.clock:
            return self.resolved, self.feedback
        return resumed.before, resumed.past

    def at(self, step: int) -> dict[str, dict[str, Any]]:
        """Return the hyperparameters of every group at a step, in the form of `optimizer.applied`.

        Before the clock of a resumed run these are its groups as they were.
        """
        resolved, feedback = self._feedback_at(step)
        values = values_at(resolved, step, feedback)
        return {cell.name: values.hyper(i) for i, cell in enumerate(resolved.cells)}

    def explain(self, name: str, step: int = 0) -> Explanation:
        """Return the chain of rules behind every number of a parameter at a step."""
        resolved, feedback = self._feedback_at(step)
        return explain(resolved, name, step, feedback)

    def plot(self, path: str | os.PathLike[str] | None = None, ax: Axes | None = None) -> Figure:
        """Draw the lr of every group over the run, and below it when each one trains.

        Args:
            path: where to write the picture (PNG, SVG or PDF, by its suffix), if anywhere.
            ax: matplotlib axes to draw into; a new figure by default.

        Returns:
            The matplotlib figure; no window is opened and no global state touched.

        Raises:
            TimeUnitError: if the length of the run is unknown.
            MissingExtraError: if matplotlib is not installed.
        """
        from .plot import plot

        return plot(self, path, ax)

    def planned(self) -> Planned:
        """Return what it shows as plain data, for a report of the run."""
        from .planned import planned_of

        return planned_of(self)

    def html(self, path: str | os.PathLike[str], *, title: str = "Plan") -> None:
        """Write it as one HTML page with curves, which works without a network.

        Args:
            path: the file, replaced if it exists.
            title: the heading of the page.

        Raises:
            MissingExtraError: if plotly is not installed.
            LaminaError: if the file cannot be written.

        Example:
            >>> import tempfile
            >>> preview = Plan("SGD", lr=0.1).preview(nn.Linear(2, 1), steps=10)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     preview.html(f"{folder}/plan.html")
        """
        from ..report_page import write_report

        write_report(Record(), path, planned=self.planned(), title=title)

    def text(self, *, width: int | None = None, full: bool = False) -> str:
        """Return the table as text.

        Args:
            width: in characters; that of the terminal by default.
            full: one line for each group. By default, what one rule freezes is one line, and of
                more than 24 lines, those whose names differ only in numbers become one.
        """
        from .table import text

        return text(self, width, full=full)

    def data(self) -> dict[str, Any]:
        """Return the run, each group, findings and the hash as plain data, such as JSON holds."""
        from .export import preview_data

        return preview_data(self, self.hash)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """Return the table for a notebook; names are escaped."""
        from .page import html

        return html(self)

    def __repr__(self) -> str:
        return f"<Preview of {len(self.resolved.cells)} groups; print it, or see .rows>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .table import rich_parts

        yield from rich_parts(self, options.max_width, unicode=not options.ascii_only)


def preview_of(
    plan: Plan,
    model: nn.Module,
    run: Run,
    resume: dict[str, Any] | None = None,
    extend: str | None = None,
    renamed: Mapping[str, str | None] | None = None,
) -> Preview:
    """Return the preview of a plan on a model; see `Plan.preview`."""
    owned = walk(model)
    settle = partial(resolve_owned, plan, owned, seen=observe(model, owned))
    resumed = resume_from(settle, run, resume, extend, renamed)
    resolved = resumed.resolved if resumed else settle(run)
    tensors = {item.info.name: item.tensor for item in owned}
    flags = flags_of(model, resolved.cells, tensors, resumed.clock if resumed else 0)
    feedback = resumed.feedback if resumed else NO_FEEDBACK
    return Preview(resolved, feedback, flags=flags, resumed=resumed)

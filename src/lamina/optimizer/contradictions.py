"""What contradicts a plan while it runs: flags turned by hand, replaced parameters, a rebuild."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._util.notices import Notices
from .._util.sharding import is_sharded
from ..model.parameters import frozen_by_call
from ..resolve.findings import rebuilt, turned_off, turned_on
from ..resolve.resolved import Cell, Resolved
from ..runtime.claims import Claim
from ..runtime.exchange import Exchange, Groups
from ..runtime.freezing import Freezer
from .checks import untrained


@dataclass(eq=False)
class Contradictions:
    """Warns, once each, of what somebody did to the model or its flags against the plan.

    Args:
        resolved: the resolved plan.
        freezer: what sets the flags.
        claim: what knows the other plans in force.
        exchange: what knows the model.
        notices: the warnings given so far.
    """

    resolved: Resolved
    freezer: Freezer
    claim: Claim
    exchange: Exchange
    notices: Notices
    #: the step in which to search the model again, and how many steps that was after the last time
    search_due: int = 0
    search_wait: int = 0

    def report_rebuilt(self, loaded: bool) -> None:
        """Warn that this optimizer replaced one of the same plan, unless its state was loaded."""
        if not loaded:
            self.notices.tell(rebuilt(self.claim.lost_steps), key="rebuilt")
        self.claim.lost_steps = 0

    def check_flags(self, groups: Groups) -> None:
        """Warn of `requires_grad` that contradicts the plan."""
        for cell, names, params in self.freezer.turned(groups):
            on = params[0].requires_grad
            if on or not all(map(frozen_by_call, params)):  # who calls lamina.freeze knows
                self.report_flags(cell, names, on)

    def report_flags(self, cell: Cell, names: Sequence[str], on: bool) -> None:
        """Warn of parameters whose flag was turned on, or off, by hand."""
        finding = turned_on(names, cell.by_model) if on else turned_off(names)
        self.notices.tell(finding, key=f"{finding.code} {cell.name}")

    def check_places(self, groups: Groups, clock: int) -> None:
        """Warn of parameters that were replaced since the build: the old ones have no gradient."""
        if clock < self.search_due:
            return
        # The search is dear: ever more rarely, while nothing is found.
        self.search_wait = max(1, 2 * self.search_wait)
        self.search_due = clock + self.search_wait
        if any(is_sharded(param) for group in groups for param in group["params"]):
            return
        elsewhere = self.claim.trained_elsewhere()
        for finding in untrained(self.resolved, groups, self.exchange.model, elsewhere):
            self.notices.tell(finding)

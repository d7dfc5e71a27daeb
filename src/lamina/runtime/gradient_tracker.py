"""Who received a gradient, where the optimizer's state does not tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


class GradientTracker:
    """The parameters that had a gradient since the step `since`, by name.

    Lamina's own algorithms count the updates of each parameter; guests need not have any state,
    and LBFGS has one over all parameters. What is seen here is not saved: it begins anew when a
    state is loaded.
    """

    def __init__(self) -> None:
        self.since = 0
        self.names: set[str] = set()

    def begin(self, clock: int) -> None:
        """Forget what was seen; count from this step on."""
        self.since, self.names = clock, set()

    def note(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Remember who has a gradient now."""
        for group in groups:
            if len(known := self.names.intersection(group["param_names"])) < len(group["params"]):
                pairs = zip(group["params"], group["param_names"], strict=True)
                self.names |= {n for p, n in pairs if n not in known and p.grad is not None}

"""What will happen, before it does: rows as data, text, a picture, and explanations."""

from __future__ import annotations

from .explain import Explanation, explain
from .resolved import Resolved
from .timeline import NO_FEEDBACK


class Preview:
    """placeholder: rows, text and plot come next."""

    def __init__(self, resolved: Resolved) -> None:
        self.resolved = resolved

    def explain(self, name: str, step: int = 0) -> Explanation:
        """The chain of rules behind every number of a parameter at a step."""
        return explain(self.resolved, name, step, NO_FEEDBACK)

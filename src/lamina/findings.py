"""What is legal in a plan but suspicious: stable codes, causes with names, fixes."""

from __future__ import annotations

from collections.abc import Sequence

from .cascade import Draft
from .forms import CONTROLS
from .plan import Plan
from .resolved import NEVER, Cell, Finding
from .time import Run


def find(
    plan: Plan, drafts: Sequence[Draft], cells: Sequence[Cell], run: Run
) -> tuple[Finding, ...]:
    """All findings of a resolved plan."""
    return (
        *_nothing_trains(drafts),
        *_set_but_never_trains(plan, drafts),
        *_thaw_after_end(drafts, run),
        *_frozen_by_model(drafts),
        *_lr_zero(cells),
    )


def listed(names: Sequence[str], limit: int = 3) -> str:
    """A few names and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _nothing_trains(drafts: Sequence[Draft]) -> list[Finding]:
    if any(draft.windows for draft in drafts):
        return []
    return [
        Finding(
            "nothing-trains",
            "every parameter is frozen for the whole run.",
            "Add a rule with frozen=False or thaw= for the parts that should train.",
        )
    ]


def _set_but_never_trains(plan: Plan, drafts: Sequence[Draft]) -> list[Finding]:
    findings = []
    for rule in plan.rules:
        keys = [key for key, _ in rule.settings if key not in CONTROLS or key == "optimizer"]
        if "lr" not in keys:
            continue
        hit = [d for d in drafts if any(link.rule == rule.label for link in d.chains.get("lr", ()))]
        if hit and all(draft.windows == NEVER for draft in hit):
            names = listed([draft.info.name for draft in hit])
            findings.append(
                Finding(
                    "lr-never-trains",
                    f"rule {rule.label!r} sets an lr on parameters that never train: {names}.",
                    "Thaw them in this or a later rule (frozen=False), or drop the lr.",
                )
            )
    return findings


def _thaw_after_end(drafts: Sequence[Draft], run: Run) -> list[Finding]:
    if run.steps is None:
        return []
    late: dict[int, list[str]] = {}
    for draft in drafts:
        begin = draft.windows[0][0] if draft.windows else 0
        if isinstance(begin, int) and begin >= run.steps:
            late.setdefault(begin, []).append(draft.info.name)
    return [
        Finding(
            "thaw-after-end",
            f"{listed(names)} would thaw at step {step}, but the run ends after {run.steps} steps.",
            "Thaw earlier, lengthen the run, or write frozen=True if that is meant.",
        )
        for step, names in sorted(late.items())
    ]


def _frozen_by_model(drafts: Sequence[Draft]) -> list[Finding]:
    # Where a rule has spoken of the window too, the freezing is what the plan wants.
    names = [
        draft.info.name
        for draft in drafts
        if not draft.info.requires_grad and len(draft.chains["window"]) == 1
    ]
    if not names:
        return []
    return [
        Finding(
            "frozen-by-model",
            f"{listed(names)} had requires_grad=False at build and stay frozen.",
            "To train them, add a rule with frozen=False; to say so in the plan, frozen=True.",
        )
    ]


def _lr_zero(cells: Sequence[Cell]) -> list[Finding]:
    return [
        Finding(
            "lr-zero",
            f"group {cell.name!r} has lr 0 but is not frozen: "
            f"{listed([info.name for info in cell.parameters])}.",
            "Write frozen=True: gradients are then not computed and nothing else moves it.",
        )
        for cell in cells
        if cell.windows and cell.constants.get("lr") == 0
    ]

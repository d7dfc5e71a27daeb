"""`lamina.diff`: two plans compared on one model."""

from __future__ import annotations

from torch import nn

from ..errors import PlanError
from ..plan.plan import Plan
from ..schedules import duration as time
from .compare import PlanDiff, compare
from .preview import preview_of


def diff(
    before: Plan,
    after: Plan,
    model: nn.Module,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    steps_per_epoch: int | None = None,
    accumulate: int = 1,
) -> PlanDiff:
    """Compare what two plans do with one model; nothing is trained or changed.

    What counts is what is applied, not how it is written: rules that mean the same are no
    difference. Numbers that differ by less than 2^-24 of the larger one's peak are the same.

    Args:
        before: the earlier plan.
        after: the later one.
        model: the model; it may be on the meta device.
        steps: the length of the run in optimizer steps; or
        epochs: its length in epochs, with `steps_per_epoch`.
        steps_per_epoch: optimizer steps in an epoch; batches, with `accumulate`.
        accumulate: batches that make one optimizer step.

    Returns:
        The differences; false if there are none. Prints as text.

    Raises:
        PlanError: if one of the plans cannot be carried out on this model.

    Example:
        >>> one, other = Plan("SGD", lr=0.1), Plan("SGD", lr=0.1, schedule="linear(to=0.0)")
        >>> print(diff(one, other, nn.Linear(2, 1), steps=10))
        10 steps: 2 of 2 parameters change
        * (2 parameters, 3 numbers)
          lr  steps 1 to 9: 0.1 → 0.09 at the first, 0.1 → 0.01 at the last
    """
    for plan in (before, after):
        if not isinstance(plan, Plan):
            raise PlanError(
                f"diff was given {type(plan).__name__} for a plan; expected two lamina.Plan and a "
                "model: lamina.diff(before, after, model, steps=1000)."
            )
    run = time.run_of(steps, epochs, steps_per_epoch, accumulate)
    return compare(preview_of(before, model, run), preview_of(after, model, run))

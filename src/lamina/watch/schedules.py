"""What is seen of a scheduler, and what follows from it at the end of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.finding import Finding
from .lengths import all_of, length_of
from .steps import StepWatch

#: how far a length may be from a count to be taken for it; of steps, which are known exactly,
#: hardly at all, since a run that was cut off may have taken any number of them
_NEAR, _NEAR_STEPS = 0.1, 0.02


@dataclass
class ScheduleWatch:
    """A scheduler: what it was made for, and how often it was stepped.

    `early` counts its calls before the first optimizer step; `first` is the number of optimizer
    steps before its first call; `past` is the call with which a
    schedule that climbs again was past its end.
    """

    kind: str
    steps: StepWatch
    length: int | None
    is_accelerated: bool
    calls: int = 0
    early: int = 0
    first: int | None = None
    past: tuple[str, int, int] | None = None
    #: the optimizer's steps when it was made
    begun: int = 0

    def stepped(self, scheduler: Any) -> None:
        """Count a call."""
        self.calls += 1
        if self.first is None:
            self.first = self.steps.steps + self.steps.skipped
        if not self.steps.steps + self.steps.skipped:
            self.early += 1
        for part in all_of(scheduler):
            length = getattr(part, "T_max", None)
            at = getattr(part, "last_epoch", 0)
            if length and at > 1.02 * length + 1 and self.past is None:
                self.past = (type(part).__name__, int(length), self.steps.steps)


def watch_scheduler(scheduler: Any, steps: StepWatch) -> ScheduleWatch:
    """Begin to follow a scheduler."""
    return ScheduleWatch(
        type(scheduler).__name__,
        steps,
        None if hasattr(scheduler, "min_lrs") else length_of(scheduler),
        False,
        begun=steps.steps,
    )


def conclude(
    watch: ScheduleWatch, every: Sequence[ScheduleWatch], passes: Sequence[int]
) -> Iterator[Finding]:
    """Find what the counts of a scheduler mean.

    Args:
        watch: the scheduler.
        every: all schedulers, it included.
        passes: how often each DataLoader was gone through.
    """
    taken = watch.steps.steps + watch.steps.skipped - watch.begun
    name = watch.kind
    if not taken:
        return
    if max(passes, default=0) >= 2 and _has_no_effect(watch, every):
        yield _without_effect(watch, taken)
        return
    if not watch.calls:
        return
    if watch.early == 1:
        yield Finding(
            "scheduler-before-optimizer",
            f"{name}.step() was called before the first optimizer.step(): the first value of the "
            "schedule is skipped.",
            "Call scheduler.step() after optimizer.step(), or at the end of the epoch.",
        )
    wrong_unit = _wrong_unit(watch, taken, passes) or _too_often(watch, taken)
    if wrong_unit is not None:
        yield wrong_unit
    elif watch.past is not None and watch.past[2] < watch.steps.steps:
        kind, length, step = watch.past
        yield Finding(
            "schedule-past-end",
            f"{kind}(T_max={length}) went on past its end at step {step}: the lr climbs back to "
            "the peak.",
            "Make it as long as the run, counted in calls of scheduler.step(); lamina's schedules "
            "stay where they end.",
        )


def _has_no_effect(watch: ScheduleWatch, every: Sequence[ScheduleWatch]) -> bool:
    """Return whether it was there from the start, and no step of the run came after its first."""
    steps = watch.steps
    if watch.begun or steps.is_plan or watch.first not in (None, steps.steps + steps.skipped):
        return False
    return not any(other.calls for other in every if other is not watch and other.steps is steps)


def _without_effect(watch: ScheduleWatch, taken: int) -> Finding:
    """Return the finding on a scheduler that was not stepped while the optimizer was."""
    when = "was never called" if not watch.calls else "was first called after the last of them"
    return Finding(
        "scheduler-without-effect",
        f"{watch.kind}.step() {when} in a run of {taken} optimizer steps: the lr of all steps is "
        "that of the first.",
        "Call scheduler.step() in the loop: after every optimizer.step(), or at the end of every "
        "epoch, whichever it was made for.",
    )


def _wrong_unit(watch: ScheduleWatch, taken: int, passes: Sequence[int]) -> Finding | None:
    """Find a schedule that is stepped in one unit and was made in another."""
    length, calls = watch.length, watch.calls
    if length is None:
        return None
    if (
        taken >= 4
        and calls <= taken / 3
        and _near(length, taken, _NEAR_STEPS)
        and length > 2 * calls
    ):
        return Finding(
            "scheduler-per-epoch",
            f"{watch.kind} was made for {length} steps, but stepped {calls} times in {taken} "
            "optimizer steps, as if once an epoch: almost nothing of the schedule is used.",
            "Call scheduler.step() after every optimizer.step(), or make it as long as there are "
            "epochs.",
        )
    per_step = calls >= 0.9 * taken and calls >= 2 * length
    if per_step and any(_near(length, count) for count in passes if count > 1):
        return Finding(
            "scheduler-per-step",
            f"{watch.kind} was made for {length} epochs, but stepped {calls} times, at every "
            f"optimizer step: it was over after {length} of {taken} steps.",
            "Call scheduler.step() once an epoch, or make it as long as there are steps: "
            "epochs * len(loader).",
        )
    return None


def _too_often(watch: ScheduleWatch, taken: int) -> Finding | None:
    """Find a scheduler that is stepped more than once for each optimizer step."""
    ratio = watch.calls / taken
    if taken < 4 or ratio < 1.5:
        return None
    if watch.length is not None and _near(watch.length, watch.calls):
        return None  # it was made for calls, such as micro-batches
    processes = process_count()
    if processes > 1 and abs(ratio - processes) < 0.1:
        if watch.length is None or watch.calls <= watch.length:
            return None  # so does Accelerate, for schedules that are made for one process
        return Finding(
            "scheduler-per-process",
            f"{watch.kind} was stepped {watch.calls} times in {taken} optimizer steps, once for "
            f"each of the {processes} processes, but was made for {watch.length}: it was over "
            f"after {watch.length // processes} steps.",
            "Step it once per optimizer step, or count its length before the loader is split "
            "among processes.",
        )
    return Finding(
        "scheduler-twice-per-step",
        f"{watch.kind}.step() was called {watch.calls} times in {taken} optimizer steps: the "
        f"schedule runs {ratio:.1f} times as fast as the training.",
        "Call it once per optimizer step. Under gradient accumulation that is not once a batch; a "
        "trainer steps the schedulers that it was given by itself.",
    )


def _near(length: int, count: int, part: float = _NEAR) -> bool:
    return abs(length - count) <= part * count


def process_count() -> int:
    """Return how many processes train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1

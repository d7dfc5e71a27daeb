"""Windows: from the times at which a rule thaws and freezes to the spans in which parts train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ..errors import PlanError
from ..model.parameters import ParamInfo
from ..plan.operators import TopDown
from ..plan.reactions import OnPlateau, key_of
from ..schedules import duration as time
from ..schedules.duration import Run, TimeLike
from .resolved import ALWAYS, NEVER, Trigger, Windows

#: (step, "thaw" or "freeze", the time as the user wrote it)
Moment = tuple[int, str, TimeLike | TopDown]


def settle(
    settings: Mapping[str, Any],
    below_top: int,
    info: ParamInfo,
    run: Run,
    where: str,
    earlier: Windows,
) -> Windows:
    """Return the windows that a rule gives one parameter.

    Thaws and freezes alternate; what begins with a freeze trains from step 0.

    Args:
        settings: of the rule; `frozen`, `thaw` and `freeze` are read.
        below_top: how many layers of the rule's pattern are above this parameter's.
        info: the parameter, with its layer.
        run: the length of the run.
        where: the rule, for errors.
        earlier: the windows that earlier rules gave.

    Raises:
        PlanError: if the times do not alternate, once rounded up to steps.
    """
    if "frozen" in settings:
        return NEVER if settings["frozen"] else ALWAYS
    thaw, freeze = settings.get("thaw"), settings.get("freeze")
    if isinstance(thaw, OnPlateau):
        trigger = Trigger(key_of(f"thaw of {where.removeprefix('rule ')}", thaw), thaw)
        return ((trigger, None),)
    if isinstance(thaw, TopDown):
        if not moves_window(settings, info):
            return earlier  # a parameter without a layer number is unchanged by layer operators
        thaws: list[Moment] = []  # without one, only the rule's freeze= holds
        if info.rank is not None:
            thaws = [(_top_down_step(thaw, below_top, run), "thaw", thaw)]
    else:
        thaws = _moments("thaw", thaw, run)
    freezes = _moments("freeze", freeze, run)
    if isinstance(thaw, TopDown) and thaws and freezes and freezes[0][0] < thaws[0][0]:
        # Read as windows, it would train from step 0 until the freeze.
        raise PlanError(
            f"{where}: {info.name!r} would {_said(freezes[0])} before its turn to "
            f"{_said(thaws[0])}; freeze later, or thaw in shorter steps."
        )
    return _spans(_alternating(thaws, freezes, f"{where}: {info.name!r}"))


def moves_window(settings: Mapping[str, Any], info: ParamInfo) -> bool:
    """Return whether a rule that gives windows gives this parameter one.

    `top_down` alone leaves a parameter without a layer number as it was.
    """
    by_layer = isinstance(settings.get("thaw"), TopDown)
    return not by_layer or info.rank is not None or settings.get("freeze") is not None


def _moments(kind: str, given: Any, run: Run) -> list[Moment]:
    times = given if isinstance(given, tuple) else (given,)
    if given is None:
        return []
    return [(math.ceil(time.parse(item).in_steps(run)), kind, item) for item in times]


def _top_down_step(thaw: TopDown, below_top: int, run: Run) -> int:
    every = time.parse(thaw.every).in_steps(run)
    start: Fraction = every if thaw.start is None else time.parse(thaw.start).in_steps(run)
    return math.ceil(start + every * below_top)


def _alternating(thaws: list[Moment], freezes: list[Moment], who: str) -> list[Moment]:
    """Return all moments in time, if each list is in order and the two alternate."""
    for listed in (thaws, freezes):
        for first, second in pairwise(listed):
            if second[0] <= first[0]:
                raise PlanError(
                    f"{who} would {_said(first)} and then {_said(second)}; a list of times goes "
                    "forward, by at least one step from each to the next."
                )
    moments = sorted(thaws + freezes, key=lambda moment: moment[:2])
    for first, second in pairwise(moments):
        if second[0] == first[0]:
            raise PlanError(
                f"{who} would {_said(first)} and {_said(second)}: at the same step {first[0]}."
            )
        if second[1] == first[1]:
            other = "freeze" if first[1] == "thaw" else "thaw"
            raise PlanError(
                f"{who} would {_said(first)} and {_said(second)} without a {other} between them; "
                f"thaws and freezes alternate: give {other}= a time between, or drop one."
            )
    return moments


def _said(moment: Moment) -> str:
    step, kind, given = moment
    return f"{kind} at {given!r} (step {step})"


def _spans(moments: list[Moment]) -> Windows:
    """Return [thaw, freeze) for each thaw; a freeze that comes first ends what began at 0."""
    steps: list[int | None] = [step for step, _, _ in moments]
    if moments[0][1] == "freeze":
        steps.insert(0, 0)
    if len(steps) % 2:
        steps.append(None)
    spans = zip(steps[::2], steps[1::2], strict=True)
    return tuple((begin, end) for begin, end in spans if begin is not None and begin != end)


def _span_text(begin: int | Trigger, end: int | None) -> str:
    if isinstance(begin, Trigger):
        return f"when {begin.reaction.metric} stalls, {begin.reaction!r}"
    return f"from step {begin}" if end is None else f"steps {begin} to {end - 1}"


def window_text(windows: Windows) -> str:
    """Describe windows in words."""
    if windows == ALWAYS:
        return "trains"
    if not windows:
        return "frozen"
    spans = [_span_text(begin, end) for begin, end in windows]
    return "trains " + " and ".join(spans)

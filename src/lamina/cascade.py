"""The cascade: for each parameter and each setting, the last rule that sets it wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from . import time
from .errors import HyperparameterError, PatternError, PlanError
from .expressions import spell
from .feedback import OnPlateau, Plateau
from .forms import WINDOW
from .gradients.operations import ClipNorm, Operation
from .optim.registry import hyperparameters, known_hyperparameter, optimizer_name
from .parameters import ParamInfo
from .patterns import compile_pattern
from .plan import Plan, Rule
from .resolved import ALWAYS, NEVER, Link, Setting, Trigger, Windows
from .schedules import Schedule
from .settings import ByDepth, Times, TopDown, check_amount, python_number
from .time import Run


@dataclass
class Draft:
    """What the rules have said of one parameter so far."""

    info: ParamInfo
    optimizer: type
    hyper: dict[str, Setting | tuple[Setting, ...]]
    schedule: Schedule | None = None
    rewarm: Schedule | None = None
    feedback: tuple[str, Plateau] | None = None
    windows: Windows = ALWAYS
    hold: bool = True
    operations: tuple[int, tuple[Operation, ...]] | None = None
    rules: list[str] = field(default_factory=list)
    chains: dict[str, list[Link]] = field(default_factory=dict)

    def note(self, rule: str, key: str, value: object, result: object) -> None:
        """Remember a rule's say, for `explain`."""
        self.chains.setdefault(key, []).append(Link(rule, spelled(value), spelled(result)))


def spelled(value: object) -> str:
    """A value as an explanation shows it."""
    if isinstance(value, Setting):
        parts = [spelled(value.scale)] if value.scale != 1 or not value.curves else []
        return " * ".join(parts + [f"({spell(curve)})" for curve in value.curves])
    if isinstance(value, tuple):
        return "(" + ", ".join(spelled(item) for item in value) + ")"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, type):
        return optimizer_name(value)
    if callable(value) and not isinstance(value, Schedule):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return spell(value)


def cascade(plan: Plan, infos: Sequence[ParamInfo], run: Run) -> list[Draft]:
    """Apply the plan and its rules, in order, to every parameter."""
    drafts = []
    for info in infos:
        defaults = _defaults(plan.optimizer)
        draft = Draft(info, plan.optimizer, defaults)
        if not info.requires_grad:
            draft.windows = NEVER
            draft.note("the model", "window", "requires_grad=False", "frozen")
        drafts.append(draft)
    for draft in drafts:
        _apply(draft, dict(plan.settings), "plan", 0, draft.info, 0, run)
    for index, rule in enumerate(plan.rules, 1):
        _apply_rule(rule, index, drafts, run)
    return drafts


def _defaults(optimizer: type) -> dict[str, Setting | tuple[Setting, ...]]:
    return {key: _as_setting(value) for key, value in hyperparameters(optimizer).items()}


def _as_setting(value: Any) -> Setting | tuple[Setting, ...]:
    if isinstance(value, tuple):
        return tuple(Setting(part) for part in value)
    return Setting(value)


def _apply_rule(rule: Rule, index: int, drafts: Sequence[Draft], run: Run) -> None:
    pattern = compile_pattern(rule.match)
    matched = [draft for draft in drafts if pattern.matches(draft.info)]
    if not matched:
        raise PatternError(_nothing_matched(rule, [draft.info for draft in drafts]))
    depths: dict[str, int | None] = {}
    for draft in matched:
        found = pattern.depths(draft.info)
        if len(found) > 1:
            raise PatternError(
                f"rule {rule.label!r}: the tied parameter {' = '.join(draft.info.names)} has "
                f"several layer numbers ({', '.join(map(str, sorted(found)))}); exclude it with "
                f"'& !{draft.info.name}' or give it a rule of its own."
            )
        depths[draft.info.name] = next(iter(found), None)
    ranks = {
        depth: rank
        for rank, depth in enumerate(sorted({d for d in depths.values() if d is not None}))
    }
    for draft in matched:
        depth = depths[draft.info.name]
        rank = None if depth is None else ranks[depth]
        info = replace(draft.info, depth=depth, rank=rank)
        label = rule.label if depth is None else rule.label.replace("{depth}", str(depth))
        below_top = 0 if rank is None else len(ranks) - 1 - rank
        if label not in draft.rules:
            draft.rules.append(label)
        _apply(draft, dict(rule.settings), rule.label, index, info, below_top, run)


def _apply(
    draft: Draft,
    settings: dict[str, Any],
    rule: str,
    index: int,
    info: ParamInfo,
    below_top: int,
    run: Run,
) -> None:
    where = f"rule {rule!r}" if index else "plan"
    if "optimizer" in settings:
        draft.optimizer = settings["optimizer"]
        for key in draft.hyper:
            draft.chains.pop(key, None)
        draft.hyper = _defaults(draft.optimizer)
        draft.note(rule, "optimizer", draft.optimizer, draft.optimizer)
    for key, value in settings.items():
        if key == "schedule":
            draft.schedule = value
            draft.note(rule, key, value, value)
        elif key == "hold":
            draft.hold = value
            draft.note(rule, key, value, value)
        elif key == "rewarm":
            draft.rewarm = value
            draft.note(rule, key, value, value)
        elif key == "feedback":
            draft.feedback = None if value is None else (f"plateau of {rule}", value)
            draft.note(rule, key, value, value)
        elif key in ("clip_norm", "gradients"):
            operations = (ClipNorm(value),) if key == "clip_norm" and value is not None else value
            draft.operations = None if operations is None else (index, operations)
            draft.note(rule, "gradients", operations, operations)
        elif key not in (*WINDOW, "optimizer"):
            known_hyperparameter(draft.optimizer, key, f"{where} sets {key} on {info.name!r}")
            earlier = draft.hyper.get(key, Setting(1.0))
            result = _operate(earlier, value, info, below_top, f"{where}, {key}")
            draft.hyper[key] = result
            draft.note(rule, key, value, result)
    if any(key in settings for key in WINDOW):
        draft.windows = _windows(settings, below_top, info, run, where, draft.windows)
        text = {key: settings[key] for key in WINDOW if key in settings}
        shown = ", ".join(f"{key}={spelled(value)}" for key, value in text.items())
        draft.chains.setdefault("window", []).append(Link(rule, shown, window_text(draft.windows)))


def _operate(
    earlier: Setting | tuple[Setting, ...], value: Any, info: ParamInfo, below_top: int, where: str
) -> Setting | tuple[Setting, ...]:
    if isinstance(value, tuple):
        return tuple(_plain(part, info, where) for part in value)
    if not isinstance(value, (Times, ByDepth)):
        return _plain(value, info, where)
    if isinstance(earlier, tuple) or isinstance(earlier.scale, (bool, str, type(None))):
        raise HyperparameterError(f"{where}={value!r}: only a number can be multiplied.")
    if isinstance(value, ByDepth):
        return replace(earlier, scale=earlier.scale * value.rate**below_top)
    if isinstance(value.factor, Schedule):
        return replace(earlier, curves=(*earlier.curves, value.factor))
    return replace(earlier, scale=earlier.scale * value.factor)


def _plain(value: Any, info: ParamInfo, where: str) -> Setting:
    if isinstance(value, Schedule):
        return Setting(1.0, (value,))
    if callable(value):
        try:
            value = python_number(value(info))
        except Exception as error:
            raise PlanError(
                f"{where}: the function failed for {info.name!r}: {type(error).__name__}: {error}."
            ) from error
        check_amount(f"{where}, for {info.name!r}", "", value)
        value = float(value)
    return Setting(value)


def _windows(
    settings: dict[str, Any],
    below_top: int,
    info: ParamInfo,
    run: Run,
    where: str,
    earlier: Windows,
) -> Windows:
    if "frozen" in settings:
        return NEVER if settings["frozen"] else ALWAYS
    thaw, freeze = settings.get("thaw"), settings.get("freeze")
    if isinstance(thaw, TopDown) and info.rank is None and freeze is None:
        return earlier  # a parameter without a layer number is unchanged by layer operators
    if isinstance(thaw, OnPlateau):
        trigger = Trigger(f"thaw of {where.removeprefix('rule ')}", thaw)
        if freeze is not None:
            raise PlanError(f"{where}: a thaw that waits for a metric cannot be given freeze=.")
        return ((trigger, None),)
    begin = None if thaw is None else _thaw_step(thaw, below_top, info, run)
    end = None if freeze is None else math.ceil(time.parse(freeze).in_steps(run))
    if begin is None:
        return ((0, end),) if end != 0 else NEVER
    if end is None:
        return ((begin, None),)
    if begin == end:
        raise PlanError(f"{where}: {info.name!r} would thaw and freeze at the same step {begin}.")
    if begin < end:
        return ((begin, end),)
    return ((0, end), (begin, None)) if end else ((begin, None),)


def _thaw_step(thaw: Any, below_top: int, info: ParamInfo, run: Run) -> int:
    if not isinstance(thaw, TopDown):
        return math.ceil(time.parse(thaw).in_steps(run))
    if info.rank is None:
        return 0  # without a layer number: only the rule's freeze= holds
    every = time.parse(thaw.every).in_steps(run)
    start: Fraction = every if thaw.start is None else time.parse(thaw.start).in_steps(run)
    return math.ceil(start + every * below_top)


def window_text(windows: Windows) -> str:
    """Windows in words."""
    if windows == ALWAYS:
        return "trains"
    if not windows:
        return "frozen"
    spans = [
        f"when {begin.reaction.metric} stalls, {begin.reaction!r}"
        if isinstance(begin, Trigger)
        else f"from step {begin}"
        if end is None
        else f"steps {begin} to {end - 1}"
        for begin, end in windows
    ]
    return "trains " + " and ".join(spans)


def _nothing_matched(rule: Rule, infos: Sequence[ParamInfo]) -> str:
    from .suggestions import closest

    near = closest(rule.label, [name for info in infos for name in info.names])
    return (
        f"rule {rule.label!r} matches none of the {len(infos)} parameters. "
        f"The closest parameter names are: {', '.join(near)}."
    )

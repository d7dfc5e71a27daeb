"""The only place where a plan meets a model; everything ambiguous is settled here, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from torch import nn

from .._util.text import listed
from ..algorithms.registry import (
    algorithm_of,
    check_hyperparameters,
    counts,
    is_whole_vector,
    optimizer_name,
    options,
)
from ..errors import HyperparameterError, PlanError
from ..model.parameters import Observed, Owned, observe, walk
from ..plan.plan import Plan
from ..plan.reactions import Reaction, key_of
from ..schedules import Schedule
from ..schedules.base import EXACT, Floats, boundaries, steps_to_check
from ..schedules.duration import Run
from .cascade import Draft, cascade
from .findings import find
from .resolved import Cell, Resolved, Scope, Setting, Trigger, each_part
from .timeline import judged_values, product

#: a schedule over an unknown run is judged on this many steps
_HORIZON = 1000


def resolve_plan(plan: Plan, model: nn.Module, run: Run | None = None) -> Resolved:
    """Apply a plan to a model: the groups, when each trains, findings, the origin of each value.

    `plan.preview(...)` does so as well, and takes the length of the run in steps or epochs.

    Args:
        plan: what is wanted.
        model: the model; it may be on the meta device.
        run: the length of the run, such as `preview.run`; unknown by default.

    Returns:
        Data without tensors; `values_at` gives the values of any step of it.

    Raises:
        PlanError: if the plan cannot be carried out on this model.

    Example:
        >>> resolved = resolve_plan(Plan("SGD", lr=0.1), nn.Linear(2, 1))
        >>> [cell.name for cell in resolved.cells]
        ['default']
    """
    owned = walk(model)
    return resolve_owned(plan, owned, run or Run(), observe(model, owned))


def resolve_owned(
    plan: Plan,
    owned: tuple[Owned, ...],
    run: Run,
    seen: Observed | None = None,
    planned: Run | None = None,
) -> Resolved:
    """Resolve a plan for a model that was already walked and observed.

    Args:
        plan: the plan.
        owned: the model's parameters.
        run: the length of the run.
        seen: what else of the model matters.
        planned: the length that schedules and windows are settled for, if not `run`.
    """
    planned = planned or run
    drafts = cascade(plan, [item.info for item in owned], planned)
    binder = _Binder(planned, run)
    scopes = _scopes(plan, drafts, binder)
    place = {scope.rule: index for index, scope in enumerate(scopes)}
    merged: dict[Cell, list[Draft]] = {}
    for draft in drafts:
        merged.setdefault(_settled(draft, place, binder), []).append(draft)
    cells = _named(merged)
    for cell in cells:
        _judge(cell, binder)
    _judge_whole_vector(cells)
    _refuse_tensors(cells, {item.info.name: item for item in owned})
    for scope in scopes:
        for operation, amount in scope.operations:
            binder.judge_all(amount.curves, f"{operation.source_name} of {scope.name}")
    chains = {name: draft.chains for draft in drafts for name in draft.info.names}
    findings = find(plan, drafts, cells, run, seen or Observed(), scopes)
    held = None if planned == run else planned
    return Resolved(plan, run, cells, scopes, _reactions(plan, drafts), findings, chains, held)


def _reactions(plan: Plan, drafts: list[Draft]) -> tuple[tuple[str, Reaction], ...]:
    """Return everything that watches a metric, once, by the key of what it has seen."""
    found: dict[str, Reaction] = {}
    for draft in drafts:
        if draft.feedback is not None:
            key, plateau = draft.feedback
            found[key] = plateau
        for begin, _ in draft.windows:
            if isinstance(begin, Trigger):
                found[begin.key] = begin.reaction
    if plan.stop is not None:
        found[key_of("early stop", plan.stop)] = plan.stop
    return tuple(found.items())


def _refuse_tensors(cells: tuple[Cell, ...], owned: dict[str, Owned]) -> None:
    """Raise `PlanError` for a parameter that its optimizer cannot train (Muon on a vector)."""
    refused = [
        (info, refusal)
        for cell in cells
        if cell.algorithm is not None and cell.windows
        for info in cell.parameters
        if (refusal := cell.algorithm.refusal(owned[info.name].tensor))
    ]
    if refused:
        first, refusal = refused[0]
        others = [info.name for info, _ in refused if info.ndim >= 2]
        small = ["ndim<2"] if len(others) < len(refused) else []
        pattern = " | ".join(small + others)
        raise PlanError(
            f"{first.name!r} {refusal}, by a last rule: "
            f"lamina.Rule({pattern!r}, optimizer=lamina.AdamW, lr=1e-3)."
        )


def _judge_whole_vector(cells: tuple[Cell, ...]) -> None:
    """Return a method over all parameters at once must be alone, and its gradients untouched."""
    whole = next((cell for cell in cells if is_whole_vector(cell.optimizer)), None)
    if whole is None:
        return
    name = optimizer_name(whole.optimizer)
    for cell in cells:
        if cell.optimizer is not whole.optimizer:
            raise PlanError(
                f"group {cell.name!r} uses {optimizer_name(cell.optimizer)}, but {name} works on "
                f"all parameters at once; make {name} the plan's only optimizer, and freeze the "
                "parts it should leave out."
            )
        if cell.scope is not None:
            raise PlanError(
                f"group {cell.name!r}: gradient operations break the line search of {name}, which "
                "compares gradients with losses; remove clip_norm or gradients."
            )
        if cell.frozen_state == "drop":
            raise PlanError(
                f"group {cell.name!r}: frozen_state='drop' is for state that each parameter has of "
                f"its own, but {name} keeps one history over all parameters; remove it."
            )
        other = [k for k, v in cell.hyper if k != "lr" and v != dict(whole.hyper)[k]]
        if other:
            raise PlanError(
                f"group {cell.name!r}: {other[0]} differs from group {whole.name!r}; there is one "
                f"search over all parameters of {name}, so only lr can differ."
            )


class _Binder:
    """Settles schedules for one run, judges them over another; each distinct one once."""

    def __init__(self, planned: Run, run: Run) -> None:
        self.run = planned
        self.length = run.steps or _HORIZON
        self.every = steps_to_check(self.length)
        self.known: dict[Schedule, Schedule] = {}
        self.judged: set[Schedule] = set()

    def steps(self, curves: tuple[Schedule, ...]) -> Floats:
        """Return the steps at which the values of schedules are checked."""
        if self.length <= EXACT:
            return self.every
        return steps_to_check(self.length, set().union(*map(boundaries, curves)))

    def optional(self, schedule: Schedule | None) -> Schedule | None:
        return None if schedule is None else self.schedule(schedule)

    def schedule(self, schedule: Schedule) -> Schedule:
        if schedule not in self.known:
            self.known[schedule] = schedule.bind(self.run)
        return self.known[schedule]

    def setting(self, setting: Setting) -> Setting:
        if not setting.curves:
            return setting
        return replace(setting, curves=tuple(map(self.schedule, setting.curves)))

    def amount(self, amount: float | Schedule) -> Setting:
        if isinstance(amount, Schedule):
            return Setting(1.0, (self.schedule(amount),))
        return Setting(float(amount))

    def span(self, setting: Setting) -> tuple[Any, Any]:
        """Return the smallest and the largest value of a setting over the run."""
        if not setting.curves:
            return setting.scale, setting.scale
        steps = self.steps(setting.curves)
        values = product(setting, lambda curve: curve.at(steps))
        return float(values.min()), float(values.max())

    def judge_all(self, curves: tuple[Schedule, ...], where: str) -> None:
        for curve in curves:
            if curve not in self.judged:
                judged_values(curve, self.steps((curve,)), f"{where}: ")
                self.judged.add(curve)


def _scopes(plan: Plan, drafts: list[Draft], binder: _Binder) -> tuple[Scope, ...]:
    found = dict(sorted((d.operations for d in drafts if d.operations), key=lambda pair: pair[0]))
    return tuple(
        Scope(
            rule,
            plan.rules[rule - 1].label if rule else "plan",
            tuple((operation, binder.amount(operation.amount)) for operation in operations),
        )
        for rule, operations in found.items()
    )


def _settled(draft: Draft, place: dict[int, int], binder: _Binder) -> Cell:
    """Return the group of a parameter, still without a name and members: equal ones are one."""
    return Cell(
        name="",
        optimizer=draft.optimizer,
        algorithm=algorithm_of(draft.optimizer),
        hyper=tuple((key, each_part(value, binder.setting)) for key, value in draft.hyper.items()),
        schedule=binder.optional(draft.schedule),
        rewarm=binder.optional(draft.rewarm),
        feedback=None if draft.feedback is None else draft.feedback[0],
        windows=draft.windows,
        hold=draft.hold,
        frozen_state=draft.frozen_state,
        scope=None if draft.operations is None else place[draft.operations[0]],
        rules=(),
        parameters=(),
        by_model=draft.by_model,
    )


def _named(merged: dict[Cell, list[Draft]]) -> tuple[Cell, ...]:
    """Return the groups with their members, named after the rules that match these."""
    seen: Counter[str] = Counter()
    cells = []
    for cell, members in merged.items():
        names = list(dict.fromkeys(" + ".join(draft.rules) or "default" for draft in members))
        name = listed(names, 2) if len(names) > 3 else ", ".join(names)
        seen[name] += 1
        if seen[name] > 1:
            name = f"{name} #{seen[name]}"
        rules = tuple(dict.fromkeys(rule for draft in members for rule in draft.rules))
        infos = tuple(draft.info for draft in members)
        cells.append(replace(cell, name=name, rules=rules, parameters=infos))
    return tuple(cells)


def _judge(cell: Cell, binder: _Binder) -> None:
    where = f"group {cell.name!r}"
    factors = tuple(part for part in (cell.schedule, cell.rewarm) if part is not None)
    binder.judge_all(factors, f"{where}, factor on lr")
    lowest, highest = dict(cell.constants), dict(cell.constants)
    for key, value in cell.moving:
        _refuse_moving(cell, key, where)
        parts = value if isinstance(value, tuple) else (value,)
        for part in parts:
            binder.judge_all(part.curves, f"{where}, {key}")
        spans = [binder.span(part) for part in parts]
        for extreme, end in ((lowest, 0), (highest, 1)):
            ends = tuple(span[end] for span in spans)
            extreme[key] = ends if isinstance(value, tuple) else ends[0]
    check_hyperparameters(cell.optimizer, lowest, where)
    check_hyperparameters(cell.optimizer, highest, where)


def _refuse_moving(cell: Cell, key: str, where: str) -> None:
    """Raise `HyperparameterError` for a schedule of what has one value for the whole run."""
    if key in options(cell.optimizer):
        what = "chooses a variant of the update"
    elif key in counts(cell.optimizer):
        what = "is a number of steps or entries"
    else:
        return
    raise HyperparameterError(
        f"{where}: {key} was given a schedule, but it {what} of "
        f"{optimizer_name(cell.optimizer)} and cannot be scheduled; give it one value."
    )

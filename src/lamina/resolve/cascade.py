"""The cascade: for each parameter and each setting, the last rule that sets it wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .._util.numbers import check_amount, python_number
from ..algorithms.registry import hyperparameters, known_hyperparameter
from ..errors import HyperparameterError, PatternError, PlanError
from ..gradients.operations import ClipNorm, Operation
from ..model.name_index import ParameterIndex
from ..model.parameters import ParamInfo
from ..model.patterns import Pattern, compile_pattern
from ..model.suggestions import nothing_matched
from ..plan.operators import ByDepth, Times
from ..plan.plan import Plan, Rule
from ..plan.reactions import Plateau, key_of
from ..plan.validate import WINDOW
from ..schedules import Schedule
from ..schedules.duration import Run
from .resolved import ALWAYS, NEVER, Origin, Setting, WindowOrigin, Windows, each_part
from .windows import moves_window, settle

#: keys that write the setting of another name
_SAME = {"clip_norm": "gradients"}


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
    frozen_state: str = "keep"
    operations: tuple[int, tuple[Operation, ...]] | None = None
    #: the labels of the rules that match it, in order; a dict, as there may be thousands
    rules: dict[str, None] = field(default_factory=dict)
    #: frozen by hand before the plan, and no rule says anything about it
    by_model: bool = False
    chains: dict[str, list[Origin | WindowOrigin]] = field(default_factory=dict)
    #: the rules (the plan is 0) that each setting comes from: one, and those that put factors on it
    sources: dict[str, list[int]] = field(default_factory=dict)
    #: the rules that match it: bit n stands for rule n of the plan, counted from 1
    matched: int = 0

    def note(self, rule: str, key: str, value: object, result: object) -> None:
        """Remember a rule's say, for `explain`."""
        self.chains.setdefault(key, []).append(Origin(rule, value, result))

    def credit(self, rule: int, key: str, value: object) -> None:
        """Remember which rules a setting comes from; a factor keeps those before it."""
        if isinstance(value, (Times, ByDepth)):
            self.sources.setdefault(key, []).append(rule)
        else:
            self.sources[key] = [rule]


def cascade(plan: Plan, infos: Sequence[ParamInfo], run: Run) -> list[Draft]:
    """Apply the plan and its rules, in order, to every parameter."""
    drafts = []
    defaults = _defaults(plan.optimizer)
    for info in infos:
        draft = Draft(info, plan.optimizer, dict(defaults))
        if not info.requires_grad:
            draft.windows, draft.by_model = NEVER, True
            draft.note("the model", "window", "requires_grad=False", "frozen")
        _apply(draft, dict(plan.settings), "plan", 0, info, 0, run)
        drafts.append(draft)
    by_name = ParameterIndex(infos)
    for index, rule in enumerate(plan.rules, 1):
        _apply_rule(rule, index, drafts, by_name, run)
    return drafts


def _defaults(optimizer: type) -> dict[str, Setting | tuple[Setting, ...]]:
    return {key: each_part(value, Setting) for key, value in hyperparameters(optimizer).items()}


def _apply_rule(
    rule: Rule, index: int, drafts: Sequence[Draft], by_name: ParameterIndex, run: Run
) -> None:
    pattern = compile_pattern(rule.match)
    matched = [drafts[place] for place in pattern.places(by_name)]
    if not matched:
        raise PatternError(f"rule {rule.label!r} {nothing_matched(rule.match, by_name.infos)}")
    depths = {draft.info.name: _depth_of(draft.info, pattern, rule) for draft in matched}
    layers = sorted({depth for depth in depths.values() if depth is not None})
    ranks = {depth: rank for rank, depth in enumerate(layers)}
    ends = _ends(rule, drafts, by_name, depths)
    for draft in matched:
        depth = depths[draft.info.name]
        rank = None if depth is None else ranks[depth]
        info = draft.info if depth is None else replace(draft.info, depth=depth, rank=rank)
        label = rule.label if depth is None else rule.label.replace("{depth}", str(depth))
        draft.rules[label] = None
        draft.matched |= 1 << index
        _apply(draft, dict(rule.settings), rule.label, index, info, len(layers), run)
    for key, label, place, at_end in ends:
        for draft in at_end:
            draft.rules[label] = None
            draft.matched |= 1 << index
            info = replace(draft.info, rank=-1 if place == "below" else len(layers))
            setting = {key: dict(rule.settings)[key]}
            _apply(draft, setting, rule.label, index, info, len(layers), run)


def _depth_of(info: ParamInfo, pattern: Pattern, rule: Rule) -> int | None:
    """Return the layer number that a rule's pattern captures from the names of a parameter."""
    found = pattern.depths(info)
    if len(found) > 1:
        raise PatternError(
            f"rule {rule.label!r}: the tied parameter {' = '.join(info.names)} has "
            f"several layer numbers ({', '.join(map(str, sorted(found)))}); exclude it with "
            f"'& !{info.name}' or give it a rule of its own."
        )
    return next(iter(found), None)


def _ends(
    rule: Rule,
    drafts: Sequence[Draft],
    by_name: ParameterIndex,
    depths: Mapping[str, int | None],
) -> list[tuple[str, str, str, list[Draft]]]:
    """Return what `by_depth` counts as layers beside those that the rule's pattern captures.

    Returns:
        For each: the setting, the pattern, "below" or "above", and the parameters.
    """
    found = []
    for key, value in rule.settings:
        if not isinstance(value, ByDepth):
            continue
        taken = {name: f"layer {depth}" for name, depth in depths.items() if depth is not None}
        for place in ("below", "above"):
            text = getattr(value, place)
            if text is None:
                continue
            pattern = compile_pattern(text)
            at_end = [drafts[its] for its in pattern.places(by_name)]
            where = f"rule {rule.label!r}, {key}: {place}={text!r}"
            if not at_end:
                raise PatternError(f"{where} {nothing_matched(text, by_name.infos)}")
            for name in (draft.info.name for draft in at_end):
                if name in taken:
                    raise PatternError(
                        f"{where} selects {name!r}, which is {taken[name]} already; exclude it "
                        f"from one of the two with '& !{name}'."
                    )
                taken[name] = f"{place} the layers"
            found.append((key, text, place, at_end))
    return found


def _apply(
    draft: Draft,
    settings: dict[str, Any],
    rule: str,
    index: int,
    info: ParamInfo,
    layers: int,
    run: Run,
) -> None:
    where = f"rule {rule!r}" if index else "plan"
    if "optimizer" in settings:
        draft.optimizer = settings["optimizer"]
        for key in draft.hyper:
            draft.chains.pop(key, None)
            draft.sources.pop(key, None)
        draft.hyper = _defaults(draft.optimizer)
        draft.note(rule, "optimizer", draft.optimizer, draft.optimizer)
    for key, value in settings.items():
        if key not in WINDOW:
            draft.credit(index, _SAME.get(key, key), value)
        if key in ("schedule", "hold", "frozen_state", "rewarm"):
            setattr(draft, key, value)
            draft.note(rule, key, value, value)
        elif key == "feedback":
            draft.feedback = None if value is None else (key_of(f"plateau of {rule}", value), value)
            draft.note(rule, key, value, value)
        elif key in ("clip_norm", "gradients"):
            operations = (ClipNorm(value),) if key == "clip_norm" and value is not None else value
            draft.operations = None if operations is None else (index, operations)
            draft.note(rule, "gradients", operations, operations)
        elif key not in (*WINDOW, "optimizer"):
            place = f"{where} sets {key} on {info.name!r}"
            known_hyperparameter(draft.optimizer, key, place, value)
            earlier = draft.hyper.get(key, Setting(1.0))
            result = _operate(earlier, value, info, layers, f"{where}, {key}")
            draft.hyper[key] = result
            draft.note(rule, key, value, result)
    # A thaw that was written for a layer means its adapters: what PEFT froze stays as it is.
    if any(key in settings for key in WINDOW) and ("frozen" in settings or not info.adapted):
        if moves_window(settings, info):
            draft.credit(index, "window", None)
            draft.by_model = False
        below_top = 0 if info.rank is None else layers - 1 - info.rank
        windows = settle(settings, below_top, info, run, where, draft.windows)
        draft.windows = windows if info.differentiable else NEVER  # it can never have a gradient
        given = tuple((key, settings[key]) for key in WINDOW if key in settings)
        dtype = "" if info.differentiable else str(info.dtype)
        draft.chains.setdefault("window", []).append(
            WindowOrigin(rule, given, draft.windows, dtype)
        )


def _operate(
    earlier: Setting | tuple[Setting, ...], value: Any, info: ParamInfo, layers: int, where: str
) -> Setting | tuple[Setting, ...]:
    if isinstance(value, tuple):
        return tuple(_plain(part, info, where) for part in value)
    if not isinstance(value, (Times, ByDepth)):
        return _plain(value, info, where)
    if isinstance(earlier, tuple) or isinstance(earlier.scale, (bool, str, type(None))):
        raise HyperparameterError(f"{where}={value!r}: only a number can be multiplied.")
    if isinstance(value, ByDepth):
        if info.rank is None:
            return earlier
        return replace(earlier, scale=earlier.scale * value.factor(info.rank, layers))
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
                f"{where}: the function failed for {info.name!r}: {type(error).__name__}: {error}. "
                "It is called with the ParamInfo of each parameter (name, shape, ndim, ...); a "
                "function of the step is written lamina.from_function(f)."
            ) from error
        check_amount(f"{where}, for {info.name!r}", "", value)
        value = float(value)
    return Setting(value)

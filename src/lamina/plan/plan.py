"""Plan and Rule: what a user wants, as frozen values that print as their constructor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._util.grammar import parse, to_source
from ..algorithms.registry import optimizer_class, optimizer_name
from ..errors import PlanError
from ..model.patterns import PatternLike, compile_pattern
from ..schedules import Schedule
from ..schedules import duration as time
from .from_optimizer import read_optimizer
from .operators import ByDepth, Times, TopDown
from .reactions import EarlyStop
from .toml import policy, read, write
from .validate import NAMES, check_settings

if TYPE_CHECKING:
    import os

    import torch
    from torch import nn

    from ..optimizer.optimizer import Optimizer
    from ..preview import Preview


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Rule:
    """Settings for the parameters that a pattern selects; later rules win, setting by setting.

    Args:
        match: a pattern (see `lamina.model.patterns`) or a function `(ParamInfo) -> bool`.
        optimizer: another optimizer for these parameters, which must come with `lr`.
        schedule: a factor on `lr` over time; None exempts from the plan's.
        frozen: True for never trained; False undoes an earlier rule.
        feedback: a factor on `lr` that reacts to a metric, `plateau(...)`; None exempts.
        thaw: when training begins: a time, `top_down(...)` by layer, or `on_plateau(...)`.
        freeze: when training ends: a time. Lists of times in both give several windows, in turn:
            `thaw=["1 epochs", "3 epochs"], freeze="2 epochs"` rests in the first and third epoch.
        hold: whether modules that are wholly frozen stay in eval mode (BatchNorm statistics and
            dropout rest with the weights), which is the default.
        frozen_state: what becomes of the optimizer's state when a window closes: "keep" (the
            default) takes it up again at the next thaw; "drop" frees its memory, and each thaw
            begins like an optimizer built then, the parameter's own step count from 0 too.
        rewarm: a factor on `lr` counted from each thaw, such as `warmup(100)`.
        clip_norm: the largest norm of the gradients of all these parameters together; a number,
            a schedule that is a value, or None for no clipping.
        gradients: gradient operations instead of clip_norm: `clip_norm(...)`, `clip_value(...)`,
            `clip_param_norm(...)`, `agc(...)`, `scale_gradients(...)`, a function
            `(grads, infos) -> grads`, or a list of these, in order; None for nothing.
        **hyper: hyperparameters of the optimizer: a number, a schedule that is a value, a function
            `(ParamInfo) -> float`, or a factor on what earlier rules gave (`times`, `by_depth`).

    Raises:
        PlanError: for settings that contradict each other or have the wrong form.

    Example:
        >>> Rule("classifier.*", lr=1e-3)
        Rule('classifier.*', lr=0.001)
    """

    match: PatternLike
    settings: tuple[tuple[str, Any], ...]

    def __init__(self, match: PatternLike, **settings: Any) -> None:
        pattern = compile_pattern(match)
        if not settings:
            raise PlanError(f"Rule({match!r}) sets nothing; give it a setting, such as lr=1e-3.")
        given = check_settings(settings, f"rule {match!r}")
        layered = next((k for k, v in given.items() if isinstance(v, (ByDepth, TopDown))), None)
        if layered and not pattern.captures:
            raise PlanError(
                f"Rule({match!r}): {layered}={given[layered]!r} needs layer numbers; capture them "
                f"in the pattern, such as {_with_depth(match)!r}."
            )
        if "optimizer" in given and "lr" not in given:
            raise PlanError(
                f"Rule({match!r}) changes the optimizer to {optimizer_name(given['optimizer'])}, "
                "which starts from its own defaults; give the rule its lr=."
            )
        object.__setattr__(self, "match", match)
        object.__setattr__(self, "settings", tuple(given.items()))

    @property
    def label(self) -> str:
        """The pattern as the user wrote it."""
        return self.match if isinstance(self.match, str) else _callable_name(self.match)

    def __repr__(self) -> str:
        return f"Rule({', '.join([_argument_text(self.match), *_pairs(self.settings)])})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return self.match == other.match and dict(self.settings) == dict(other.settings)

    def __hash__(self) -> int:
        return hash((self.match, frozenset(key for key, _ in self.settings)))


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Plan:
    """How every parameter of a model trains: defaults for all, and a cascade of rules.

    Args:
        optimizer: an optimizer class (`lamina.AdamW`) or its registered name (`"AdamW"`).
        rules: later rules win, setting by setting.
        nonfinite: what to do about a NaN or infinite gradient: `"raise"` with the parameter's
            name, or `"skip"` the step; where it is looked for is the next argument's. On an
            accelerator the error comes with the next step (`Optimizer.synchronize`).
        nonfinite_check: which gradients are looked at: `"all"`, each by the norm of its rule, or
            once more where none is computed; or `"norms"`, only where a norm is computed anyway.
        stop: when to set `optimizer.should_stop`: `early_stop(...)`.
        **settings: the settings of `Rule`, for every parameter.

    Raises:
        PlanError: for settings that contradict each other or have the wrong form.

    Example:
        >>> Plan("AdamW", lr=2e-5, rules=[Rule("classifier.*", lr=1e-3)])
        Plan(AdamW, lr=2e-05, rules=[Rule('classifier.*', lr=0.001)])
    """

    optimizer: type
    settings: tuple[tuple[str, Any], ...]
    rules: tuple[Rule, ...]
    nonfinite: str
    nonfinite_check: str
    stop: EarlyStop | None

    def __init__(
        self,
        /,
        optimizer: type | str,
        *,
        rules: Iterable[Rule] = (),
        nonfinite: str = "raise",
        nonfinite_check: str = "all",
        stop: EarlyStop | str | None = None,
        **settings: Any,
    ) -> None:
        if nonfinite_check not in ("norms", "all"):
            raise PlanError(f"nonfinite_check={nonfinite_check!r}: expected 'norms' or 'all'.")
        if nonfinite not in ("raise", "skip"):
            raise PlanError(f"nonfinite={nonfinite!r} is unknown; expected 'raise' or 'skip'.")
        if isinstance(stop, type):
            raise PlanError(
                f"stop={getattr(stop, 'source_name', stop.__name__)} is not called; write "
                "stop=lamina.early_stop('val_loss')."
            )
        if isinstance(stop, str):
            stop = parse(stop, NAMES, "plan, stop")
        if stop is not None and not isinstance(stop, EarlyStop):
            raise PlanError(
                f"stop={stop!r}: expected early_stop(...), such as "
                f"lamina.early_stop({getattr(stop, 'metric', 'val_loss')!r})."
            )
        rules = _checked_rules(rules)
        given = check_settings(settings, "plan")
        for key, value in given.items():
            if isinstance(value, (Times, ByDepth, TopDown)):
                raise PlanError(
                    f"plan: {key}={value!r} is a factor on, or an order within, what earlier rules "
                    "select; the plan comes first. Put it into a rule."
                )
        object.__setattr__(self, "optimizer", optimizer_class(optimizer))
        object.__setattr__(self, "settings", tuple(given.items()))
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "nonfinite", nonfinite)
        object.__setattr__(self, "nonfinite_check", nonfinite_check)
        object.__setattr__(self, "stop", stop)

    def __repr__(self) -> str:
        parts = [optimizer_name(self.optimizer), *_pairs(self.settings)]
        parts += [f"{key}={value!r}" for key, value in policy(self).items()]
        if self.rules:
            parts.append(f"rules=[{', '.join(map(repr, self.rules))}]")
        return f"Plan({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self._compared() == other._compared()

    def _compared(self) -> tuple[Any, ...]:
        return (self.optimizer, dict(self.settings), self.rules, policy(self))

    def __hash__(self) -> int:
        return hash((self.optimizer, self.rules, self.nonfinite))

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Plan:
        """Read a plan from a TOML file (a path) or from TOML text (a string with a newline)."""
        plan: Plan = read(source, cls, Rule)
        return plan

    @classmethod
    def from_optimizer(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any = None
    ) -> Plan:
        """Read the groups of an existing optimizer, and a known scheduler, into a plan.

        The plan gives every parameter what the groups give it, in the shortest patterns that were
        found. torch's optimizers become lamina's of the same name; others stay what they are. What
        the optimizer leaves out although it could train becomes `frozen=True`.

        Args:
            model: the model that the optimizer was built for.
            optimizer: the optimizer, with its groups, or a wrapper of it.
            scheduler: a scheduler of torch, lamina or Transformers, read as it was made and as
                stepped once for each optimizer step. Where no schedule can express it, the plan
                has none, and a warning says so, as of all else that is left out.

        Returns:
            The plan; `plan.to_toml()` is its text.

        Raises:
            PlanError: if the optimizer updates what is no parameter of the model, or carries out
                a plan already; or if the scheduler belongs to another optimizer.

        Example:
            >>> model = torch.nn.Linear(2, 2)
            >>> Plan.from_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
            Plan(SGD, lr=0.1)
        """
        plan: Plan = read_optimizer(model, optimizer, scheduler, cls, Rule)
        return plan

    def to_toml(self) -> str:
        """Return the plan as TOML text; raise for what only Python can say (functions)."""
        return write(self)

    def build(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        steps_per_epoch: int | None = None,
        accumulate: int = 1,
        audit: bool = False,
        resume: dict[str, Any] | None = None,
        extend: str | None = None,
        renamed: Mapping[str, str | None] | None = None,
        strict: bool = False,
    ) -> Optimizer:
        """Build the optimizer that carries the plan out on a model (see `lamina.Optimizer`).

        Each finding (what is legal in the plan but suspicious) is given once as a `LaminaWarning`,
        on rank 0 where several processes train; `optimizer.findings` has them all.

        Args:
            model: the model, as it will be trained.
            steps: the length of the run in optimizer steps; or
            epochs: its length in epochs, with `steps_per_epoch`.
            steps_per_epoch: optimizer steps in an epoch; batches, with `accumulate`.
            accumulate: batches that make one optimizer step.
            audit: prove at every step that nothing moved what is frozen (`FrozenMovedError`
                otherwise); reads all frozen weights twice a step.
            resume: the saved state of an optimizer to go on from, loaded as by
                `Optimizer.load_state_dict`.
            extend: how a saved run of another length goes on: `"hold"` keeps its schedules and,
                past their end, their last values; `"stretch"` fits the same shapes to the new
                length, so that values may jump at the clock (see `optimizer.last_load`).
            renamed: from saved names of parameters or modules to those of now, as in
                `Optimizer.load_state_dict`.
            strict: whether a saved state that does not match all parameters is an error, as in
                `Optimizer.load_state_dict`; without it, that is one warning.

        Raises:
            PlanError: if the plan cannot be carried out on this model, or for such a length.
            StateError: if the state does not fit, or its run had another length, values depend on
                that, and `extend` does not say how.
        """
        from ..optimizer.optimizer import Optimizer

        run = time.run_of(steps, epochs, steps_per_epoch, accumulate)
        optimizer = Optimizer(self, model, run, audit, resume, extend, renamed, strict)
        optimizer.announce()
        return optimizer

    def preview(
        self,
        model: nn.Module,
        *,
        steps: int | None = None,
        epochs: float | None = None,
        steps_per_epoch: int | None = None,
        accumulate: int = 1,
        resume: dict[str, Any] | None = None,
        extend: str | None = None,
        renamed: Mapping[str, str | None] | None = None,
    ) -> Preview:
        """Show what will happen to every part of a model; arguments as in `build`."""
        from ..preview import preview_of

        run = time.run_of(steps, epochs, steps_per_epoch, accumulate)
        return preview_of(self, model, run, resume, extend, renamed)


def _with_depth(match: PatternLike) -> str:
    """Return a pattern that captures layer numbers: the given one, if it has another word."""
    if isinstance(match, str) and re.search(r"\{\w+\}", match):
        return re.sub(r"\{\w+\}", "{depth}", match, count=1)
    return "encoder.layer.{depth}.*"


def _checked_rules(rules: object) -> tuple[Rule, ...]:
    """Return the rules of a plan; raise `PlanError` for anything but a list of rules."""
    if isinstance(rules, Rule):
        raise PlanError(f"rules={rules!r} is one rule; expected a list: rules=[{rules!r}].")
    if rules is None:
        raise PlanError("rules=None: expected a list; without rules, write rules=[].")
    if isinstance(rules, Mapping):
        written = ", ".join(filter(None, (_as_rule(rule) for rule in rules.items())))
        raise PlanError(f"rules is a dict; expected a list of rules: rules=[{written}].")
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise PlanError(
            f"rules={rules!r}: expected a list such as rules=[lamina.Rule('head.*', lr=0.1)]."
        )
    given = tuple(rules)
    for index, rule in enumerate(given):
        if isinstance(rule, Rule):
            continue
        if isinstance(rule, (list, tuple)) and all(isinstance(each, Rule) for each in rule):
            raise PlanError(f"rules[{index}] is a list of rules; put it in with a star: *rules.")
        written = _as_rule(rule) or "lamina.Rule(pattern, ...)"
        raise PlanError(f"rules contains {rule!r}; expected {written}.")
    return given


def _as_rule(given: object) -> str:
    """Return how a dict, or a pattern with a dict, is written as a rule, or an empty string."""
    match: object = None
    settings: object = None
    if isinstance(given, Mapping):
        settings = dict(given)
        match = next((settings.pop(key) for key in ("match", "pattern") if key in settings), None)
    elif isinstance(given, tuple) and len(given) == 2:
        match, settings = given
    if not isinstance(match, str) or not isinstance(settings, Mapping):
        return ""
    return f"lamina.Rule({', '.join([repr(match), *_pairs(tuple(settings.items()))])})"


def _argument_text(value: object) -> str:
    if isinstance(value, type):
        return optimizer_name(value)
    if callable(value) and not isinstance(value, Schedule):
        return _callable_name(value)
    return to_source(value)


def _callable_name(value: object) -> str:
    return str(getattr(value, "__qualname__", type(value).__name__))


def _pairs(settings: tuple[tuple[str, Any], ...]) -> list[str]:
    return [f"{key}={_argument_text(value)}" for key, value in settings]

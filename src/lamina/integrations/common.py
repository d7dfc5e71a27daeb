"""What every integration needs: reading a plan, its clipping, its metrics, its values to log."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .._util.notices import is_first_process, warn
from .._util.text import listed, quoted
from ..errors import PlanError, StateError, did_you_mean
from ..gradients.operations import AGC, ClipNorm, ClipParamNorm, ClipValue
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..state.report import LoadReport

_CLIPS = (ClipNorm, ClipValue, ClipParamNorm, AGC)


def as_plan(plan: Plan | str | os.PathLike[str]) -> Plan:
    """Return the plan, read from its TOML file if a path was given.

    Raises:
        PlanError: for anything else, such as an optimizer that was built already.
    """
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return Plan.from_toml(plan)
    if isinstance(plan, torch.optim.Optimizer):
        raise PlanError(
            f"expected a Plan or the path of its TOML file, not {type(plan).__name__}, which is an "
            "optimizer already. Give the plan: the trainer's length is known only later, and the "
            "optimizer is built from the plan then."
        )
    raise PlanError(f"expected a Plan or the path of its TOML file, not {plan!r:.200}.")


def clips(plan: Plan) -> bool:
    """Return whether the plan clips gradients anywhere; a function of the user's does not count."""
    settings = [plan.settings, *(rule.settings for rule in plan.rules)]
    for name, value in (pair for part in settings for pair in part):
        if name == "clip_norm" and value is not None:
            return True
        if name == "gradients" and value is not None:
            operations = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(operation, _CLIPS) for operation in operations):
                return True
    return False


def rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate that each group had in the step just done, as `lr/<group>`.

    A group that was frozen in this step has 0.0. Before the first step: the values to come.
    """
    applied = optimizer.applied
    groups = optimizer.param_groups
    return {f"lr/{g['name']}": float(applied.get(g["name"], g)["lr"]) for g in groups}


def batches_in(loaders: Sequence[Any]) -> int | None:
    """Return the batches in an epoch of the first loader; None if it has no length."""
    try:
        return len(loaders[0]) if loaders else None
    except TypeError:  # over an IterableDataset
        return None


class MetricFeed:
    """Hands metrics to `Optimizer.report`, and notices when what the plan waits for never comes.

    Trainers evaluate in several calls (one for each data set), so what is missing is known only
    when training goes on: `check` is called then.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        reactions = optimizer.resolved.reactions
        self.watched = list(dict.fromkeys(reaction.metric for _, reaction in reactions))
        self._given: dict[str, Any] = {}
        self._arrived: set[str] = set()

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Report those metrics that the plan watches, under their own names."""
        self._given.update(metrics)
        known = {name: metrics[name] for name in self.watched if name in metrics}
        if known:
            self._arrived.update(known)
            self._optimizer.report(**known)

    def check(self, where: str) -> None:
        """Raise `PlanError` if an evaluation is over and a watched metric was not part of it.

        Args:
            where: what gave the metrics, such as "the Trainer's evaluation".
        """
        given, self._given = self._given, {}
        missing = [name for name in self.watched if name not in self._arrived]
        if not given or not missing:
            return
        names = [name for name, value in given.items() if _is_number(value)]
        raise PlanError(
            f"the plan waits for {quoted(missing)}, but {where} gave {quoted(names, 8)}."
            f"{_suggestion(missing[0], names)}"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and not value.dim())


def _suggestion(missing: str, names: Iterable[str]) -> str:
    """Return the metric that was probably meant: trainers put a prefix before its name."""
    close = [name for name in names if name.endswith(f"_{missing}")]
    if close:
        return f" Write {close[0]!r} in the plan."
    return did_you_mean(missing, names)


def refuse_jumps(report: LoadReport | None, fix: str) -> None:
    """Raise `StateError` where a run of another length was resumed and values depend on that.

    `Plan.build(resume=state)` refuses it too. Trainers load with `load_state_dict`, which can only
    warn, because by then the optimizer is built.
    """
    jumps = report.jumps if report else ()
    if jumps:
        raise StateError(
            "the saved run had another length, and these values depend on it: "
            f"{listed(jumps)}. {fix}"
        )


def tell(message: str) -> None:
    """Give a `LaminaWarning` on the first process."""
    if is_first_process():
        warn(message)

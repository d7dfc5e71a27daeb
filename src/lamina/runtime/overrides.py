"""Which groups an override means, and whether its values may be."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .._util.numbers import is_number
from ..algorithms.registry import (
    check_hyperparameters,
    is_whole_vector,
    known_hyperparameter,
    method_of,
    optimizer_name,
    options,
)
from ..errors import PatternError, PlanError, did_you_mean
from ..model.patterns import compile_pattern
from ..model.suggestions import better_pattern
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import given_at


def select_groups(resolved: Resolved, rule: str | None, asker: str = "override") -> list[int]:
    """Return the groups that a name or a pattern means; a pattern must cover whole groups.

    Args:
        resolved: the plan, settled for a model.
        rule: the name of a group, or a pattern; None for all groups.
        asker: what wants to know, for messages.
    """
    cells = resolved.cells
    if rule is None:
        return list(range(len(cells)))
    # Groups of one rule that differ in a value are called "rule", "rule #2" and so on.
    exact = [i for i, cell in enumerate(cells) if re.sub(r" #\d+$", "", cell.name) == rule]
    exact = exact or [i for i, cell in enumerate(cells) if cell.name == rule]
    if exact:
        return exact
    pattern = compile_pattern(rule)
    chosen = []
    for index, cell in enumerate(cells):
        hit = [pattern.matches(info) for info in cell.parameters]
        if any(hit) and not all(hit):
            raise PatternError(
                f"{asker}: {rule!r} covers {sum(hit)} of the {len(hit)} parameters of group "
                f"{cell.name!r}, which share their settings; name the group, or give them a "
                "rule of their own in the plan."
            )
        if all(hit):
            chosen.append(index)
    if not chosen:
        names = [cell.name for cell in cells]
        raise PatternError(
            f"{asker}: {rule!r} is neither a group nor a pattern that covers one; groups are "
            f"{', '.join(map(repr, names))}.{_meant(resolved, rule) or did_you_mean(rule, names)}"
        )
    return chosen


def _meant(resolved: Resolved, rule: str) -> str:
    """Return a clause with a similar pattern that covers whole groups, or an empty string."""
    infos = [info for cell in resolved.cells for info in cell.parameters]
    better = better_pattern(rule, infos)
    try:
        found = better is not None and select_groups(resolved, better)
    except PatternError:  # it covers a part of a group
        found = False
    return f" Did you mean {better!r}?" if found else ""


def check_chosen(
    resolved: Resolved, chosen: list[int], hyper: Mapping[str, float | None], step: int
) -> None:
    """Raise `PlanError` unless the values may stand in these groups from a step on."""
    for index in chosen:
        check_override(resolved.cells[index], hyper, step)
    optimizer = resolved.cells[0].optimizer
    shared = [key for key in hyper if key != "lr"]
    if shared and is_whole_vector(optimizer) and len(chosen) < len(resolved.cells):
        raise PlanError(
            f"override sets {shared[0]} in {len(chosen)} of {len(resolved.cells)} groups, but "
            f"{optimizer_name(optimizer)} makes one search over all parameters, so that only lr "
            f"can differ between groups; leave out rule=."
        )


def check_override(cell: Cell, hyper: Mapping[str, float | None], step: int = 0) -> None:
    """Raise `PlanError` unless the values may stand in this group, beside the plan's at a step."""
    if not hyper:
        raise PlanError("override was given nothing to change, such as lr=1e-4.")
    for key, value in hyper.items():
        where = f"override of {cell.name!r} sets {key}"
        known_hyperparameter(cell.optimizer, key, where, value)
        if key not in dict(cell.hyper) and method_of(cell.optimizer) is None:
            raise PlanError(
                f"{where}, which the plan does not set: it is {optimizer_name(cell.optimizer)}'s "
                "own. Give it in the plan, and build the optimizer with resume=."
            )
        if key in options(cell.optimizer):
            raise PlanError(
                f"{where}, which chooses a variant of {optimizer_name(cell.optimizer)} and is one "
                "for the whole run; give it in the plan, and build the optimizer with resume=."
            )
        if value is not None and not is_number(value):
            raise PlanError(f"{where}={value!r}; expected a number, or None to take it back.")
    values = {key: value for key, value in hyper.items() if value is not None}
    check_hyperparameters(
        cell.optimizer, {**given_at(cell, step), **values}, f"override of {cell.name!r}"
    )

"""A saved state in the groups of an optimizer without a plan: by name where both sides have names.

torch goes by position alone: the state of one weight lands on another of the same shape where the
order of the modules changed, and the saved names then say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from .._util.notices import warn
from .._util.text import listed, quoted
from ..errors import StateError
from ..model.parameters import clean_names

Group = dict[str, Any]


def check_form(saved: Any) -> None:
    """Raise `StateError`, with where to look, unless this is the state of an optimizer."""
    if isinstance(saved, Mapping) and {"state", "param_groups"} <= set(saved):
        return
    raise StateError(
        "this is not an optimizer state: expected 'state' and 'param_groups', as "
        f"optimizer.state_dict() gives.{state_inside(saved)}"
    )


def state_inside(saved: Any) -> str:
    """Return a sentence about an optimizer state that lies inside of what was given, or ""."""
    for key, part in saved.items() if isinstance(saved, Mapping) else ():
        if isinstance(part, Mapping) and "param_groups" in part:
            return f" The one under {key!r} is: pass state[{key!r}]."
        first = part[0] if isinstance(part, (list, tuple)) and part else None
        if isinstance(first, Mapping) and "param_groups" in first:
            return f" The list under {key!r} has {len(part)} of them: pass state[{key!r}][0]."
    return ""


def matching_groups(
    live: Sequence[Group], given: Iterable[Mapping[str, Any]], *, ordered: bool
) -> list[Group]:
    """Return the saved groups as the live ones are made up, with the saved keys in `params`.

    Args:
        live: the groups of the optimizer.
        given: the saved groups.
        ordered: whether the state is of all parameters in one order, which must stay.

    Raises:
        StateError: if they cannot be matched.
    """
    saved: list[Group] = [deepcopy(dict(group)) for group in given]
    for group in saved:
        group.pop("param_shapes", None)  # a plan's, in the saved order
    mine, theirs = _names(live), _names(saved)
    if mine is not None and theirs is not None and sorted(mine) == sorted(theirs):
        if mine != theirs and ordered:
            raise StateError(
                "the saved memory of L-BFGS is one vector over its parameters in the order "
                f"{quoted(theirs)}, and this optimizer has them in the order {quoted(mine)}; build "
                "it in the saved order. Nothing was loaded."
            )
        return _by_name(live, saved, mine, theirs)
    sizes = [[len(group["params"]) for group in groups] for groups in (live, saved)]
    if sizes[0] != sizes[1]:
        raise StateError(
            f"the saved state has parameter groups of sizes {sizes[1]}, but this optimizer's have "
            f"sizes {sizes[0]}; build it with the same groups, or use a plan, which matches by "
            f"name.{_difference(mine, theirs)}"
        )
    if mine is not None and theirs is not None:
        warn(
            "the saved state was matched by position, as torch does, because its parameters have "
            f"other names than those of this optimizer.{_difference(mine, theirs)} If the order is "
            "not the same, state now lies on the wrong parameters. Build the optimizer from a "
            "plan, whose load_state_dict takes renamed=."
        )
    for group, here in zip(saved, live, strict=True):
        if here.get("param_names"):
            group["param_names"] = list(here["param_names"])
    return saved


def _names(groups: Sequence[Group]) -> list[str] | None:
    """Return the clean names of all parameters in order; None where any group has none."""
    listed: list[str] = []
    for group in groups:
        names = group.get("param_names")
        if not isinstance(names, (list, tuple)) or len(names) != len(group["params"]):
            return None
        if not all(isinstance(name, str) for name in names):
            return None
        listed += names
    cleaned = clean_names(listed)
    return [cleaned[name] for name in listed]


def _by_name(
    live: Sequence[Group], saved: Sequence[Group], mine: Sequence[str], theirs: Sequence[str]
) -> list[Group]:
    rows = ((key, group) for group in saved for key in group["params"])
    place = dict(zip(theirs, rows, strict=True))
    names = iter(mine)
    arranged = []
    for index, group in enumerate(live):
        found = [place[next(names)] for _ in group["params"]]
        sources = list({id(source): source for _, source in found}.values())
        hyper = [_hyper(source) for source in sources] or [_hyper(group)]
        odd = next((other for other in hyper if not _same(other, hyper[0])), None)
        if odd is not None:
            keys = [key for key in hyper[0] if not _same(odd.get(key), hyper[0][key])]
            raise StateError(
                f"parameter group {index} joins parameters that were saved in different groups, "
                f"whose {', '.join(keys)} differ; build the optimizer with the saved groups, or "
                "use a plan, whose own values stay. Nothing was loaded."
            )
        arranged.append(
            {
                **hyper[0],
                "params": [key for key, _ in found],
                "param_names": list(group["param_names"]),
            }
        )
    return arranged


def _hyper(group: Mapping[str, Any]) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        alike = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return alike and torch.equal(one, other)
    return bool(one == other)


def _difference(mine: Sequence[str] | None, theirs: Sequence[str] | None) -> str:
    if mine is None or theirs is None:
        return ""
    rows = [
        ("Only in the state", [name for name in theirs if name not in set(mine)]),
        ("Only here", [name for name in mine if name not in set(theirs)]),
    ]
    return "".join(f" {what}: {quoted(names)}." for what, names in rows if names)


def loss_of_digits(names: Sequence[str], saved: str, now: str) -> str:
    """Return the text of the warning about state that has less precision than was saved."""
    return (
        f"state that was saved as {saved} is {now} now, the dtype of its parameters, and has lost "
        f"digits: {listed(names)}. To keep them, build the optimizer with state_dtype={saved!r}."
    )

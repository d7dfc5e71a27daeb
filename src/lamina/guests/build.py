"""Taking an optimizer class in as a guest: built, tried on small tensors, refused with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..algorithms.base import Method
from ..algorithms.registry import optimizer_name, settings_of
from ..algorithms.trial import into_training, quietly, trial_of
from ..errors import HyperparameterError, PlanError
from ..resolve.resolved import Cell
from ..resolve.timeline import given_at
from .memory import GuestMemory
from .rehearsal import alike, construct, rehearse


def build_guest(
    optimizer: type[torch.optim.Optimizer],
    cells: Sequence[Cell],
    groups: Sequence[dict[str, Any]],
    state: Any,
) -> tuple[torch.optim.Optimizer, GuestMemory]:
    """Build a guest over some groups of a plan; it shares their dicts and the state.

    Args:
        optimizer: the guest's class.
        cells: its cells, one for each group.
        groups: its parameter groups, already in the plan's optimizer.
        state: the state of the plan's optimizer, by parameter.

    Returns:
        The guest, and what it keeps beside groups and state of parameters.

    Raises:
        PlanError: if the guest cannot be built as the plan says.
    """
    name = optimizer_name(optimizer)
    if _needs_closure(optimizer):
        raise PlanError(
            f"the third-party optimizer {name} evaluates the loss by itself (its step needs a "
            "closure), "
            "which the gradients of a plan are not made for; use lamina.LBFGS, as the plan's only "
            "optimizer."
        )
    first = [_first_values(cell) for cell in cells]
    params = [group["params"] for group in groups]
    try:
        guest = construct(optimizer, first, params)
    except Exception as error:
        made = trial_of(optimizer).made or {}
        given = {k: v for k, v in first[0].items() if k not in made or made[k] != v}
        raise PlanError(
            f"the third-party optimizer {name} refused its settings ({type(error).__name__}: "
            f"{error}); "
            f"beside its own defaults it was given {given}."
        ) from error
    _check_built(name, guest, cells, groups, first)
    _refuse_unlike(name, cells, groups[0]["params"][0])
    refused = rehearse(optimizer, cells, first, params)
    if refused:
        raise PlanError(f"the third-party optimizer {name} {refused}")
    for mine, theirs in zip(groups, guest.param_groups, strict=True):
        for key, value in theirs.items():
            mine.setdefault(key, value)
    memory = GuestMemory(guest)
    if guest.state and any(cell.frozen_state == "drop" for cell in cells):
        raise PlanError(
            f"frozen_state='drop': the third-party optimizer {name} makes its state when it is "
            "built and "
            "cannot begin it again; use frozen_state='keep'."
        )
    for param, entry in guest.state.items():  # some guests begin their state when they are built
        state[param].update(entry)
    guest.param_groups = list(groups)
    guest.state = state
    return guest, memory


def _check_built(
    name: str,
    guest: torch.optim.Optimizer,
    cells: Sequence[Cell],
    groups: Sequence[Mapping[str, Any]],
    first: Sequence[Mapping[str, Any]],
) -> None:
    """Raise `PlanError` where what was built is not what the plan says."""
    inner = next((k for k, v in vars(guest).items() if isinstance(v, torch.optim.Optimizer)), "")
    if inner:
        raise PlanError(
            f"the third-party optimizer {name} wraps another one (its {inner}), whose state and "
            "values "
            "the plan could not reach."
        )
    built = guest.param_groups
    if _ids(built) != _ids(groups):
        raise PlanError(
            f"the third-party optimizer {name} makes {len(built)} groups of its own where the "
            "plan has "
            f"{len(groups)}: use it without a plan."
        )
    moving = {key for cell in cells for key, _ in cell.moving}
    if any(cell.schedule or cell.feedback or cell.rewarm for cell in cells):
        moving.add("lr")
    keys = set().union(*first)
    varying = {
        key for key in keys if any(not _same(each, key, first[0].get(key)) for each in first)
    }
    fixed = sorted((varying | moving) & (settings_of(type(guest)) - built[0].keys()))
    if fixed:
        raise HyperparameterError(
            f"{name} takes {', '.join(fixed)} only for all parameters and for good (it is not a "
            "group setting there); give it one constant value in the plan."
        )
    for group, values in zip(built, first, strict=True):
        for key in values.keys() & group.keys():
            if not alike(values[key], group[key]):
                raise PlanError(
                    f"the third-party optimizer {name} makes {key}={group[key]!r} of "
                    f"{key}={values[key]!r} when it is built, but a plan writes the values of its "
                    f"groups itself. Give {key} a value that the constructor keeps, or the option "
                    "that turns this off."
                )


def _ids(groups: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [[*map(id, group["params"])] for group in groups]


def _needs_closure(optimizer: type[torch.optim.Optimizer]) -> bool:
    inherited = getattr(optimizer, "algorithm", None)
    if isinstance(inherited, Method) and inherited.unit == "vector":
        return True
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def keeps_state(cell: Cell, hyper: Mapping[str, Any], like: torch.Tensor) -> bool:
    """Return whether an update of a guest leaves state, tried on a small tensor of its own.

    Args:
        cell: a cell of the guest.
        hyper: its values in that update.
        like: a parameter, for the number of dimensions and the dtype.

    Returns:
        True also where the guest cannot be tried.
    """
    try:
        guest = _tried(cell, [hyper], like)
    except Exception:
        return True
    return any(guest.state.values())


def works_on_parts(cell: Cell) -> bool:
    """Try on a small tensor whether a guest updates its parts as it updates the whole.

    Returns:
        False also where the guest cannot be tried.
    """
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(4, 4, 4, generator=generator, dtype=torch.float64)
    try:
        whole = _trained(cell, [start], [[grad] for grad in grads])
        cuts = [[*each.reshape(-1).split([5, 11])] for each in (start, *grads)]
        parts = _trained(cell, cuts[0], cuts[1:])
    except Exception:
        return False
    return torch.allclose(whole[0].reshape(-1), torch.cat(parts), rtol=1e-9, atol=1e-12)


def _trained(
    cell: Cell, starts: Sequence[torch.Tensor], steps: Sequence[Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return tensors after some steps of a guest of their own."""
    params = [torch.nn.Parameter(start.clone()) for start in starts]
    guest: Any = cell.optimizer([{"params": params}], **_first_values(cell))
    into_training(guest)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        guest.step()
    return [param.detach() for param in params]


def _tried(cell: Cell, hypers: Sequence[Mapping[str, Any]], like: torch.Tensor) -> Any:
    """Build a separate guest and take one step of a small tensor for each group's values."""
    device = None if like.is_meta else like.device
    with quietly(device):
        params = [
            torch.nn.Parameter(torch.ones([1] * like.ndim, dtype=like.dtype, device=device))
            for _ in hypers
        ]
        values = [_first_values(cell)] * len(params)
        guest = construct(cell.optimizer, values, [[param] for param in params])
        for param, group, hyper in zip(params, guest.param_groups, hypers, strict=True):
            param.grad = torch.ones_like(param)
            for key, value in hyper.items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
        into_training(guest)
        guest.step()
    return guest


def _refuse_unlike(name: str, cells: Sequence[Cell], like: torch.Tensor) -> None:
    """Raise `PlanError` if the plan's groups come to differ in lr and the guest refuses that."""
    courses = [
        (dict(c.hyper)["lr"], c.schedule, c.feedback, c.rewarm, c.rewarm and c.windows)
        for c in cells
        if c.windows and "lr" in c.constants
    ]
    if all(course == courses[0] for course in courses):
        return
    try:
        _tried(cells[0], [{"lr": 0.5}, {"lr": 0.5}], like)
    except Exception:  # it cannot be tried
        return
    try:
        _tried(cells[0], [{"lr": 0.5}, {"lr": 0.25}], like)
    except Exception as error:
        raise PlanError(
            f"the third-party optimizer {name} refuses groups whose learning rates differ "
            f"({type(error).__name__}: {error}). Give all its parameters the same lr, schedule "
            "and plateau, and no rewarm= where windows differ."
        ) from error


def _first_values(cell: Cell) -> dict[str, Any]:
    """Return the first values of a cell, with an lr, on which some constructors insist."""
    values = given_at(cell, 0)
    return values if values.get("lr", 1) else given_at(cell, 1)


def _same(values: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in values and bool(values[key] == value)

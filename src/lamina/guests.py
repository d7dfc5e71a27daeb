"""Any `torch.optim.Optimizer` as a part of a plan: the plan moves the values it reads."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, final

import torch

from .algorithms.base import Algorithm, Batch, Hyper, Method, State, times
from .errors import HyperparameterError, PlanError
from .optim.registry import method_of, optimizer_name
from .resolved import Cell


@final
class Guest(Algorithm):
    """Stands for a guest's own algorithm, so that gradient operations treat all groups alike."""

    name: ClassVar[str] = "guest"
    defaults: ClassVar[dict[str, Any]] = {}
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    buffers: ClassVar[tuple[str, ...]] = ()

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Nothing; guests make their state themselves."""
        return {}

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Never called: guests step themselves."""
        raise NotImplementedError


GUEST = Guest()


def admit(
    optimizer: type[torch.optim.Optimizer],
    cells: Sequence[Cell],
    groups: Sequence[dict[str, Any]],
    state: Any,
) -> torch.optim.Optimizer:
    """Build a guest over some groups of a plan; it shares their dicts and the state.

    Args:
        optimizer: the guest's class.
        cells: its cells, one for each group.
        groups: its parameter groups, already in the plan's optimizer.
        state: the state of the plan's optimizer, by parameter.

    Raises:
        PlanError: if the guest cannot be built as the plan says.
    """
    name = optimizer_name(optimizer)
    if _needs_closure(optimizer):
        raise PlanError(
            f"the guest optimizer {name} evaluates the loss by itself (its step needs a closure), "
            "which the gradients of a plan are not made for; use lamina.LBFGS, as the plan's only "
            "optimizer."
        )
    first = [_first_values(cell) for cell in cells]
    common = {k: v for k, v in first[0].items() if all(_same(each, k, v) for each in first)}
    own = [{"params": group["params"]} for group in groups]
    for values, group in zip(first, own, strict=True):
        group.update({k: v for k, v in values.items() if k not in common})
    try:
        guest = optimizer(own, **common)
    except Exception as error:
        raise PlanError(
            f"the guest optimizer {name} refused its settings ({type(error).__name__}: {error}); "
            f"it was given {common}."
        ) from error
    moving = {key for cell in cells for key, _ in cell.moving}
    if any(cell.schedule or cell.feedback or cell.rewarm for cell in cells):
        moving.add("lr")
    varying = (set().union(*first) - set(common)) | moving
    fixed = sorted(varying - set(guest.defaults))
    if fixed:
        raise HyperparameterError(
            f"{name} takes {', '.join(fixed)} only for all parameters and for good (it is not a "
            "group setting there); give it one constant value in the plan."
        )
    _refuse_unlike(name, cells, groups[0]["params"][0])
    for mine, theirs in zip(groups, guest.param_groups, strict=True):
        for key, value in theirs.items():
            mine.setdefault(key, value)
    if guest.state and any(cell.frozen_state == "drop" for cell in cells):
        raise PlanError(
            f"frozen_state='drop': the guest optimizer {name} makes its state when it is built and "
            "cannot begin it again; use frozen_state='keep'."
        )
    for param, entry in guest.state.items():  # some guests begin their state when they are built
        state[param].update(entry)
    guest.param_groups = list(groups)
    guest.state = state
    return guest


def _needs_closure(optimizer: type[torch.optim.Optimizer]) -> bool:
    inherited = getattr(optimizer, "algorithm", None)
    if isinstance(inherited, Method) and inherited.unit == "vector":
        return True
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


class Guests:
    """The guests of a plan, each over its groups."""

    def __init__(self, cells: Sequence[Cell], groups: Sequence[dict[str, Any]], state: Any) -> None:
        self._of: dict[str, torch.optim.Optimizer] = {}
        #: what guests made when they were built, by parameter and by group: where they begin anew
        self.begun: dict[str, dict[str, Any]] = {}
        self.begun_groups: dict[str, dict[str, Any]] = {}
        guests = (cell.optimizer for cell in cells if method_of(cell.optimizer) is None)
        for optimizer in dict.fromkeys(guests):
            chosen = [i for i, cell in enumerate(cells) if cell.optimizer is optimizer]
            own = [groups[i] for i in chosen]
            guest = admit(optimizer, [cells[i] for i in chosen], own, state)
            self._of |= {group["name"]: guest for group in own}
            self._remember(own, state)

    def __contains__(self, group: str) -> bool:
        return group in self._of

    def _remember(self, groups: Sequence[dict[str, Any]], state: Any) -> None:
        for group in groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            self.begun_groups[group["name"]] = deepcopy(rest)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if state.get(param):  # most guests begin their state in their first step
                    self.begun[name] = deepcopy(dict(state[param]))

    def set_mode(self, mode: str, names: Collection[str]) -> None:
        """Call `train()` or `eval()` on the guests that have it, for these groups alone.

        Schedule-free guests then move the weights, which what is frozen must not. It freezes at the
        end of a step, so in training mode, and takes no part in a change of modes until it thaws.
        """
        for guest in dict.fromkeys(self._of.values()):
            switch = getattr(guest, mode, None)
            chosen = [group for group in guest.param_groups if group["name"] in names]
            if callable(switch) and chosen:
                with _alone(guest, chosen):
                    switch()

    @staticmethod
    def batch(
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        names: list[str],
    ) -> Batch | None:
        """The gradients of a guest's group, for the gradient operations."""
        return Batch(GUEST, params, grads, {}, [], group, names=names) if params else None

    def step(self, batches: Sequence[Batch]) -> None:
        """Hand the guests their gradients, as the operations left them, and let them step."""
        called: dict[torch.optim.Optimizer, set[str]] = {}
        for batch in batches:
            guest = self._of.get(batch.hyper["name"])
            if guest is None:
                continue
            called.setdefault(guest, set()).add(batch.hyper["name"])
            scale = batch.scale
            for param, grad in zip(batch.params, batch.grads, strict=True):
                param.grad = grad if scale is None else times(grad, scale)
        place = {name: index for index, name in enumerate(self._of)}
        done: list[str] = []
        for guest, names in called.items():
            # Those that train first: schedule-free guests read their mode from the first group.
            own = sorted(guest.param_groups, key=lambda group: place[group["name"]])
            first = [group for group in own if group["name"] in names]
            guest.param_groups = first + [group for group in own if group["name"] not in names]
            name = optimizer_name(type(guest))
            try:
                guest.step()
            except Exception as error:
                error.add_note(
                    f"Raised by the guest optimizer {name}, whose own weights may be updated in "
                    f"part. Updated before it: {', '.join(done) or 'none'}; all other weights are "
                    "as they were before this step."
                )
                raise
            done.append(name)

    def own_writes(self, published: Mapping[str, Mapping[str, Any]]) -> str:
        """In words, a value of the plan that a guest has replaced; "" if none did."""
        for guest in dict.fromkeys(self._of.values()):
            for group in guest.param_groups:
                for key, value in published[group["name"]].items():
                    if group[key] is not value and group[key] != value:
                        return (
                            f"the guest optimizer {type(guest).__name__} set {key}={group[key]!r} "
                            f"in group {group['name']!r}, where the plan has {value!r}. A value "
                            "that an optimizer moves by itself cannot be the plan's too: use the "
                            "optimizer without a plan, or another one."
                        )
        return ""


@contextmanager
def _alone(guest: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Let a guest see these groups only, without what was frozen by hand since the build."""
    every, params = guest.param_groups, [group["params"] for group in groups]
    guest.param_groups = groups
    try:
        for group in groups:
            group["params"] = [param for param in group["params"] if param.requires_grad]
        yield
    finally:
        guest.param_groups = every
        for group, its in zip(groups, params, strict=True):
            group["params"] = its


def keeps_state(cell: Cell, hyper: Mapping[str, Any], like: torch.Tensor) -> bool:
    """Whether an update of a guest leaves state, tried on a small tensor of its own.

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


def _tried(cell: Cell, hypers: Sequence[Mapping[str, Any]], like: torch.Tensor) -> Any:
    """A guest of its own after one step of a small tensor for each of some groups' values."""
    params = [torch.nn.Parameter(torch.ones([1] * like.ndim, dtype=like.dtype)) for _ in hypers]
    guest = cell.optimizer([{"params": [param]} for param in params], **_first_values(cell))
    for param, group, hyper in zip(params, guest.param_groups, hypers, strict=True):
        param.grad = torch.ones_like(param)
        group.update(hyper)
    if callable(getattr(guest, "train", None)):
        guest.train()
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
            f"the guest optimizer {name} refuses groups whose learning rates differ "
            f"({type(error).__name__}: {error}). Give all its parameters the same lr, schedule "
            "and plateau, and no rewarm= where windows differ."
        ) from error


def _first_values(cell: Cell) -> dict[str, Any]:
    """What a guest is built with: the first values of its cell with an lr, which some insist on."""
    values = cell.values(0)
    return values if values.get("lr", 1) else cell.values(1)


def _same(values: Mapping[str, Any], key: str, value: Any) -> bool:
    return key in values and bool(values[key] == value)

"""Any `torch.optim.Optimizer` as a part of a plan: the plan moves the values it reads."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, final

import torch

from .algorithms.base import Algorithm, Batch, Hyper, State
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
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise PlanError(
            f"the guest optimizer {name} evaluates the loss by itself (its step needs a closure), "
            "which the gradients of a plan are not made for; use lamina.LBFGS, as the plan's only "
            "optimizer."
        )
    common = {k: v for k, v in cells[0].constants.items() if all(_same(c, k, v) for c in cells)}
    own = [{"params": group["params"]} for group in groups]
    for cell, group in zip(cells, own, strict=True):
        group.update({k: v for k, v in cell.constants.items() if k not in common})
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
    varying = (set().union(*(cell.constants for cell in cells)) - set(common)) | moving
    fixed = sorted(varying - set(guest.defaults))
    if fixed:
        raise HyperparameterError(
            f"{name} takes {', '.join(fixed)} only for all parameters and for good (it is not a "
            "group setting there); give it one constant value in the plan."
        )
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

    def __getstate__(self) -> dict[str, Any]:
        """With what guests keep beside state and groups, which torch leaves out of a copy."""
        guests = dict.fromkeys(self._of.values())
        kept = [(g, {k: v for k, v in vars(g).items() if not _is_torchs(k)}) for g in guests]
        return {**self.__dict__, "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for guest, attributes in state.pop("kept"):
            guest.__dict__.update(attributes)
        self.__dict__.update(state)

    def _remember(self, groups: Sequence[dict[str, Any]], state: Any) -> None:
        for group in groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            self.begun_groups[group["name"]] = deepcopy(rest)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if state.get(param):  # most guests begin their state in their first step
                    self.begun[name] = deepcopy(dict(state[param]))

    def read(self, group: Mapping[str, Any], param: torch.Tensor, entry: dict[str, Any]) -> None:
        """Let a group's guest bring a saved entry into its form of today, as in torch's load.

        torch's own make tensors of the numbers that older versions kept.
        """
        guest = self._of[group["name"]]
        apart = guest.__class__.__new__(guest.__class__)
        apart.__dict__.update(guest.__dict__)
        apart.__setstate__(
            {"state": {param: entry}, "param_groups": [{**group, "params": [param]}]}
        )

    def set_mode(self, mode: str) -> None:
        """Call `train()` or `eval()` on the guests that have it (schedule-free ones do)."""
        for guest in {id(guest): guest for guest in self._of.values()}.values():
            switch = getattr(guest, mode, None)
            if callable(switch):
                switch()

    @staticmethod
    def batch(group: dict[str, Any]) -> Batch | None:
        """The gradients of a guest's group, for the gradient operations."""
        named = zip(group["params"], group["param_names"], strict=True)
        found = [(param, name) for param, name in named if param.grad is not None]
        if not found:
            return None
        params = [param for param, _ in found]
        grads = [param.grad for param in params if param.grad is not None]
        return Batch(GUEST, params, grads, {}, [], group, names=[name for _, name in found])

    def step(self, batches: Sequence[Batch]) -> None:
        """Hand the guests their gradients, as the operations left them, and let them step."""
        called: dict[int, torch.optim.Optimizer] = {}
        for batch in batches:
            guest = self._of.get(batch.hyper["name"])
            if guest is None:
                continue
            called[id(guest)] = guest
            scale = batch.scale
            for param, grad in zip(batch.params, batch.grads, strict=True):
                param.grad = grad if scale is None else grad * scale.to(grad.device, grad.dtype)
        for guest in called.values():
            guest.step()

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


def keeps_state(cell: Cell, hyper: Mapping[str, Any], like: torch.Tensor) -> bool:
    """Whether an update of a guest leaves state, tried on a small tensor of its own.

    Args:
        cell: a cell of the guest.
        hyper: its values in that update.
        like: a parameter, for the number of dimensions and the dtype.

    Returns:
        True also where the guest cannot be tried.
    """
    param = torch.nn.Parameter(torch.ones([1] * like.ndim, dtype=like.dtype))
    param.grad = torch.ones_like(param)
    try:
        guest = cell.optimizer([param], **cell.constants)
        guest.param_groups[0].update(hyper)
        guest.step()
    except Exception:
        return True
    return bool(guest.state.get(param))


def _is_torchs(attribute: str) -> bool:
    """Whether torch makes an attribute of an optimizer anew itself: hooks, a patched `step`."""
    remade = ("defaults", "state", "param_groups", "step", "_zero_grad_profile_name")
    return attribute in remade or attribute.startswith("_optimizer_")


def _same(cell: Cell, key: str, value: Any) -> bool:
    return key in cell.constants and bool(cell.constants[key] == value)

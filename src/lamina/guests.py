"""Any `torch.optim.Optimizer` as a part of a plan: the plan moves the values it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, final

import torch

from .admission import admit
from .algorithms.base import Algorithm, Batch, Hyper, State, times
from .errors import PlanError
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

    def set_mode(self, mode: str, names: Collection[str]) -> None:
        """Call `train()` or `eval()` on the guests that have it, for these groups alone.

        Schedule-free guests then move the weights, which what is frozen must not. It freezes at the
        end of a step, so in training mode, and takes no part in a change of modes until it thaws.
        What was frozen by hand may thaw in either mode, and goes along with its group.
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
    ) -> Batch:
        """The gradients of a guest's group, for the gradient operations."""
        return Batch(GUEST, params, grads, {}, [], group, names=names)

    @staticmethod
    def any_outgrown(group: Mapping[str, Any]) -> bool:
        """Whether any parameter of a group has another shape than its guest began with."""
        return bool([list(param.shape) for param in group["params"]] != group["param_shapes"])

    @staticmethod
    def outgrown(
        group: Mapping[str, Any], param: torch.Tensor, entry: Mapping[str, Any]
    ) -> list[str]:
        """In words, the state of a guest that is of another size than its parameter has now.

        What a guest keeps may have any shape; so it is looked at only after a change of the
        parameter's, and must all have the new one then.
        """
        place = next(i for i, each in enumerate(group["params"]) if each is param)
        if tuple(group["param_shapes"][place]) == tuple(param.shape):
            return []
        return [
            f"its {key} {tuple(value.shape)}"
            for key, value in entry.items()
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != param.shape
        ]

    def begin_anew(self, group: Mapping[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter before its guest's first update of it.

        Raises:
            PlanError: if the guest made it when it was built, for another size.
        """
        place = next(i for i, each in enumerate(group["params"]) if each is param)
        name = group["param_names"][place]
        entry = self.begun.get(name, {})
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != param.shape:
                kind = optimizer_name(type(self._of[group["name"]]))
                raise PlanError(
                    f"the guest optimizer {kind} made the {key} of {name!r} when it was built, of "
                    f"shape {tuple(value.shape)}, and the parameter has {tuple(param.shape)} now; "
                    "build the optimizer again from its plan. Nothing was changed."
                )
        return deepcopy(entry)

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
    """Let a guest see these groups only."""
    every, guest.param_groups = guest.param_groups, groups
    try:
        yield
    finally:
        guest.param_groups = every


def _is_torchs(attribute: str) -> bool:
    """Whether torch makes an attribute of an optimizer anew itself: hooks, a patched `step`."""
    remade = ("defaults", "state", "param_groups", "step", "_zero_grad_profile_name")
    return attribute in remade or attribute.startswith("_optimizer_")

"""Which parameters keep `requires_grad` on while they are frozen, because a reducer holds them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._util.sharding import is_distributed, is_sharded
from .._util.text import listed
from ..errors import PlanError
from ..model.finding import Finding
from ..model.reducers import NOTHING, Reduction, has_zero_gradients, measure, zero_gradients
from ..resolve.resolved import ALWAYS, Cell

Groups = Sequence[dict[str, Any]]
#: why `requires_grad` stays on while a parameter is frozen
REDUCED, MAY_BE_WRAPPED = "reduced", "may be wrapped"


class FlagKeeper:
    """Knows which parameters must keep `requires_grad` on while they are frozen.

    A reducer waits for the gradient of everything it holds, and never learns of what it does not
    hold. So what it holds keeps the flag, and a hook keeps its gradients at zero while it is
    frozen: no norm, of a trainer either, sees them. Which those are is measured at build, at the
    first step (the model may have been wrapped in between), and whenever a window opens or closes.
    In a process group, what trains later keeps the flag until the first step.

    Args:
        model: what the plan was built on.
        cells: the cells of the plan.
    """

    def __init__(self, model: nn.Module, cells: Sequence[Cell]) -> None:
        self._model = model
        self._cells = cells
        #: whether the parameters were measured in a step, that is after any wrapping
        self.settled = False
        self._found = NOTHING
        self._foreign: frozenset[int] = frozenset()
        #: what was given a hook, for copies, which have none
        self._zeroed: dict[int, weakref.ref[torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return all but what was measured: the parameters of a copy are in no reducer."""
        fresh = {"settled": False, "_found": NOTHING, "_foreign": frozenset()}
        params = [param for known in self._zeroed.values() if (param := known()) is not None]
        zeroed = [param for param in params if has_zero_gradients(param)]
        return {**self.__dict__, **fresh, "_zeroed": zeroed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _zeroed={})
        for param in state["_zeroed"]:
            self.zero(param)

    def measure(self, groups: Groups, clock: int, *, in_step: bool) -> None:
        """Measure what is reduced, as things are now.

        Args:
            groups: the parameter groups, one for each cell.
            clock: the step that comes next.
            in_step: whether this is a step, before which the model was wrapped if ever.

        Raises:
            PlanError: if a parameter must train from now on that the reducer does not hold, though
                it holds others; nothing was changed.
        """
        found = self.look(groups, in_step=in_step)
        refused = refusal(self._cells, groups, found, clock, in_step=in_step)
        if refused:
            self.settled = False  # so that the next step looks again
            raise PlanError(" ".join(refused))

    def look(self, groups: Groups, *, in_step: bool) -> Reduction:
        """Measure what is reduced, without judging it."""
        found = measure(self._model, [param for group in groups for param in group["params"]])
        if not in_step:  # in a step, the loss may still be there, and with it all nodes
            self._foreign = found.kept
        self._found = found
        self.settled = in_step
        return found

    def reason(self, cell: Cell, param: torch.Tensor, clock: int) -> str | None:
        """Return why a parameter keeps the flag while it is frozen, or None if it does not.

        Args:
            cell: the cell of the parameter.
            param: the parameter.
            clock: the step that comes next.
        """
        if id(param) in self._found.held or id(param) in self._foreign:
            return REDUCED
        wrapping = is_distributed() and not self.settled and not self._found.held
        if wrapping and trains_from(cell, clock) and not is_sharded(param):
            return MAY_BE_WRAPPED
        return None

    def keeps(self, cell: Cell, param: torch.Tensor, clock: int) -> bool:
        """Return whether a parameter keeps the flag while it is frozen."""
        return self.reason(cell, param, clock) is not None

    def zero(self, param: torch.Tensor) -> None:
        """Keep the gradients of a parameter at zero from now on."""
        if param.requires_grad:
            zero_gradients(param)
            self._zeroed[id(param)] = weakref.ref(param)


def trains_from(cell: Cell, clock: int) -> bool:
    """Return whether a cell trains at a step or after it."""
    return any(end is None or end > clock for _, end in cell.windows)


def not_reduced(
    cells: Sequence[Cell], groups: Groups, found: Reduction, clock: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters that train from now on without being reduced, though others are."""
    if not found.held:
        return
    fine = (found.held - found.missed) | found.left_out
    for cell, group in zip(cells, groups, strict=True):
        if trains_from(cell, clock):
            for info, param in zip(cell.parameters, group["params"], strict=True):
                if id(param) not in fine and not is_sharded(param):
                    yield info.name, param


def refusal(
    cells: Sequence[Cell], groups: Groups, found: Reduction, clock: int, *, in_step: bool = False
) -> tuple[str, str] | None:
    """Return why the plan cannot train under the wrappers there are, and the fix; None if it can.

    Args:
        cells: the cells of the plan.
        groups: the parameter groups, one for each cell.
        found: what was measured.
        clock: the step that comes next.
        in_step: whether the model was wrapped after the plan was built.
    """
    missing = list(not_reduced(cells, groups, found, clock))
    inside = [name for name, param in missing if id(param) in found.missed]
    if inside and any(id(param) in found.held for _, param in missing):
        return (
            f"two DistributedDataParallel wrappers are around {listed(inside)}, and only one of "
            f"them reduces it: with the other, {_DRIFT}",
            "Build the plan on the wrapper that is called, or delete the other one first.",
        )
    if inside:
        return _refuse_late(inside, in_step)
    if missing:
        return (
            f"the plan trains {listed([name for name, _ in missing])}, which no "
            "DistributedDataParallel wraps, though one wraps other parameters of the model: "
            f"{_DRIFT}",
            "Wrap the whole model, or freeze this part (frozen=True).",
        )
    starved = [
        info.name
        for cell, group in zip(cells, groups, strict=True)
        if not trains_from(cell, clock)
        for info, param in zip(cell.parameters, group["params"], strict=True)
        if id(param) in found.starved
    ]
    if in_step or not starved:
        return None
    return (
        f"requires_grad of {listed(starved)} was turned off after DistributedDataParallel wrapped "
        "the model, whose reducer waits for their gradients and reduces nothing without them.",
        "Turn it on again and freeze them in the plan (frozen=True), or turn it off before "
        "wrapping.",
    )


_DRIFT = "nothing averages the gradients, and the processes would drift apart."


def _refuse_late(names: Sequence[str], in_step: bool) -> tuple[str, str]:
    cause = (
        f"the plan trains {listed(names)} at some step, but requires_grad was off when "
        f"DistributedDataParallel wrapped the model: {_DRIFT}"
    )
    if in_step:
        return cause, (
            "No step was taken. Build the plan after torch.distributed is initialised, or wrap "
            "first and then build."
        )
    pattern = " | ".join(names) if len(names) <= 3 else "*"
    return cause, (
        "Turn requires_grad on before wrapping, since the plan freezes by itself: unwrap "
        f"(model = model.module), lamina.thaw(model, {pattern!r}), wrap again, then build."
    )


@dataclass(frozen=True)
class Flags:
    """What the wrapping of a model means for `requires_grad`, as a build would find it.

    `kept` has the names of parameters that keep the flag on while they are frozen, each with the
    reason; `findings` what the build would refuse.
    """

    kept: Mapping[str, str]
    findings: tuple[Finding, ...] = ()


def flags_of(
    model: nn.Module, cells: Sequence[Cell], tensors: Mapping[str, torch.Tensor], clock: int
) -> Flags:
    """Look at how a model is wrapped, and change nothing.

    Args:
        model: the model.
        cells: the cells of the plan.
        tensors: the parameters by name.
        clock: the step that comes next.
    """
    groups = [{"params": [tensors[info.name] for info in cell.parameters]} for cell in cells]
    keeper = FlagKeeper(model, cells)
    found = keeper.look(groups, in_step=False)
    refused = refusal(cells, groups, found, clock)
    findings = (Finding("not-reduced", *refused),) if refused else ()
    kept = {
        info.name: reason
        for cell in cells
        if cell.windows != ALWAYS
        for info in cell.parameters
        if (reason := keeper.reason(cell, tensors[info.name], clock))
    }
    return Flags(kept, findings)

"""Which parameters DistributedDataParallel reduces, measured; and what that means for freezing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._util.sharding import is_sharded
from ..errors import PlanError
from ..resolve.findings import listed
from ..resolve.resolved import ALWAYS, Cell, Finding

Groups = Sequence[dict[str, Any]]
_PROBE = "lamina: whether anything keeps this node"
#: why `requires_grad` stays on while a parameter is frozen
REDUCED, MAY_BE_WRAPPED = "reduced", "may be wrapped"


@dataclass(frozen=True)
class Reduction:
    """What DistributedDataParallel does with the gradients of some parameters, by their ids.

    `held` are in a reducer, of whichever wrapper; `missed` are inside a wrapper whose reducer does
    not hold them; `left_out` are what a wrapper was told to ignore. `starved` are held, but have
    the flag off, and the wrapper waits for a gradient of each. `kept` are parameters whose
    gradients something else collects: not a wrapper that was found, but their node is kept alive.
    """

    held: frozenset[int] = frozenset()
    missed: frozenset[int] = frozenset()
    left_out: frozenset[int] = frozenset()
    starved: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()

    def among(self, ids: AbstractSet[int]) -> Reduction:
        """Return the same of some parameters only."""
        return Reduction(*(getattr(self, field.name) & ids for field in fields(self)))


_NOTHING = Reduction()


def is_distributed() -> bool:
    """Return whether this process is in a process group, without which nothing is reduced."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def measure(model: nn.Module, params: Iterable[torch.Tensor]) -> Reduction:
    """Measure which parameters the reducers of DistributedDataParallel hold.

    A reducer keeps the autograd node of a parameter alive, which otherwise lives only as long as a
    graph that uses it. So a wrapper holds at most the parameters inside it whose node is alive, and
    its log says how many it holds. A model inside a wrapper does not know it, hence the search.

    Args:
        model: what the plan was given: the wrapper, a module with wrappers inside, or a module
            inside one.
        params: the parameters of the plan.
    """
    if not is_distributed():
        return _NOTHING
    params = [param for param in params if not is_sharded(param)]  # FSDP reduces those itself
    alive = {id(param) for param in params if _is_alive(param)}
    if not alive:
        return _NOTHING
    each = list(_reductions(model, params))
    held, missed, left_out, starved = (
        frozenset().union(*(getattr(found, name) for found in each))
        for name in ("held", "missed", "left_out", "starved")
    )
    kept = frozenset(alive - held - missed - left_out)
    found = Reduction(held, missed, left_out - held - missed, starved, kept)
    return found.among(set(map(id, params)))


def _is_alive(param: torch.Tensor) -> bool:
    """Return whether anything keeps the node that accumulates a parameter's gradient."""
    if not (param.is_floating_point() or param.is_complex()):
        return False
    if not param.is_leaf or param.is_inference():
        return False
    flag = param.requires_grad
    with torch.enable_grad():
        param.requires_grad_(True)  # without it, there is no node to ask for
        _node(param).metadata[_PROBE] = True
        kept = _node(param).metadata.pop(_PROBE, False)
        param.requires_grad_(flag)
    return bool(kept)


def _node(param: torch.Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(param).node


def _reductions(model: nn.Module, params: Sequence[torch.Tensor]) -> Iterator[Reduction]:
    """Yield what each wrapper does that decides over some parameters.

    Wrappers in the model are those that train it; others matter for what is in none of them.
    """
    inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    covered = {id(param) for wrapper in inside for param in wrapper.module.parameters()}
    for wrapper in inside:
        yield _reduction_of(wrapper)
    rest = {id(param) for param in params} - covered
    if not rest:
        return
    outside = _living_wrappers(rest)
    if len(outside) > 1:  # one may be left over from wrapping the model before
        del outside
        gc.collect()
        outside = _living_wrappers(rest)
    for wrapper in outside:
        yield _reduction_of(wrapper).among(rest)


def _living_wrappers(ids: set[int]) -> list[DistributedDataParallel]:
    """All wrappers in this process that have one of these parameters inside."""
    # `isinstance` would ask proxies for their class, which may load whatever they stand for.
    found = (it for it in gc.get_objects() if issubclass(type(it), DistributedDataParallel))
    return [it for it in found if not ids.isdisjoint(map(id, it.module.parameters()))]


def _reduction_of(wrapper: DistributedDataParallel) -> Reduction:
    ignored = wrapper.parameters_to_ignore
    named = dict(wrapper.module.named_parameters())
    left_out = frozenset(id(param) for name, param in named.items() if name in ignored)
    inside = [param for name, param in named.items() if name not in ignored]
    if getattr(wrapper, "reducer", None) is None:  # all of its reductions are delayed ones
        return Reduction(left_out=left_out)
    held = frozenset(id(param) for param in inside if _is_alive(param))
    if len(held) != wrapper._get_ddp_logging_data()["num_parameter_tensors"]:
        # A graph that is still referenced keeps nodes too. The buckets are exact, but to list them
        # torch allocates as much as all gradients.
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        held = frozenset(id(param) for bucket in buckets for param in bucket.parameters())
    off = frozenset(id(param) for param in inside if not param.requires_grad)
    patient = wrapper.find_unused_parameters or wrapper.static_graph
    starved = frozenset() if patient else held & off
    return Reduction(held, frozenset(map(id, inside)) - held, left_out, starved)


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
        self._found = _NOTHING
        self._foreign: frozenset[int] = frozenset()
        #: what was given a hook, for copies, which have none
        self._zeroed: dict[int, weakref.ref[torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what was measured: the parameters of a copy are in no reducer."""
        fresh = {"settled": False, "_found": _NOTHING, "_foreign": frozenset()}
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


def zero_gradients(param: torch.Tensor) -> None:
    """Keep the gradients of a parameter at zero, until `free_gradients`."""
    if not has_zero_gradients(param):
        param.register_hook(_zero)


def free_gradients(param: torch.Tensor) -> None:
    """Undo `zero_gradients`, whichever plan called it."""
    hooks = param._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if hook is _zero]:
        del hooks[key]


def has_zero_gradients(param: torch.Tensor) -> bool:
    """Return whether a hook keeps the gradients of a parameter at zero."""
    return any(hook is _zero for hook in (param._backward_hooks or {}).values())


def _zero(gradient: torch.Tensor) -> torch.Tensor:
    # A new tensor: autograd may give the same one to somebody else. A product would keep a NaN.
    return torch.zeros_like(gradient)


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
        return _refuse_two(listed(inside))
    if inside:
        return _refuse_late(inside, in_step)
    if missing:
        return _refuse_unwrapped(listed([name for name, _ in missing]))
    starved = [
        info.name
        for cell, group in zip(cells, groups, strict=True)
        if not trains_from(cell, clock)
        for info, param in zip(cell.parameters, group["params"], strict=True)
        if id(param) in found.starved
    ]
    return _refuse_starved(listed(starved)) if starved and not in_step else None


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


def _refuse_two(names: str) -> tuple[str, str]:
    return (
        f"two DistributedDataParallel wrappers are around {names}, and only one of them reduces "
        f"it: with the other, {_DRIFT}",
        "Build the plan on the wrapper that is called, or delete the other one first.",
    )


def _refuse_unwrapped(names: str) -> tuple[str, str]:
    return (
        f"the plan trains {names}, which no DistributedDataParallel wraps, though one wraps "
        f"other parameters of the model: {_DRIFT}",
        "Wrap the whole model, or freeze this part (frozen=True).",
    )


def _refuse_starved(names: str) -> tuple[str, str]:
    return (
        f"requires_grad of {names} was turned off after DistributedDataParallel wrapped the model, "
        "whose reducer waits for their gradients and reduces nothing without them.",
        "Turn it on again and freeze them in the plan (frozen=True), or turn it off before "
        "wrapping.",
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

"""Any `torch.optim.Optimizer` as a part of a plan: the plan moves the values it reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, final

import torch

from ..algorithms.base import Algorithm, Batch, Hyper, State, times
from ..algorithms.registry import method_of, optimizer_name, settings_of
from ..errors import PlanError, StateError
from ..kernels.memory_check import plainly_fit
from ..optim.updates import Group, OptimizerState, Tensors, Updates, names_of
from ..resolve.resolved import Cell
from .build import build_guest
from .memory import OURS, Contents, GuestMemory, apart, copies, own_attributes
from .packing import UnwritableError, pack, unpack
from .rehearsal import steps_with


@final
class Guest(Algorithm):
    """Stands for a guest's own algorithm, so that gradient operations treat all groups alike."""

    name: ClassVar[str] = "guest"
    defaults: ClassVar[dict[str, Any]] = {}
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    buffers: ClassVar[tuple[str, ...]] = ()

    def init(self, param: torch.Tensor, hyper: Hyper) -> State:
        """Do nothing: guests make their state themselves."""
        return {}

    def update(
        self, param: torch.Tensor, grad: torch.Tensor, state: State, step: int, hyper: Hyper
    ) -> tuple[torch.Tensor, State]:
        """Raise: guests step themselves, so this is never called."""
        raise NotImplementedError


GUEST = Guest()
#: what a guest keeps for the step of one parameter: its state, of its group, and for itself
_Kept = tuple[Mapping[str, Any], Mapping[str, Any], Contents]


class Guests(Updates):
    """The third-party optimizers of a plan, each over its groups."""

    def __init__(self, cells: Sequence[Cell], groups: Sequence[dict[str, Any]], state: Any) -> None:
        self._of: dict[str, torch.optim.Optimizer] = {}
        #: what guests made when they were built, by parameter and by group: where they begin anew
        self.initial: dict[str, dict[str, Any]] = {}
        self.initial_groups: dict[str, dict[str, Any]] = {}
        #: what each guest keeps beside the groups and the state of parameters
        self._memories: dict[torch.optim.Optimizer, GuestMemory] = {}
        #: by group: learning rates and the like that a guest keeps as tensors
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        #: by group: the names of what the plan or the constructor sets
        self._settings: dict[str, frozenset[str]] = {}
        self._state = state
        guests = (cell.optimizer for cell in cells if method_of(cell.optimizer) is None)
        for optimizer in dict.fromkeys(guests):
            chosen = [i for i, cell in enumerate(cells) if cell.optimizer is optimizer]
            own = [groups[i] for i in chosen]
            its = [cells[i] for i in chosen]
            guest, memory = build_guest(optimizer, its, own, state)
            self._memories[guest] = memory
            self._of |= {group["name"]: guest for group in own}
            for cell, group in zip(its, own, strict=True):
                self._settings[cell.name] = settings_of(optimizer).union(dict(cell.hyper))
                self._take_tensors(cell, group)
            self._remember(own)
        #: whether there are any
        self.present = bool(self._of)

    def __contains__(self, group: str) -> bool:
        return group in self._of

    def __getstate__(self) -> dict[str, Any]:
        """Return all parts, with the attributes of guests that torch leaves out of a copy."""
        kept = [(guest, own_attributes(guest)) for guest in self._memories]
        return {**self.__dict__, "kept": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for guest, attributes in state.pop("kept"):
            guest.__dict__.update(attributes)
        self.__dict__.update(state)

    def _take_tensors(self, cell: Cell, group: dict[str, Any]) -> None:
        """Keep what the guest holds as a tensor apart: in the group the plan writes numbers."""
        keys = [k for k in dict(cell.hyper) if isinstance(group.get(k), torch.Tensor)]
        found = {key: group[key] for key in keys if group[key].numel() == 1}
        if found:
            self._tensors[cell.name] = found
            group.update({key: tensor.item() for key, tensor in found.items()})

    def _remember(self, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            self.initial_groups[group["name"]] = deepcopy(rest)
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if self._state.get(param):  # most guests begin their state in their first step
                    self.initial[name] = deepcopy(dict(self._state[param]))

    def read(self, group: Mapping[str, Any], param: torch.Tensor, entry: dict[str, Any]) -> None:
        """Let a group's guest bring a saved entry into its form of today, as in torch's load.

        torch's own make tensors of the numbers that older versions kept.
        """
        guest = self._of[group["name"]]
        own = {"state": {param: entry}, "param_groups": [{**group, "params": [param]}]}
        apart(guest, loose={}, state={}, groups=[]).__setstate__(own)

    def set_mode(self, mode: str, names: Collection[str]) -> None:
        """Call `train()` or `eval()` on the guests that have it, for these groups alone.

        Schedule-free guests then move the weights, which what is frozen must not. It freezes at the
        end of a step, so in training mode, and takes no part in a change of modes until it thaws.
        What was frozen by hand may thaw in either mode, and goes along with its group.
        """
        for guest in self._memories:
            switch = getattr(guest, mode, None)
            chosen = [group for group in guest.param_groups if group["name"] in names]
            if callable(switch) and chosen:
                every, guest.param_groups = guest.param_groups, chosen
                try:
                    with self._at_work(guest):
                        switch()
                finally:
                    guest.param_groups = every

    def batch(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> Batch:
        """Put gradients into a batch for the gradient operations; the guest has the state."""
        return Batch(GUEST, list(params), list(grads), {}, [], group, names=names_of(group, params))

    def watched(self, params: Tensors, state: OptimizerState) -> list[dict[str, Any]]:
        """Return nothing: what a guest keeps is its own, and may change at every step."""
        return []

    def kernel_of(self, batch: Batch) -> str:
        """Return that the optimizer of somebody else does it."""
        return "third-party: the step of the optimizer itself"

    def fits(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> bool:
        """Return whether the parameters have the shapes that the guest knows, and the gradients."""
        known = [list(param.shape) for param in group["params"]] == group["param_shapes"]
        return known and plainly_fit(params, grads, [], ())

    def misfit(self, group: Group, param: torch.Tensor, entry: dict[str, Any]) -> list[str]:
        """Describe state of another size than its parameter has now.

        What a guest keeps may have any shape. So it is looked at only after the shape of the
        parameter changed, and must all have the new one then.
        """
        if tuple(group["param_shapes"][_place_in(group, param)]) == tuple(param.shape):
            return []
        return [f"its {key} {tuple(value.shape)}" for key, value in _resized(param, entry)]

    def initial_state(self, group: Group, param: torch.Tensor) -> dict[str, Any]:
        """Return nothing: guests make their state themselves, where they find an empty one."""
        return {}

    def restarted_state(self, group: Group, param: torch.Tensor) -> dict[str, Any]:
        """Return the state that the guest made for a parameter when it was built.

        Raises:
            PlanError: if it made it for another size.
        """
        name = group["param_names"][_place_in(group, param)]
        entry = self.initial.get(name, {})
        for key, value in _resized(param, entry):
            kind = optimizer_name(type(self._of[group["name"]]))
            raise PlanError(
                f"the third-party optimizer {kind} made the {key} of {name!r} when it was built, "
                "of "
                f"shape {tuple(value.shape)}, and the parameter has {tuple(param.shape)} now; "
                "build the optimizer again from its plan. Nothing was changed."
            )
        return deepcopy(entry)

    def step(self, batches: Sequence[Batch]) -> None:
        """Give the guests their gradients, as the operations left them, and let them step."""
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
            guest.param_groups = sorted(own, key=lambda group: group["name"] not in names)
            name = optimizer_name(type(guest))
            try:
                with self._at_work(guest):
                    guest.step()
            except Exception as error:
                error.add_note(
                    f"Raised by the third-party optimizer {name}, whose own weights may be "
                    "updated in "
                    f"part. Updated before it: {', '.join(done) or 'none'}; all other weights are "
                    "as they were before this step."
                )
                raise
            done.append(name)

    @contextmanager
    def _at_work(self, guest: torch.optim.Optimizer) -> Iterator[None]:
        """Lend a guest its loose entries of the state, and the tensors in which it keeps values."""
        held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for group in guest.param_groups if self._tensors else ():
            tensors = self._tensors.get(group["name"], {})
            held.append((group, {key: group[key] for key in tensors}))
            for key, tensor in tensors.items():
                tensor.fill_(group[key])  # the guest, or a compiled step, holds this very tensor
            group.update(tensors)
        try:
            with self._memories[guest].at_work(self._state):
                yield
        finally:
            for group, numbers in held:
                group.update(numbers)

    # --- state out and in ----------------------------------------------------------------------

    def write(self, groups: Sequence[dict[str, Any]], state: dict[Any, Any]) -> None:
        """Bring what guests keep into the groups and entries of a `state_dict`, in plain form.

        Raises:
            StateError: for an object that a checkpoint cannot hold.
        """
        memories = {guest: memory.write(guest) for guest, memory in self._memories.items()}
        for group in groups:
            guest = self._of.get(group["name"])
            if guest is None:
                continue
            own = self.own_keys(group["name"], group)
            for key in [key for key in group if key not in OURS]:
                try:
                    group[key] = pack(group[key])
                except UnwritableError as error:
                    initial = self.initial_groups[group["name"]]
                    if key in own and initial.get(key) is not group[key]:
                        raise _unwritable(guest, error, f"group {group['name']!r}", key) from None
                    del group[key]  # a setting of the plan's, or what every build puts there
                    own.discard(key)
            for index, name in zip(group["params"], group["param_names"], strict=True):
                for key, value in state.get(index, {}).items():
                    try:
                        packed = pack(value)
                    except UnwritableError as error:
                        raise _unwritable(guest, error, f"state of {name!r}", key) from None
                    if packed is not value:
                        state[index] = {**state[index], key: packed}
            record = memories[guest] | ({"keys": sorted(own)} if own else {})
            if record:
                group["guest"] = record

    def restore_form(
        self, groups: Sequence[dict[str, Any]], state: dict[str, Any]
    ) -> dict[str, Any]:
        """Undo `write` in the groups and entries of the only optimizer, as it writes them itself.

        Returns:
            The keys beside state and groups.
        """
        rest: dict[str, Any] = {}
        for group, written in zip(groups, state["param_groups"], strict=True):
            if written["name"] not in self._of:
                continue
            group.update({key: unpack(value) for key, value in group.items()})
            group.update(self._tensors.get(written["name"], {}))
            for index in group["params"]:
                if index in state["state"]:
                    state["state"][index] = unpack(state["state"][index])
            record = unpack(written.get("guest", {}))
            state["state"].update(record.get("loose", {}))
            rest.update(record.get("own", {}))
        return rest

    def own_keys(self, name: str, group: Mapping[str, Any]) -> set[str]:
        """Return the keys of a group that are its guest's state: no settings, and none of ours."""
        return {key for key in group if isinstance(key, str)} - OURS - self._settings[name]

    def read_memories(
        self,
        records: Mapping[type, Mapping[str, Any]],
        groups: Sequence[dict[str, Any]],
        state: Mapping[torch.Tensor, dict[str, Any]],
        own: Mapping[str, Mapping[str, Any]],
    ) -> dict[torch.optim.Optimizer, Contents]:
        """Return what guests keep for themselves, as saved or else as they were built.

        Args:
            records: what was saved of it, by the class of the guest.
            groups: all groups.
            state: the loaded state.
            own: by group, the values that guests keep in it, as loaded.

        Raises:
            StateError: for what a guest cannot go on from; nothing was changed.
        """
        found = {}
        for guest, memory in self._memories.items():
            its = [self._loaded(g, own) for g in groups if self._of.get(g["name"]) is guest]
            record = records.get(type(guest), {})
            found[guest] = memory.read(guest, record, its, state)
        return found

    def _loaded(
        self, group: dict[str, Any], own: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        stale = self.own_keys(group["name"], group)
        return {k: v for k, v in group.items() if k not in stale} | dict(own[group["name"]])

    def put(
        self,
        groups: Sequence[dict[str, Any]],
        own: Mapping[str, Mapping[str, Any]],
        contents: Mapping[torch.optim.Optimizer, Contents],
    ) -> None:
        """Exchange what guests keep in their groups and for themselves."""
        for group in groups:
            if group["name"] in self._of:
                for key in self.own_keys(group["name"], group) - own[group["name"]].keys():
                    del group[key]
                group.update(own[group["name"]])
        for guest, its in contents.items():
            self._memories[guest].put(guest, its)

    def check_loaded(
        self,
        groups: Sequence[dict[str, Any]],
        state: dict[torch.Tensor, dict[str, Any]],
        own: Mapping[str, Mapping[str, Any]],
        contents: Mapping[torch.optim.Optimizer, Contents],
        values: Callable[[int], Mapping[str, Any]],
    ) -> None:
        """Raise `StateError` for a state with which a guest's next step would fail.

        The step is tried on copies: the smallest parameter of each form of a state stands for all.
        State that works only in the dtype of its parameter, to which torch's load casts, is cast.

        Args:
            groups: all groups.
            state: the loaded state.
            own: by group, the values that guests keep in it, as loaded.
            contents: what guests keep for themselves, as loaded.
            values: the hyperparameters of the next step, by place of the group.
        """
        for place, group in enumerate(groups):
            guest = self._of.get(group["name"])
            if guest is None:
                continue
            name, hyper = group["name"], values(place)
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            for alike in _alike(group["params"], state):
                param, parameter = alike[0], names[id(alike[0])]
                tried = partial(self._failure, group, param, hyper)
                failure = tried((state[param], own[name], contents[guest]))
                if not failure or tried(self._as_built(group, parameter)):
                    continue  # or it cannot be tried on this parameter
                if not tried((_as_torch_casts(param, state[param]), own[name], contents[guest])):
                    for each in alike:
                        state[each] = _as_torch_casts(each, state[each])
                    continue
                raise StateError(
                    f"the saved state of {parameter!r} does not fit its third-party optimizer "
                    f"{optimizer_name(type(guest))}, whose next step would fail: {failure}. "
                    "Nothing was loaded. To begin its state anew, load with "
                    f"renamed={{{parameter!r}: None}}."
                )

    def _as_built(self, group: dict[str, Any], parameter: str) -> _Kept:
        guest = self._of[group["name"]]
        initial = self.initial_groups[group["name"]]
        own = {key: initial[key] for key in self.own_keys(group["name"], initial)}
        return self.initial.get(parameter, {}), own, self._memories[guest].read(guest, {}, [], {})

    def _failure(
        self, group: dict[str, Any], param: torch.Tensor, hyper: Mapping[str, Any], kept: _Kept
    ) -> str:
        guest = self._of[group["name"]]
        entry, own, contents = kept
        tensors = {k: t.clone() for k, t in self._tensors.get(group["name"], {}).items()}
        for key, tensor in tensors.items():
            tensor.fill_(hyper[key])
        now = self._loaded(group, {group["name"]: own}) | dict(hyper) | tensors
        copied = copies(guest, contents.attributes)
        other = apart(guest, loose=contents.loose, attributes=copied, state={}, groups=[])
        return steps_with(other, now, param, entry)

    def own_writes(self, published: Mapping[str, Mapping[str, Any]]) -> str:
        """Describe a value of the plan that a guest has replaced; "" if none did."""
        for guest in self._memories:
            for group in guest.param_groups:
                for key, value in published[group["name"]].items():
                    if group[key] is not value and group[key] != value:
                        return (
                            f"the third-party optimizer {type(guest).__name__} set "
                            f"{key}={group[key]!r} "
                            f"in group {group['name']!r}, where the plan has {value!r}. A value "
                            "that an optimizer moves by itself cannot be the plan's too: use the "
                            "optimizer without a plan, or another one."
                        )
        return ""


def _place_in(group: Mapping[str, Any], param: torch.Tensor) -> int:
    return next(place for place, each in enumerate(group["params"]) if each is param)


def _resized(param: torch.Tensor, entry: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of an entry, scalars apart, whose shape is not that of the parameter."""
    for key, value in entry.items():
        if isinstance(value, torch.Tensor) and value.ndim and value.shape != param.shape:
            yield key, value


#: parameters that are larger are not copied for a trial
_LARGE = 2**24


def _alike(
    params: Sequence[torch.Tensor], state: Mapping[torch.Tensor, Mapping[str, Any]]
) -> list[list[torch.Tensor]]:
    """Return the parameters whose loaded state has the same form, the smallest first."""
    found: dict[Any, list[torch.Tensor]] = {}
    for param in params:
        plain = type(param) in (torch.Tensor, torch.nn.Parameter) and not param.is_meta
        if not state.get(param) or not plain or param.numel() > _LARGE:
            continue
        rows = [(key, _form(value, param)) for key, value in state[param].items()]
        form = repr((param.ndim, param.dtype, sorted(rows, key=lambda row: str(row[0]))))
        found.setdefault(form, []).append(param)
    return [sorted(alike, key=torch.Tensor.numel) for alike in found.values()]


def _as_torch_casts(param: torch.Tensor, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with its numbers in the dtype of the parameter."""
    return {
        key: value.to(param.dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "step"
        else value
        for key, value in entry.items()
    }


def _form(value: Any, param: torch.Tensor) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return "tensor", value.ndim, value.dtype, value.shape == param.shape
    return (type(value).__name__,)


def _unwritable(guest: torch.optim.Optimizer, error: Exception, place: str, key: str) -> StateError:
    return StateError(
        f"the third-party optimizer {optimizer_name(type(guest))} keeps {error} in the {place}, "
        "under "
        f"{key!r}, which a checkpoint cannot hold."
    )

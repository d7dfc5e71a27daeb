"""How parameters are updated: by which strategy, and in batches that are kept from step to step.

An optimizer asks the strategy of a parameter group for its batch and its state, and does not know
what is behind it: kernels, or a third-party optimizer (`guests/`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch

from .. import kernels
from .._util.sharding import unit_refusal
from .._util.tensors import MemorySnapshot, addresses, have_addresses, is_dtensor
from ..algorithms.base import Algorithm, Batch, Method, state_dtype_of
from ..algorithms.rounding import settle_entries
from ..errors import PlanError
from ..kernels.memory_check import plainly_fit, wrong_with_state

Group = dict[str, Any]
Tensors = Sequence[torch.Tensor]
#: the state of an optimizer: an entry for each parameter
OptimizerState = Mapping[torch.Tensor, dict[str, Any]]
_EMPTY = torch.empty(0)


class Updates(ABC):
    """Updates the parameters of some groups; every method is told which group is meant."""

    @abstractmethod
    def batch(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> Batch:
        """Put parameters with their gradients and their state into a batch."""

    @abstractmethod
    def watched(self, params: Tensors, state: OptimizerState) -> list[dict[str, Any]]:
        """Return the entries of the state whose tensors must stay the same for a batch to stay."""

    @abstractmethod
    def fits(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> bool:
        """Return whether a quick look tells that gradients and state fit the parameters."""

    @abstractmethod
    def misfit(self, group: Group, param: torch.Tensor, entry: dict[str, Any]) -> list[str]:
        """Describe what of a parameter's state does not fit it; nothing if all of it does."""

    @abstractmethod
    def initial_state(self, group: Group, param: torch.Tensor) -> dict[str, Any]:
        """Return the state of a parameter before its first update."""

    def kernel_of(self, batch: Batch) -> str:
        """Return what carried out the last update of a batch, and why it was this."""
        return kernels.reason_of(batch)

    def restarted_state(self, group: Group, param: torch.Tensor) -> dict[str, Any]:
        """Return the state with which a parameter starts again, whose size may have changed."""
        return self.initial_state(group, param)


class KernelUpdates(Updates):
    """Updates by the kernels, each group by its algorithm.

    Args:
        algorithm: the algorithm of every group, unless `by_group` has another one.
        by_group: algorithms by the name of a group.
    """

    def __init__(
        self, algorithm: Method | None, by_group: Mapping[str, Algorithm] | None = None
    ) -> None:
        self._algorithm = algorithm
        self._by_group = dict(by_group or {})

    def algorithm_for(self, group: Group) -> Algorithm:
        """Return the algorithm of a group."""
        found = self._by_group.get(group.get("name", ""), self._algorithm)
        if not isinstance(found, Algorithm):
            raise PlanError(f"the parameter group {group.get('name')!r} has no update rule.")
        return found

    def batch(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> Batch:
        """Make a batch, with state for parameters that have none yet."""
        algorithm = self.algorithm_for(group)
        names = names_of(group, params)
        for index, param in enumerate(params) if algorithm.unit != "element" else ():
            if why := unit_refusal(algorithm.name, algorithm.unit, param):
                raise PlanError(f"parameter {names[index] if names else index!r} {why}.")
        entries = self.watched(params, state)
        for param, entry in zip(params, entries, strict=True):
            _move_to(param, entry, algorithm)
            self.allocate(group, param, entry)
        keys = [key for key in algorithm.tensors if any(key in entry for entry in entries)]
        return Batch(
            algorithm,
            list(params),
            list(grads),
            {key: [entry.get(key) for entry in entries] for key in keys},
            [entry["step"] for entry in entries],
            group,
            names=names,
            prefer=preferred_kernel(group),
        )

    def watched(self, params: Tensors, state: OptimizerState) -> list[dict[str, Any]]:
        """Return the whole state: the kernels update its tensors in place."""
        return [state[param] for param in params]

    def fits(self, group: Group, params: Tensors, grads: Tensors, state: OptimizerState) -> bool:
        """Return whether all tensors are plain, contiguous and of the same sizes."""
        entries = self.watched(params, state)
        return plainly_fit(params, grads, entries, self.algorithm_for(group).tensors)

    def misfit(self, group: Group, param: torch.Tensor, entry: dict[str, Any]) -> list[str]:
        """Describe state tensors of another size or kind than the parameter."""
        return wrong_with_state(param, entry, self.algorithm_for(group).tensors)

    def initial_state(self, group: Group, param: torch.Tensor) -> dict[str, Any]:
        """Return a step count of 0; tensors are allocated at the first update."""
        return initial_state(param)

    def allocate(self, group: Group, param: torch.Tensor, entry: dict[str, Any]) -> None:
        """Add to the state of a parameter what its algorithm needs and is not there yet."""
        algorithm = self.algorithm_for(group)
        if "step" not in entry:
            entry.update(initial_state(param))
        settle_entries(param, entry, group)
        if entry.keys() >= algorithm.init(_EMPTY, group).keys():
            return
        dtype = state_dtype_of(param, group)
        for key, tensor in algorithm.init(param, group).items():
            if key not in entry:
                entry[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor


def _move_to(param: torch.Tensor, entry: dict[str, Any], algorithm: Algorithm) -> None:
    """Bring the state of a parameter to its device and its order in memory.

    A model may move, or change its memory format, between steps. The dtype stays: `state_dtype`
    chose it.
    """
    for key, value in entry.items():
        if key == "step":
            step = torch.as_tensor(value)
            dtype = step.dtype if step.is_floating_point() else torch.float32
            entry[key] = step.to(kernels.step_device(param), dtype).reshape(())
        elif key not in algorithm.tensors or value.is_sparse:
            continue
        elif value.device != param.device or value.stride() != param.stride():
            entry[key] = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
            entry[key].copy_(value)


def initial_state(param: torch.Tensor, steps: int = 0) -> dict[str, Any]:
    """Return the state of a parameter that holds no tensors yet, only the count of its updates."""
    device = kernels.step_device(param)
    return {"step": torch.full((), steps, dtype=torch.float32, device=device)}


def names_of(group: Group, params: Tensors) -> list[str]:
    """Return the names of some parameters of a group; empty if the group has no names."""
    names = group.get("param_names")
    if not names:
        return []
    by_id = {id(param): name for param, name in zip(group["params"], names, strict=True)}
    return [by_id[id(param)] for param in params]


def preferred_kernel(group: Group) -> str | None:
    """Return the kernel that a group asks for with torch's `fused` and `foreach`."""
    fused, foreach = group.get("fused"), group.get("foreach")
    if fused:
        return "fused"
    if foreach:
        return "foreach"
    return "readable" if fused is False or foreach is False else None


def variant_of(algorithm: Algorithm, group: Mapping[str, Any]) -> list[Any]:
    """Return the settings of a group by which its state was made; a user may set others."""
    return [group.get(key) for key in ("rounding", *algorithm.state_options)]


_requires_grad = attrgetter("requires_grad")


class KeptBatch:
    """A batch that is kept from step to step, and how all its tensors lay when it was made."""

    __slots__ = (
        *("batch", "variant", "_keys", "_values", "_tensors", "_shards"),
        *("_forms", "_addresses", "_grads"),
    )

    def __init__(self, batch: Batch, entries: Sequence[dict[str, Any]]) -> None:
        self.batch = batch
        self.variant = variant_of(batch.algorithm, batch.hyper)
        self._keys = [*chain.from_iterable(entries)]
        self._values: list[Any] = [*chain.from_iterable(map(dict.values, entries))]
        columns = (value for column in batch.columns.values() for value in column)
        found = (*batch.params, *(value for value in columns if value is not None))
        # A sparse tensor has no address; operators over lists never take it.
        self._tensors = [each for each in found if each.layout is torch.strided]
        self._shards: list[Any] = [each for each in self._tensors if is_dtensor(each)]
        tensors = self._watched()
        self._forms = MemorySnapshot(tensors)
        self._addresses = addresses(tensors)
        self._grads = MemorySnapshot(batch.grads)

    def holds(self, params: Sequence[torch.Tensor], entries: Sequence[dict[str, Any]]) -> bool:
        """Return whether these are the same tensors, in the same memory as before.

        Asked at every step, so it makes a few calls in C and no loop of its own.
        """
        if len(params) != len(self.batch.params) or not all(map(is_, params, self.batch.params)):
            return False
        if [*chain.from_iterable(entries)] != self._keys:
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, entries)), self._values)):
            return False
        tensors = self._watched()
        return self._forms.matches(tensors) and addresses(tensors) == self._addresses

    def fits(self, grads: Sequence[torch.Tensor]) -> bool:
        """Return whether gradients have the forms of those that were looked at, and have data.

        False also for what a quick look cannot tell: sparse, sharded and empty gradients.
        """
        return self._grads.matches(grads) and have_addresses(grads)

    def accept(self, grads: Sequence[torch.Tensor]) -> None:
        """Remember the forms of gradients that were looked at closely."""
        self._grads = MemorySnapshot(grads)
        self.batch.suited = None

    def _watched(self) -> list[torch.Tensor]:
        """Return the tensors that are compared; those of shards may be exchanged inside."""
        if not self._shards:
            return self._tensors
        return [*self._tensors, *(each._local_tensor for each in self._shards)]


class KeptStep:
    """The batches of all groups of a step, whose tensors are compared in one go.

    A few calls in C for each group would take longer than the update of many small groups.
    """

    def __init__(
        self, groups: Sequence[Group], batches: Sequence[Batch], state: OptimizerState
    ) -> None:
        self._groups = list(groups)
        #: what kernels and state were chosen by
        self._chosen_by = {
            *("fused", "foreach", "rounding"),
            *(key for batch in batches for key in batch.algorithm.state_options),
        }
        self._choices = self._read_choices(groups)
        self._batches = list(batches)
        self._counts = [len(batch.params) for batch in batches]
        ends = list(accumulate(self._counts))
        #: where the gradients of each batch are among all of them
        self._places = list(map(slice, [0, *ends], ends))
        columns = [column for batch in batches for column in batch.columns.values()]
        together = Batch(
            batches[0].algorithm,
            [param for batch in batches for param in batch.params],
            [grad for batch in batches for grad in batch.grads],
            {"all": [value for column in columns for value in column]},
            [],
            {},
        )
        self._known = KeptBatch(together, [state[param] for param in together.params])
        together.forget_gradients()

    def batches(self, groups: Sequence[Group], state: OptimizerState) -> list[Batch] | None:
        """Return the batches for the gradients of a step, or None where a tensor has changed.

        Args:
            groups: those that are to be updated.
            state: the state of the optimizer.
        """
        known = self._known
        if len(groups) != len(self._groups) or not all(map(is_, groups, self._groups)):
            return None
        listed = list(map(itemgetter("params"), groups))
        if list(map(len, listed)) != self._counts or self._read_choices(groups) != self._choices:
            return None
        params = [*chain.from_iterable(listed)]
        grads = [param.grad for param in params]
        if any(map(is_, grads, repeat(None))) or not all(map(_requires_grad, params)):
            return None
        if not known.holds(params, list(map(state.__getitem__, params))) or not known.fits(grads):
            return None
        parts = map(grads.__getitem__, self._places)
        for batch, group, its in zip(self._batches, groups, parts, strict=True):
            batch.grads = batch.known_grads = its
            batch.hyper, batch.scale = group, None
        return self._batches

    def _read_choices(self, groups: Sequence[Group]) -> list[Any]:
        return [value for key in self._chosen_by for value in map(dict.get, groups, repeat(key))]


class KeptBatches(dict[int, KeptBatch]):
    """The batches of the last step, by the id of their group; a copy of it is empty.

    A copied optimizer has tensors of its own, which these batches do not hold.
    """

    def __init__(self) -> None:
        super().__init__()
        #: all of them together, if that step was like the one before
        self.step: KeptStep | None = None

    def clear(self) -> None:
        super().clear()
        self.step = None

    def pop(self, *arguments: Any) -> Any:
        self.step = None
        return super().pop(*arguments)

    def __reduce__(self) -> tuple[type[KeptBatches], tuple[()]]:
        return KeptBatches, ()

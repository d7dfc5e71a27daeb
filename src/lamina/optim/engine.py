"""The optimizer that all optimizers of lamina derive from: the step, the state and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_
from typing import Any, ClassVar, cast

import torch

from .._util.interrupts import HeldInterrupt
from .._util.sharding import laid_out_as
from ..algorithms.base import Batch, Method
from ..errors import MismatchError
from ..kernels.memory_check import Misfit, message, wrong_with_grad, wrong_with_param
from ..model.parameters import ParamInfo
from ..model.selection import described, select_parameters
from .updates import (
    Group,
    KeptBatch,
    KeptBatches,
    KeptStep,
    KernelUpdates,
    Updates,
    preferred_kernel,
    variant_of,
)

Closure = Callable[[], Any]
#: a group with its parameters that have a gradient, and the gradients
Row = tuple[Group, list[torch.Tensor], list[torch.Tensor]]


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a `step` with torch's profiling and step hooks, all of it outside of compiled graphs.

    Torch would add them around a step that is outside, so that dynamo traced the hooks.
    """
    wrapped: Any = torch.optim.Optimizer.profile_hook_step(step)
    wrapped.hooked = True
    outside: Callable[..., Any] = torch._disable_dynamo(wrapped)  # type: ignore[attr-defined]
    return outside


class Engine(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that runs lamina's algorithms over its parameter groups.

    Subclasses give `algorithm` and `_update`, in which the weights change, and may override
    `_updates_for`, which tells how a group is updated.

    Trainers wrap optimizers in classes that derive from the optimizer's own but delegate only
    reads: an attribute that a method assigned would land in the wrapper. So methods change the
    objects that the constructor made, and assign no attributes.
    """

    algorithm: ClassVar[Method | None] = None
    _kernel_updates: KernelUpdates
    _kept_batches: KeptBatches
    #: the parameters of all groups as they were last seen
    _seen_params: list[torch.Tensor]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._make_parts()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_kept_batches" not in self.__dict__:  # a copy, or unpickled
            self._make_parts()

    def _make_parts(self) -> None:
        self._kernel_updates = KernelUpdates(self.algorithm)
        self._kept_batches = KeptBatches()
        self._seen_params = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch."""
        super().add_param_group(param_group)
        self._follow_exchanged()

    # --- the step ------------------------------------------------------------------------------

    # Under torch.compile the whole step runs outside the graph: traced, the bookkeeping on the
    # host (clocks, learning rates) would be recorded once and silently stop.
    @hooked
    def step(self, closure: Closure | None = None) -> Any:
        """Update the parameters from their gradients.

        Args:
            closure: clears the gradients, computes the loss, calls backward, returns the loss.

        Returns:
            What the closure returned, or None.
        """
        with torch.no_grad():
            return self._step(closure)

    def _step(self, closure: Closure | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with HeldInterrupt():
            self._update()
        return loss

    def _update(self) -> None:
        """Change the weights and the state by the gradients."""
        raise NotImplementedError

    def _collect(self, groups: Sequence[Group]) -> list[Batch]:
        """Return one batch for each group that has gradients.

        Raises:
            MismatchError: a parameter does not fit its gradient or its state; all groups are
                compared before anything of any group is changed.
        """
        self._follow_exchanged()
        if known := self._kept_batches.step:
            batches = known.batches(groups, self.state)
            if batches is not None:
                return batches
            self._kept_batches.step = None
        rows = [(group, *self._gather(group)) for group in groups]
        rows = [row for row in rows if row[1]]
        kept = [self._kept_batch(*row) for row in rows]
        changed = [row for row, batch in zip(rows, kept, strict=True) if batch is None]
        if changed:
            self._refuse_misfits(changed)
        elif self._may_keep_step(groups, rows):
            self._kept_batches.step = KeptStep(groups, cast("list[Batch]", kept), self.state)
        return [
            self._new_batch(*row) if batch is None else batch
            for row, batch in zip(rows, kept, strict=True)
        ]

    def _may_keep_step(self, groups: Sequence[Group], rows: Sequence[Row]) -> bool:
        """Return whether several groups, each with all its gradients, may be compared at once."""
        if len(groups) < 2 or len(rows) != len(groups):
            return False
        return all(
            len(params) == len(group["params"]) and self._updates_for(group) is self._kernel_updates
            for group, params, _ in rows
        )

    def _gather(self, group: Group) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the parameters of a group that have a gradient, and the gradients."""
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        for param in group["params"]:
            grad = param.grad
            if grad is not None and (param.requires_grad or self._is_due(param)):
                params.append(param)
                grads.append(grad)
        return params, grads

    def _is_due(self, param: torch.Tensor) -> bool:
        """Return whether to use the gradient of a parameter without requires_grad; torch does."""
        return True

    def _updates_for(self, group: Group) -> Updates:
        """Return how a group is updated."""
        return self._kernel_updates

    def _kept_batch(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch | None:
        """Return the batch of an earlier step, if its tensors are the same and lie as they did."""
        known = self._kept_batches.get(id(group))
        if known is None or known.variant != variant_of(known.batch.algorithm, group):
            return None
        if not known.holds(params, self._updates_for(group).watched(params, self.state)):
            return None
        if not known.fits(grads):
            self._refuse_misfits([(group, params, grads)])
            known.accept(grads)
        batch = known.batch
        batch.grads = batch.known_grads = grads
        batch.hyper, batch.scale = group, None
        batch.prefer = preferred_kernel(group)
        return batch

    def _new_batch(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch:
        """Make a batch, which is kept for the steps to come."""
        updates = self._updates_for(group)
        batch = updates.batch(group, params, grads, self.state)
        self._kept_batches[id(group)] = KeptBatch(batch, updates.watched(params, self.state))
        return batch

    def kernels(self) -> dict[str, str]:
        """Return which kernel carried out the last update of each group, and why.

        Returns:
            A text for each group, by its name, or by its number where it has none. It says what
            kept faster kernels from it, such as Numba that is not installed.

        Example:
            >>> import torch, lamina as lm
            >>> layer = torch.nn.Linear(2, 1)
            >>> optimizer = lm.SGD(layer.parameters(), fused=False)
            >>> layer(torch.ones(2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.kernels()
            {'0': 'readable: the update rule as written, one tensor at a time'}
        """
        groups = enumerate(self.param_groups)
        return {str(group.get("name", index)): self._kernel_of(group) for index, group in groups}

    def _kernel_of(self, group: Group) -> str:
        known = self._kept_batches.get(id(group))
        if known is None:
            return "none yet: it was not updated"
        return self._updates_for(group).kernel_of(known.batch)

    def _store_new_state(self, batches: Sequence[Batch]) -> None:
        """Store the state tensors that an update brought into being."""
        for batch in batches:
            if not batch.has_new_state:
                continue
            for key, column in batch.columns.items():
                for param, tensor in zip(batch.params, column, strict=True):
                    if tensor is not None:
                        self.state[param][key] = tensor
            batch.has_new_state = False

    # --- parameters that do not fit ------------------------------------------------------------

    def _refuse_misfits(self, rows: Iterable[Row]) -> None:
        """Raise `MismatchError`, naming every parameter that these gradients cannot update."""
        found: list[Misfit] = []
        for group, params, grads in rows:
            updates = self._updates_for(group)
            if updates.fits(group, params, grads, self.state):
                continue
            for param, grad in zip(params, grads, strict=True):
                wrong = (
                    wrong_with_param(param),
                    updates.misfit(group, param, self.state[param]),
                    wrong_with_grad(param, grad),
                )
                if any(wrong):
                    found.append(Misfit(*self._place_of(group, param), tuple(param.shape), *wrong))
        if found:
            raise MismatchError(message(found))

    def _place_of(self, group: Group, param: torch.Tensor) -> tuple[tuple[int, int], str]:
        """Return where a parameter is, as group and position, and what errors call it."""
        index = next(i for i, each in enumerate(self.param_groups) if each is group)
        place = next(i for i, each in enumerate(group["params"]) if each is param)
        return (index, place), shown_names(group, index)[place]

    # --- parameters that others put in the place of ours ---------------------------------------

    def _follow_exchanged(self) -> None:
        """Move the state to tensors that took the place of others in the groups.

        `fully_shard`, and accelerate with it, make new parameters of the same shape; the state
        would stay with the old ones.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        known = self._seen_params
        if len(known) == len(params):
            if all(map(is_, params, known)):
                return
            self._move_state(known, params)
        known[:] = params

    def _move_state(self, known: list[torch.Tensor], params: list[torch.Tensor]) -> None:
        """Give new tensors the state of those whose place they took, laid out as they are.

        What has state already keeps it: its user has moved it.
        """
        now, before = set(map(id, params)), set(map(id, known))
        moved: dict[torch.Tensor, dict[str, Any]] = {}
        left: list[torch.Tensor] = []
        for old, new in zip(known, params, strict=True):
            if id(old) in now or id(new) in before:
                continue  # still there, perhaps in another place
            # As in torch, the state of a parameter of another shape is new.
            if old not in self.state or self.state.get(new) or new.shape != old.shape:
                continue
            moved[new] = {
                key: laid_out_as(value, new) if _has_shape_of(value, old) else value
                for key, value in self.state[old].items()
            }
            left.append(old)
        self.state.update(moved)  # only now: a layout that cannot be made leaves all as it was
        for old in left:
            del self.state[old]

    # --- the state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in torch's form."""
        self._follow_exchanged()
        return super().state_dict()

    def restart_state(self, *which: str | torch.Tensor) -> None:
        """Begin the state of some parameters anew, in their size of now, as for a new optimizer.

        For a weight whose size changed under its optimizer: a vocabulary that grew, a layer that
        was pruned. Hyperparameters, clocks and all other parameters stay as they are.

        Args:
            *which: patterns over the names of parameters (a name is one), or the tensors.

        Raises:
            PlanError: for a pattern or a tensor that is no parameter here; nothing was changed.

        Example:
            >>> import torch, lamina as lm
            >>> model = torch.nn.Embedding(10, 2)
            >>> optimizer = lm.AdamW(model.named_parameters())
            >>> model.weight.data = torch.cat([model.weight.data, torch.zeros(5, 2)])
            >>> optimizer.restart_state("weight")
        """
        chosen = select_parameters(self.param_groups, which, self._described)
        self._restart([(group, group["params"][place], place) for group, place in chosen])

    def _described(self, group: Group, place: int) -> ParamInfo:
        """Return what patterns see of a parameter."""
        return described(group, place)

    def _restart(self, chosen: Sequence[tuple[Group, torch.Tensor, int]]) -> None:
        """Give parameters the state that they have before their first update."""
        new = [self._updates_for(group).restarted_state(group, param) for group, param, _ in chosen]
        for (group, param, _), entry in zip(chosen, new, strict=True):
            self._kept_batches.pop(id(group), None)
            self.state[param] = entry

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: as in torch, no hooks and no patched `step`."""
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}


def shown_names(group: Group, index: int) -> list[str]:
    """Return what errors call the parameters of a group."""
    if group.get("param_names"):
        return [repr(name) for name in group["param_names"]]
    return [f"number {place} of parameter group {index}" for place in range(len(group["params"]))]


def _has_shape_of(value: Any, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == param.shape

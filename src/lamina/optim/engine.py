"""What all optimizers of lamina share: the step, the state, and batches for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, ClassVar

import torch

from .. import kernels
from .._util.sharding import laid_out_as, unit_refusal
from ..algorithms.base import Algorithm, Batch, Method, state_dtype_of
from ..errors import MismatchError, PlanError
from ..kernels.memory_check import (
    Misfit,
    message,
    plainly_fit,
    wrong_with_grad,
    wrong_with_param,
    wrong_with_state,
)
from ..model.parameters import ParamInfo
from ..model.selection import described, select_parameters
from .run_state import KeptBatches

Closure = Callable[[], Any]
_EMPTY = torch.empty(0)


def hooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A `step` with torch's profiling and step hooks, all of it outside of compiled graphs.

    Torch would add them around a step that is outside, so that dynamo traced the hooks.
    """
    wrapped: Any = torch.optim.Optimizer.profile_hook_step(step)
    wrapped.hooked = True
    outside: Callable[..., Any] = torch._disable_dynamo(wrapped)  # type: ignore[attr-defined]
    return outside


class Engine(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that runs lamina's algorithms over its parameter groups.

    Subclasses give `algorithm` (all groups alike) or override `algorithm_for`, and may override
    `_update`, in which the weights change.
    """

    algorithm: ClassVar[Method | None] = None
    _kept_batches: KeptBatches
    #: the parameters of all groups as they were last seen, changed in place
    _seen_params: list[torch.Tensor]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._kept_batches = KeptBatches()
        self._seen_params = []
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_kept_batches"):  # a copy, or unpickled
            self._kept_batches = KeptBatches()
        if not hasattr(self, "_seen_params"):
            self._seen_params = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch."""
        super().add_param_group(param_group)
        self._follow_exchanged()

    def algorithm_for(self, group: dict[str, Any]) -> Algorithm:
        """The algorithm of a group."""
        if not isinstance(self.algorithm, Algorithm):
            raise PlanError(f"{type(self).__name__} has no rule for {group.get('name')!r}.")
        return self.algorithm

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
        self._update()
        return loss

    def _update(self) -> None:
        selected = self._collect(self.param_groups)
        kernels.apply(selected)
        self._store_new_state(selected)

    def _collect(self, groups: Sequence[dict[str, Any]]) -> list[Batch]:
        """One batch for each group that has gradients.

        Raises:
            MismatchError: a parameter does not fit its gradient or its state; all groups are
                compared before anything of any group is changed.
        """
        self._follow_exchanged()
        rows = [(group, *self._gather(group)) for group in groups]
        rows = [row for row in rows if row[1]]
        kept = [self._kept_batch(*row) for row in rows]
        changed = [row for row, batch in zip(rows, kept, strict=True) if batch is None]
        if changed:
            self._refuse_misfits(changed)
        return [
            self._batch(*row) if batch is None else batch
            for row, batch in zip(rows, kept, strict=True)
        ]

    def _kept_batch(
        self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch | None:
        """The batch of an earlier step, if its tensors are still the same and lie as they did."""
        known = self._kept_batches.by_group.get(id(group))
        if known is None or not known.holds(params, self._entries(group, params)):
            return None
        if not known.fits(grads):
            self._refuse_misfits([(group, params, grads)])
            known.accept(grads)
        batch = known.batch
        batch.grads = batch.known_grads = grads
        batch.hyper, batch.scale = group, None
        batch.prefer = preference(group)
        return batch

    def _follow_exchanged(self) -> None:
        """Let the state follow to tensors that took the place of others in the groups.

        `fully_shard`, and accelerate with it, make new parameters of the same shape; the state
        would stay with the old ones.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        known = self._seen_params
        if len(known) == len(params) and all(map(is_, params, known)):
            return
        if len(known) == len(params):
            now, before = set(map(id, params)), set(map(id, known))
            self._move_state(
                [
                    (place, old, new)
                    for place, (old, new) in enumerate(zip(known, params, strict=True))
                    if id(old) not in now and id(new) not in before
                ]
            )
        known[:] = params

    def _move_state(self, exchanged: Sequence[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        """Give new tensors the state of those whose place they took, laid out as they are.

        What has state already keeps it: its user has moved it.
        """
        moved: dict[torch.Tensor, dict[str, Any]] = {}
        for place, old, new in exchanged:
            if old not in self.state or self.state.get(new):
                continue
            if new.shape != old.shape:
                self._begin_anew(place, old, new)
                continue
            moved[new] = {
                key: laid_out_as(value, new) if _is_of_its_shape(value, old) else value
                for key, value in self.state[old].items()
            }
        self.state.update(moved)
        for _, old, new in exchanged:
            if new in moved:
                del self.state[old]

    def _begin_anew(self, place: int, old: torch.Tensor, new: torch.Tensor) -> None:
        """Meet a tensor of another shape in the place of one: as in torch, it begins anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, in torch's form."""
        self._follow_exchanged()
        return super().state_dict()

    def _batch(
        self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch:
        """A new batch, which is kept for the steps to come."""
        entries = self._entries(group, params)
        batch = self._new_batch(group, params, grads, entries)
        self._kept_batches.by_group[id(group)] = kernels.Kept(batch, entries)
        return batch

    def _entries(
        self, group: dict[str, Any], params: Iterable[torch.Tensor]
    ) -> list[dict[str, Any]]:
        """The state that the kernels update, by parameter."""
        return [self.state[param] for param in params]

    def _refuse_misfits(
        self, rows: Iterable[tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]]
    ) -> None:
        """Raise `MismatchError`, naming every parameter that these gradients cannot update."""
        found: list[Misfit] = []
        for group, params, grads in rows:
            entries = self._entries(group, params)
            if self._plainly_fit(group, params, grads, entries):
                continue
            for param, grad, entry in zip(params, grads, entries, strict=True):
                wrong = (
                    wrong_with_param(param),
                    self._wrong_with_state(group, param, entry),
                    wrong_with_grad(param, grad),
                )
                if any(wrong):
                    found.append(Misfit(*self._place_of(group, param), tuple(param.shape), *wrong))
        if found:
            raise MismatchError(message(found))

    def _plainly_fit(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        entries: list[dict[str, Any]],
    ) -> bool:
        """Whether a quick look tells that everything in a group fits."""
        return plainly_fit(params, grads, entries, self.algorithm_for(group).buffers)

    def _wrong_with_state(
        self, group: dict[str, Any], param: torch.Tensor, entry: dict[str, Any]
    ) -> list[str]:
        """In words, what of a parameter's state does not fit it."""
        return wrong_with_state(param, entry, self.algorithm_for(group).buffers)

    def _place_of(self, group: dict[str, Any], param: torch.Tensor) -> tuple[tuple[int, int], str]:
        """Where a parameter is, as group and position, and what errors call it."""
        index = next(i for i, each in enumerate(self.param_groups) if each is group)
        place = next(i for i, each in enumerate(group["params"]) if each is param)
        names = group.get("param_names")
        name = repr(names[place]) if names else f"number {place} of parameter group {index}"
        return (index, place), name

    def _gather(self, group: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The parameters of a group that have a gradient, and the gradients."""
        params: list[torch.Tensor] = []
        grads: list[torch.Tensor] = []
        for param in group["params"]:
            grad = param.grad
            if grad is not None and (param.requires_grad or self._is_due(param)):
                params.append(param)
                grads.append(grad)
        return params, grads

    def _is_due(self, param: torch.Tensor) -> bool:
        """Whether a gradient counts that a parameter with requires_grad=False has, as in torch."""
        return True

    def _drop_state(self, group: dict[str, Any]) -> None:
        """Release the state tensors of a group; its parameters begin again as at build."""
        self._kept_batches.by_group.pop(id(group), None)  # kept batches hold them too
        for param in group["params"]:
            # A new dict: a state dict that was taken before holds the old one.
            self.state[param] = self._initial_state(group, param)

    def _initial_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """The state of a parameter before its first update."""
        return initial_state(param)

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

    def _described(self, group: dict[str, Any], place: int) -> ParamInfo:
        """What patterns see of a parameter."""
        return described(group, place)

    def _restart(self, chosen: Sequence[tuple[dict[str, Any], torch.Tensor, int]]) -> None:
        """Exchange the state of parameters for the one they have before their first update."""
        for group, param, _ in chosen:
            self._kept_batches.by_group.pop(id(group), None)
            self.state[param] = self._initial_state(group, param)

    def _new_batch(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        entries: list[dict[str, Any]],
    ) -> Batch:
        algorithm = self.algorithm_for(group)
        names = self._names(group, params)
        for index, param in enumerate(params) if algorithm.unit != "element" else ():
            if why := unit_refusal(algorithm.name, algorithm.unit, param):
                raise PlanError(f"parameter {names[index] if names else index!r} {why}.")
        for param, entry in zip(params, entries, strict=True):
            _follow(algorithm, param, entry)
            self._ensure_state(algorithm, param, entry, group)
        keys = [key for key in algorithm.buffers if any(key in entry for entry in entries)]
        return Batch(
            algorithm,
            params,
            grads,
            {key: [entry.get(key) for entry in entries] for key in keys},
            [entry["step"] for entry in entries],
            group,
            names=names,
            prefer=preference(group),
        )

    @staticmethod
    def _ensure_state(
        algorithm: Algorithm, param: torch.Tensor, entry: dict[str, Any], hyper: dict[str, Any]
    ) -> None:
        """Allocate what is missing of a parameter's state, at its first update."""
        if "step" not in entry:
            entry["step"] = new_step(param)
        if entry.keys() >= algorithm.init(_EMPTY, hyper).keys():
            return
        dtype = state_dtype_of(param, hyper)
        for key, tensor in algorithm.init(param, hyper).items():
            if key not in entry:
                entry[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor

    @staticmethod
    def _names(group: dict[str, Any], params: Sequence[torch.Tensor]) -> list[str]:
        names = group.get("param_names")
        if not names:
            return []
        by_id = {id(param): name for param, name in zip(group["params"], names, strict=True)}
        return [by_id[id(param)] for param in params]

    def _store_new_state(self, batches: Sequence[Batch]) -> None:
        """Store the state tensors that an update brought into being."""
        for batch in batches:
            if batch.has_new_state:
                for key, column in batch.columns.items():
                    for param, tensor in zip(batch.params, column, strict=True):
                        if tensor is not None:
                            self.state[param][key] = tensor
                batch.has_new_state = False

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: as in torch, not the hooks nor a patched `step`."""
        return {"defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}


def _follow(algorithm: Algorithm, param: torch.Tensor, entry: dict[str, Any]) -> None:
    """Bring state to where its parameter lies now: its device, its order in memory.

    The dtype stays, as with `state_dtype`.
    """
    for key, value in entry.items():
        if key == "step":
            step = torch.as_tensor(value)
            dtype = step.dtype if step.is_floating_point() else torch.float32
            entry[key] = step.to(kernels.step_device(param), dtype).reshape(())
        elif key not in algorithm.buffers or value.is_sparse:
            continue
        elif value.device != param.device or value.stride() != param.stride():
            entry[key] = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
            entry[key].copy_(value)


def _is_of_its_shape(value: Any, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == param.shape


def initial_state(param: torch.Tensor, steps: int = 0) -> dict[str, Any]:
    """The state of a parameter before any tensor is needed: the count of its updates."""
    return {"step": new_step(param).fill_(steps)}


def new_step(param: torch.Tensor) -> torch.Tensor:
    """The step count of a parameter that was never updated."""
    return torch.zeros((), dtype=torch.float32, device=kernels.step_device(param))


def preference(group: Mapping[str, Any]) -> str | None:
    """The kernel that a group asks for with torch's `fused` and `foreach`."""
    fused, foreach = group.get("fused"), group.get("foreach")
    if fused:
        return "fused"
    if foreach:
        return "foreach"
    return "readable" if fused is False or foreach is False else None

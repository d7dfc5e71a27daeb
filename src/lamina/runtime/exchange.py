"""An optimizer's parameters stay those of its model when FSDP exchanges them, or cuts them up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._util.sharding import (
    FlatPart,
    Shards,
    flat_parts,
    is_flattened,
    lasting_parameters,
    tell_flat_parameters,
    unit_refusal,
)
from .._util.tensors import is_dtensor
from ..algorithms.registry import method_of, optimizer_name
from ..errors import MismatchError, PlanError
from ..guests.build import works_on_parts
from ..model.parameters import Owned
from ..resolve.resolved import Cell, Resolved

Groups = Sequence[dict[str, Any]]
_FSDP1 = "FSDP1 (FullyShardedDataParallel)"


class BeforeForward:
    """A hook on a model that is called once, before the first forward, and then removes itself.

    It has what it calls by a weak reference: a copy of the model does not copy an optimizer, and
    its hook does nothing.
    """

    def __init__(self, model: nn.Module, call: Callable[[], None]) -> None:
        self._call: weakref.WeakMethod[Any] | None = weakref.WeakMethod(call)
        self._handle: Any = model.register_forward_pre_hook(self, prepend=True)

    def __call__(self, *_: Any) -> None:
        """Call, and remove the hook."""
        if torch.compiler.is_compiling():  # traced, it would be called for ever: the step settles
            return
        if self._call is None:  # the hook of a copy
            return
        self._handle.remove()
        if (call := self._call()) is not None:
            call()

    def __getstate__(self) -> dict[str, Any]:
        return {"_call": None, "_handle": None}


class Exchange:
    """Looks at what wrappers have done to the parameters of a model since the last time.

    FSDP2 puts new parameters into the model, which the optimizer must adopt; FSDP1 leaves each
    process a part of the old ones, so that what needs whole tensors is refused and norms are put
    together. A look costs some microseconds for each parameter, so that only the first step takes
    one, and one in which gradients are missing: what was exchanged has none.
    """

    def __init__(self, model: nn.Module, resolved: Resolved, owned: Sequence[Owned]) -> None:
        places = {item.info.name: item.places for item in owned}
        self.model = model
        self._resolved = resolved
        #: of each parameter, the module that holds it, and under which attribute
        self._places = [
            [places[info.name][0] for info in cell.parameters] for cell in resolved.cells
        ]
        #: how many gradients came in the last step, 0 before the first
        self.gradients = 0
        #: how all parameters, and those of each clip scope, are spread over processes by FSDP1
        self.shards: Shards | None = None
        self.shards_by_scope: dict[int, Shards] = {}
        #: what FSDP1 said of the parameters, which the groups keep alive
        self._flat: dict[int, FlatPart] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return all but process groups, which cannot be copied; the next step looks again."""
        anew: dict[str, Any] = {"gradients": 0, "shards": None, "shards_by_scope": {}, "_flat": {}}
        return self.__dict__ | anew

    def adopt(self, groups: Groups) -> bool:
        """Put the sharded parameters of the model into the groups, for those they were made of.

        Returns:
            Whether there were any.

        Raises:
            MismatchError: if something else has put other tensors into a group, or taken some out.
        """
        _check_counts(groups, self._places)
        lasting = lasting_parameters(self.model)
        found = False
        for group, rows in zip(groups, self._places, strict=True):
            params = group["params"]
            for index, (module, attribute) in enumerate(rows):
                live = lasting.get((id(module), attribute), module._parameters.get(attribute))
                if live is not None and live is not params[index] and is_dtensor(live):
                    params[index] = live
                    found = True
        return found

    def show_flags(self, groups: Groups) -> None:
        """Let FSDP, in whose forward the flags were set, take notice of them."""
        tell_flat_parameters(self.model, [param for group in groups for param in group["params"]])
        for group, rows in zip(groups, self._places, strict=True):
            for param, (module, attribute) in zip(group["params"], rows, strict=True):
                shown = module._parameters.get(attribute)
                if shown is not None and shown is not param and is_dtensor(param):
                    shown.requires_grad_(param.requires_grad)

    def settle(self, groups: Groups, at_build: bool = False) -> None:
        """Refuse what cannot be right with the parameters as they are, and spread the norms.

        Raises:
            PlanError: what needs whole tensors has parts of them, or cannot know the others.
        """
        params = [param for group in groups for param in group["params"]]
        self._refuse_vector(groups)
        self._refuse_lost(groups)
        self.shards, self.shards_by_scope = None, {}
        if not any(map(is_flattened, params)):
            return
        flat = self._flat_parts(params)
        for cell, group in zip(self._resolved.cells, groups, strict=True):
            if cell.windows:
                self._refuse_parts(cell, group, flat, at_build)
        self._spread(groups, flat)

    def _flat_parts(self, params: Sequence[torch.Tensor]) -> dict[int, FlatPart]:
        """Return what FSDP1 says of the parameters; wrappers around the model are searched once."""
        known = self._flat | flat_parts(self.model)
        if any(is_flattened(param) and id(param) not in known for param in params):
            known = flat_parts(self.model, params)
        self._flat = {id(param): known[id(param)] for param in params if id(param) in known}
        return self._flat

    def _refuse_vector(self, groups: Groups) -> None:
        for cell, group in zip(self._resolved.cells, groups, strict=True):
            method = method_of(cell.optimizer)
            if method is None or not cell.windows:
                continue
            for info, param in zip(cell.parameters, group["params"], strict=True):
                if why := unit_refusal(method.name, method.unit, param):
                    raise PlanError(f"{info.name!r} {why}.")

    def _refuse_lost(self, groups: Groups) -> None:
        """Raise for parameters that FSDP1 has put into a flat one, in place of them."""
        for cell, rows in zip(self._resolved.cells, self._places, strict=True):
            for info, (module, attribute) in zip(cell.parameters, rows, strict=True):
                if attribute in module._parameters or not _has_flat(self.model):
                    continue
                raise PlanError(
                    f"{info.name!r} is no parameter any more: {_FSDP1} wrapped the model with "
                    "use_orig_params=False after the optimizer was built, which updates what is "
                    "not in the model. Pass use_orig_params=True, or build from the plan on the "
                    "wrapped model."
                )

    def _refuse_parts(
        self, cell: Cell, group: dict[str, Any], flat: Mapping[int, FlatPart], at_build: bool
    ) -> None:
        scope = self._resolved.scopes[cell.scope] if cell.scope is not None else None
        operations = [operation for operation, _ in scope.operations] if scope else []
        needs_norm = bool(operations) or self._resolved.plan.nonfinite_check == "all"
        for info, param in zip(cell.parameters, group["params"], strict=True):
            if not is_flattened(param):
                continue
            part = flat.get(id(param))
            if part is None and (at_build or needs_norm):
                raise PlanError(
                    f"{info.name!r} is cut up by {_FSDP1}, and the wrapper, which alone knows how, "
                    "is neither in the model given to the plan nor around it. Build the plan on "
                    "the wrapper itself, after wrapping."
                )
            for operation in operations:
                if operation.whole or (operation.each and _is_flat(param)):
                    raise PlanError(
                        f"{operation!r} needs whole tensors, and {_FSDP1} gives each process a "
                        f"part of {info.name!r}; use FSDP2 (fully_shard), or clip_norm, "
                        "clip_value or scale."
                    )
            if method_of(cell.optimizer) is None and not works_on_parts(cell):
                raise PlanError(
                    f"the third-party optimizer {optimizer_name(cell.optimizer)} updates a tensor "
                    "in "
                    f"parts otherwise than as a whole, and {_FSDP1} gives each process a part of "
                    f"{info.name!r}; use FSDP2 (fully_shard), or an optimizer that treats each "
                    "number by itself, such as AdamW."
                )

    def _spread(self, groups: Groups, flat: Mapping[int, FlatPart]) -> None:
        """Note which process group has the other parts, for each scope and for all together."""
        known: dict[str, Any] = {}
        scopes: dict[int, dict[str, Any]] = {}
        tensors = [param for group in groups for param in group["params"]]
        for cell, group in zip(self._resolved.cells, groups, strict=True):
            for info, param in zip(cell.parameters, group["params"], strict=True):
                part = flat.get(id(param))
                known[info.name] = None if part is None else part.group
                if cell.scope is not None:
                    scopes.setdefault(cell.scope, {})[info.name] = known[info.name]
        if not any(group is not None for group in known.values()):
            return
        self.shards = Shards(known, tensors)
        self.shards_by_scope = {scope: Shards(names, tensors) for scope, names in scopes.items()}


def _is_flat(param: torch.Tensor) -> bool:
    """Return whether this is a parameter of FSDP1 that is made of several."""
    return hasattr(param, "_unpadded_unsharded_size")


def _has_flat(model: nn.Module) -> bool:
    return any("_flat_param" in module._parameters for module in model.modules())


def _check_counts(groups: Groups, places: Sequence[Sequence[Any]]) -> None:
    """Raise `MismatchError` for a group that has not as many tensors as it was built with."""
    for group, rows in zip(groups, places, strict=True):
        if len(group["params"]) != len(rows):
            raise MismatchError(
                f"the group {group.get('name', '')!r} was built with {len(rows)} parameters and "
                f"has {len(group['params'])} now: something has put other tensors into it. ZeRO of "
                "DeepSpeed does that from stage 1 on, and a plan cannot work with it: use stage 0, "
                "DDP or FSDP2."
            )

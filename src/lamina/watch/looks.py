"""Look at the models of a script while it trains: what is in no optimizer, replaced, or drifts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from weakref import ReferenceType

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .._util.sharding import local_part
from .._util.tensors import is_dtensor
from ..model.finding import Finding, attribute_findings
from ..model.parameters import Owned, is_locked, observe
from ..model.ties import broken, tie_again
from .names import Root, Statistics
from .sightings import Sightings
from .static import optimizer_findings, untied
from .steps import StepWatch


def is_look(step: int) -> bool:
    """Return whether the whole model is looked at before a step: often at first, then rarely."""
    return step < 6 or (step < 100 and step % 10 == 0) or step % 200 == 0


class ModelLooks:
    """Looks at the models that are known.

    Args:
        seen: where what is found goes.
    """

    def __init__(self, seen: Sightings) -> None:
        self._seen = seen
        self._trained: dict[str, bool] = {}

    def look(
        self,
        watch: StepWatch,
        optimizer: torch.optim.Optimizer,
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        """Compare the models with what the optimizers hold, before a step of one of them."""
        held = {
            id(param)
            for each in optimizers
            for group in each.param_groups
            for param in group["params"]
        }
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        known: list[Owned] = []
        for root, model, owned in self._seen.models.live():
            if not any(id(item.tensor) in own for item in owned):
                continue
            known.extend(owned)
            if not watch.is_plan:
                self._look_outside(owned, held)
                self._look_for_replaced(root.first, owned, own, held)
            self._look_for_broken(root.ties, owned)
            _look_at_mode(root, model, watch.steps)
            seen = observe(model, owned)
            for finding in (*attribute_findings(seen, held), *untied(model)):
                self._seen.find(finding)
            self._note_thaws(watch, owned)
        if not watch.is_plan and watch.steps < 2:
            names = {id(item.tensor): item.info.name for item in known}
            for finding in optimizer_findings(optimizer, names, known):
                self._seen.find(finding)

    def _look_outside(self, owned: Sequence[Owned], held: set[int]) -> None:
        for item in owned:
            name, param = item.info.name, item.tensor
            if id(param) in held or not param.requires_grad:
                self._seen.outside.pop(name, None)
            elif param.grad is not None:
                self._seen.outside[name] = self._seen.outside.get(name, 0) + 1

    def _look_for_replaced(
        self,
        first: Mapping[str, ReferenceType[torch.Tensor]],
        owned: Sequence[Owned],
        own: set[int],
        held: set[int],
    ) -> None:
        now = {name: item.tensor for item in owned for name in item.info.names}
        for name, ref in first.items():
            old, new = ref(), now.get(name)
            if old is None or new is None or new is old or is_dtensor(new) or is_dtensor(old):
                continue
            if id(old) in own and id(new) not in held and new.requires_grad:
                self._seen.replaced[name] = None

    def _look_for_broken(self, ties: Iterable[tuple[str, ...]], owned: Sequence[Owned]) -> None:
        live = {name: item for item in owned for name in item.info.names}
        for names in ties:
            parts = broken(names, live)
            if len(parts) > 1:
                self._seen.find(
                    Finding(
                        "tie-broken",
                        f"{' = '.join(names)} were one parameter; now they are "
                        f"{' and '.join(' = '.join(part) for part in parts)}.",
                        f"Call {tie_again(parts)} right after what broke it, and build the "
                        "optimizer again.",
                    )
                )

    def _note_thaws(self, watch: StepWatch, owned: Sequence[Owned]) -> None:
        """Record what began or ceased to train since the last look."""
        changed: dict[bool, list[str]] = {True: [], False: []}
        for item in owned:
            trains = item.tensor.requires_grad
            if self._trained.setdefault(item.info.name, trains) != trains:
                changed[trains].append(item.info.name)
                self._trained[item.info.name] = trains
        for trains, names in changed.items():
            if names:
                kind = "thaw" if trains else "freeze"
                self._seen.record.event(
                    watch.steps, kind, f"{len(names)} parameters from {names[0]} on"
                )

    def look_at_statistics(self) -> None:
        for root in self._seen.models.roots:
            for item in root.statistics:
                _look_at(item)


def _look_at_mode(root: Root, model: nn.Module, step: int) -> None:
    """Count in how many looks in a row all that eval mode switches off was off."""
    if model.training or not _rests_in_eval(model):
        root.eval_looks = 0
        return
    if not root.eval_looks:
        root.eval_since = step
    root.eval_looks += 1


def _rests_in_eval(model: nn.Module) -> bool:
    """Return whether a model has dropout or running statistics, all of them in eval mode."""
    switched = [
        module.training
        for module in model.modules()
        if (isinstance(module, _DropoutNd) and module.p > 0)
        or isinstance(getattr(module, "running_mean", None), torch.Tensor)
    ]
    return bool(switched) and not any(switched)


def _look_at(item: Statistics) -> None:
    """Count in how many looks in a row a module was frozen and its statistics moved."""
    module = item.module()
    # The kernels write the mean unseen by its version; the count beside it is written in Python.
    count = None if module is None else getattr(module, "num_batches_tracked", None)
    if module is None or count is None:
        return
    params = list(module.parameters())
    frozen = bool(params) and not any(param.requires_grad for param in params)
    # Weights that move without an optimizer are an average, whose statistics follow by design.
    version = count._version
    weights = [local_part(param.detach()).flatten()[:4].tolist() for param in params[:2]]
    if frozen and module.training and not is_locked(module) and weights == item.weights:
        item.frozen_looks += 1
        item.moved_looks += version > item.version
    else:
        item.frozen_looks = item.moved_looks = 0
    item.version, item.weights = version, weights

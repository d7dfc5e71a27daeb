"""What trains now and later, and whether what is frozen is still what it was."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..optimizer.optimizer import Optimizer
from ..resolve.timeline import values_at
from .lineage import FIRST_BIT, storage_key
from .profile import named_tensors


class FrozenWatch:
    """Follows the parameters and buffers of a model, each by a bit.

    Args:
        model: the model.
        optimizer: that carries out its plan.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        #: the bit of each parameter and buffer, by each of its names
        self.bits: dict[str, int] = {}
        self._find()

    def _find(self) -> None:
        by_storage: dict[int, int] = {}
        self.bits.clear()
        self._tensors: list[tuple[torch.Tensor, int]] = []
        for name, tensor in named_tensors(self._model):
            storage = storage_key(tensor) or id(tensor)
            known = by_storage.get(storage)
            if known is None:
                known = by_storage[storage] = FIRST_BIT << len(by_storage)
                self._tensors.append((tensor, known))
            self.bits[name] = known
        self._places = [
            (held, name, tensor)
            for module in self._model.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
            if tensor is not None
        ]
        bit_of = {id(tensor): bit for tensor, bit in self._tensors}
        self._groups = [
            sum({bit_of.get(id(param), 0) for param in group["params"]})
            for group in self._optimizer.param_groups
        ]
        self._params = [pair for pair in self._tensors if isinstance(pair[0], nn.Parameter)]
        self._seen = self._look()

    def trained(self) -> int:
        """Return the bits of what trains in the step that comes next, by plan or by hand."""
        found = 0
        for param, bit in self._params:
            if param.requires_grad:
                found |= bit
        for bits, active in zip(self._groups, self._optimizer._freezer.active, strict=True):
            if active:
                found |= bits
        return found

    def later(self) -> list[int]:
        """Return the bits of what trains after each thaw and freeze that the plan foretells."""
        optimizer, clock = self._optimizer, self._optimizer.clock
        feedback = optimizer._feedback
        moments = {
            int(moment)
            for cell in optimizer.resolved.cells
            for window in feedback.windows(cell)
            for moment in window
            if clock < moment < math.inf
        }
        found = []
        for moment in sorted(moments):
            values = values_at(optimizer.resolved, moment, feedback)
            pairs = enumerate(self._groups)
            found.append(sum(bits for index, bits in pairs if bool(values.active(index))))
        return found

    def changed(self) -> list[int]:
        """Return the bits of frozen tensors that are not what they were at the last pass."""
        if any(held.get(name) is not tensor for held, name, tensor in self._places):
            self._find()
            return [~0]
        now = self._look()
        if now == self._seen:
            return []
        trained = self.trained()
        pairs = zip(self._tensors, now, self._seen, strict=True)
        found = [bit for (_, bit), one, other in pairs if one != other and not bit & trained]
        self._seen = now
        return found

    def _look(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor, _ in self._tensors]

"""What trains now and later, and whether what is frozen is still what it was."""

from __future__ import annotations

import functools
import hashlib
import math
import operator

import torch
from torch import nn

from .._util.blocks import is_dense
from ..model.reducers import has_zero_gradients
from ..optimizer.optimizer import Optimizer
from ..resolve.timeline import values_at
from .keys import as_bytes, row_bytes
from .lineage import FIRST_BIT, storage_key
from .profile import named_tensors

#: the types of a module's attributes that are settings of it
_PLAIN = (bool, int, float, str)


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
        self._settings: list[object] = []
        self._public = [
            (held, name)
            for module in self._model.modules()
            for held in (vars(module),)
            for name, value in held.items()
            # The key of an entry has the mode; what begins with _ is for bookkeeping.
            if isinstance(value, _PLAIN) and name != "training" and not name.startswith("_")
        ]
        bit_of = {id(tensor): bit for tensor, bit in self._tensors}
        self._groups = [
            sum({bit_of.get(id(param), 0) for param in group["params"]})
            for group in self._optimizer.param_groups
        ]
        self._params = [pair for pair in self._tensors if isinstance(pair[0], nn.Parameter)]
        self._addresses = [tensor.data_ptr() for tensor, _ in self._tensors]
        self._classes = [type(module).__qualname__ for module in self._model.modules()]
        self._digests: dict[int, tuple[int, bytes]] = {}
        self._settle(self.trained())

    def trained(self) -> int:
        """Return the bits of what trains in the step that comes next, by plan or by hand."""
        found = 0
        for param, bit in self._params:
            # The plan keeps the flag on of what a reducer holds, and its gradients at zero.
            if param.requires_grad and not has_zero_gradients(param):
                found |= bit
        for bits, active in zip(self._groups, self._optimizer._freezer.active, strict=True):
            if active:
                found |= bits
        return found

    def held(self) -> int:
        """Return the bits of frozen parameters whose gradients a reducer waits for."""
        found = 0
        for param, bit in self._params:
            if param.requires_grad and has_zero_gradients(param):
                found |= bit
        return found

    def params_of(self, bits: int) -> list[torch.Tensor]:
        """Return the parameters of some bits."""
        return [param for param, bit in self._params if bit & bits]

    def later(self) -> list[tuple[int, int]]:
        """Return the step of each thaw and freeze to come, and the bits of what trains then."""
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
            trains = sum(bits for index, bits in pairs if bool(values.active(index)))
            found.append((moment, trains))
        return found

    def changed(self) -> int:
        """Return the bits of frozen tensors that are not what they were at the last pass.

        Returns:
            -1, all bits, if a tensor was exchanged for another or lies elsewhere.
        """
        exchanged = any(held.get(name) is not tensor for held, name, tensor in self._places)
        if exchanged or [tensor.data_ptr() for tensor, _ in self._tensors] != self._addresses:
            self._find()
            return -1
        found = self._frozen.changed()
        trained = self.trained()
        if found or trained != self._trained:
            self._settle(trained)
        return found

    def note_settings(self) -> None:
        """Remember the settings of all modules, such as `eps`, as a pass has left them."""
        self._settings = self._read_settings()

    def has_other_settings(self) -> bool:
        """Return whether a setting was changed since then, so not by the modules themselves."""
        return bool(self._settings) and self._settings != self._read_settings()

    def _read_settings(self) -> list[object]:
        return [held.get(name) for held, name in self._public]

    def _settle(self, trained: int) -> None:
        self._trained = trained
        self._frozen = _Snapshot([pair for pair in self._tensors if not pair[1] & trained])

    def fingerprint(self, mask: int) -> str:
        """Return a hash of the tensors of some bits, and of the classes that compute with them."""
        whole = hashlib.blake2b(digest_size=16)
        whole.update(f"{torch.__version__}{self._classes}".encode())
        for place, (tensor, bit) in enumerate(self._tensors):
            if bit & mask:
                whole.update(self._digest(place, tensor))
        return whole.hexdigest()

    def _digest(self, place: int, tensor: torch.Tensor) -> bytes:
        known = self._digests.get(place)
        if known is None or known[0] != tensor._version:
            data = hashlib.blake2b(row_bytes(tensor[None])[0], digest_size=16).digest()
            known = self._digests[place] = (tensor._version, data)
        return known[1]


#: about how many elements of each tensor are compared before each pass
_SAMPLE = 64


class _Snapshot:
    """What frozen tensors were: their versions, and a sample of the elements of each.

    A write through `.data` does not count as a new version, but mostly changes many elements.
    """

    def __init__(self, tensors: list[tuple[torch.Tensor, int]]) -> None:
        self._tensors = tensors
        self._versions = [tensor._version for tensor, _ in tensors]
        self._views: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        self._bits: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for tensor, bit in tensors:
            kind = (tensor.dtype, tensor.device)
            for view in _sample(tensor):
                self._views.setdefault(kind, []).append(view)
                self._bits.setdefault(kind, []).extend([bit] * len(view))
        self._values = self._look()

    def changed(self) -> int:
        """Return the bits of tensors that changed."""
        found = 0
        versions = [tensor._version for tensor, _ in self._tensors]
        if versions != self._versions:
            rows = zip(self._tensors, versions, self._versions, strict=True)
            for (_, bit), version, earlier in rows:
                found |= bit if version != earlier else 0
        for kind, now in self._look().items():
            before = self._values[kind]
            if not torch.equal(now, before):
                differs = (now != before).any(1).tolist()
                pairs = zip(self._bits[kind], differs, strict=True)
                found |= functools.reduce(operator.or_, (bit for bit, other in pairs if other), 0)
        return found

    def _look(self) -> dict[tuple[torch.dtype, torch.device], torch.Tensor]:
        return {kind: as_bytes(torch.cat(views)) for kind, views in self._views.items()}


def _sample(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return views, of one dimension, of elements that lie evenly over a tensor."""
    bare, count = tensor.detach(), tensor.numel()
    if not count:
        return []
    if not is_dense(bare):
        places = [[0] * bare.ndim, [length // 2 for length in bare.shape], [-1] * bare.ndim]
        return [bare[tuple(place)].reshape(1) for place in places]
    apart = (count // _SAMPLE) | 1  # odd, so as not to stay within the same columns
    return [bare.as_strided((-(-count // apart),), (apart,), bare.storage_offset())]

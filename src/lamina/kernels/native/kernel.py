"""The kernel of compiled loops: one call for each algorithm, whatever the number of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch

from ..._util.blocks import PLAIN, is_dense
from ..._util.tensors import waits
from ...algorithms.base import Batch, state_dtype_of
from ...compiled.chunks import ELEMENTS
from ...compiled.loader import failure, unavailable
from ..base import Kernel, short
from .arrays import Form, overlap, written_by
from .batched import Step, empty_calls
from .loops import LOOPS

#: why the loops of a form cannot be compiled, or "", for all that were tried
_FAILURES: dict[Form, str] = {}


@final
class Native(Kernel):
    """All tensors of all groups in one call, on the threads of the CPU.

    Addresses and sizes of tensors are put into a table, which is used until a tensor changes. The
    clip factor is multiplied onto each gradient where it is read.
    """

    name: ClassVar[str] = "native"
    about: ClassVar[str] = "loops compiled by Numba, one pass over memory for all groups"
    counts_steps: ClassVar[bool] = True

    def refusal(self, batch: Batch) -> str:
        """Refuse what is not on the CPU, and memory that a plain loop cannot walk."""
        if not all(param.is_cpu for param in batch.params) or waits(batch.params[0].device):
            return "parameters are not on the CPU"
        if type(batch.algorithm) not in LOOPS:
            return f"there is no compiled form of {batch.algorithm.name}"
        if reason := unavailable():
            return reason
        for index in range(len(batch.params)):
            if reason := _tensor_refusal(batch, index):
                return f"{batch.name_of(index)} {reason}"
        if overlap(written_by(batch)):
            return "two tensors that it writes have memory in common"
        form = Form.of(batch)
        if form not in _FAILURES:
            _FAILURES[form] = failure(empty_calls(form, batch))
        return _FAILURES[form]

    def ready(self, batch: Batch) -> bool:
        """Accept gradients of the dtype and layout of their parameters."""
        dtype = batch.params[0].dtype
        return all(
            grad.dtype is dtype
            and grad.layout is torch.strided
            and grad.stride() == param.stride()
            and type(grad) in PLAIN
            for param, grad in zip(batch.params, batch.grads, strict=True)
        )

    def run(self, batches: Sequence[Batch]) -> None:
        """Update all batches; their steps are counted here."""
        step = batches[0].prepared
        if isinstance(step, Step) and step.holds(batches) and step.run(batches):
            return
        step = batches[0].prepared = Step(batches)
        step.run(batches)


def _tensor_refusal(batch: Batch, index: int) -> str:
    param = batch.params[index]
    if type(param) not in PLAIN or param.layout is not torch.strided:
        return f"is a {type(param).__name__}"
    if param.dtype not in ELEMENTS:
        return f"is {short(param.dtype)}"
    if not param.is_contiguous() and not is_dense(param):
        return "is not contiguous"
    wanted = state_dtype_of(param, batch.hyper)
    if wanted not in ELEMENTS or (wanted is torch.float64) != (param.dtype is torch.float64):
        return f"is {short(param.dtype)} and its state {short(wanted)}"
    if reason := _state_refusal(batch, index, wanted):
        return reason
    if param.data_ptr() % param.element_size():
        return "does not lie at a multiple of its element size in memory"
    step = batch.steps[index]
    return "" if step.dtype is torch.float32 and step.is_cpu else "has a step count of another kind"


def _state_refusal(batch: Batch, index: int, wanted: torch.dtype) -> str:
    param = batch.params[index]
    for key, column in batch.columns.items():
        value = column[index]
        if value is None:
            continue
        if type(value) not in PLAIN or value.layout is not torch.strided:
            return f"and its {key} is not a plain dense tensor"
        if value.stride() != param.stride():
            return f"and its {key} differ in their layout in memory"
        if key in batch.algorithm.buffers and value.dtype is not wanted:
            return f"has its {key} in {short(value.dtype)}, where {short(wanted)} is set"
        if value.data_ptr() % value.element_size():
            return f"and its {key} do not lie at multiples of their element sizes in memory"
    return ""

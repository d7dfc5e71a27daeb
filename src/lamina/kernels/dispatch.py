"""The one place that picks a kernel, says why, and lets it work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch

from ..algorithms.base import Batch
from ..errors import PlanError, did_you_mean
from .base import Kernel
from .blockwise import Blockwise
from .foreach import Foreach
from .fused import Fused
from .masked import give_back, part_of, run, update
from .native import Native
from .readable import Readable
from .triton import Triton

#: the fastest first; each is exact where it does not refuse
KERNELS: tuple[Kernel, ...] = (
    Native(),
    Fused(True),
    Fused(False),
    Triton(),
    Foreach(),
    Blockwise(),
    Readable(),
)
READABLE = KERNELS[-1]
#: wrapped once: an operator over many scalars on the CPU would wrap a 1.0 for each of them
_ONE = torch.tensor(1.0, device="cpu")


class Choice(NamedTuple):
    """A kernel chosen for a batch, and the preference it was chosen under."""

    prefer: str | None
    kernel: Kernel
    reason: str


#: batches by the kernel that is to update them
KernelPlan = dict[Kernel, list[Batch]]


def apply(batches: Sequence[Batch], prefer: str | None = None) -> None:
    """Update all batches, in place and without autograd: `assign` and `carry_out`."""
    with torch.no_grad():
        carry_out(assign(batches, prefer))


def assign(batches: Sequence[Batch], prefer: str | None = None) -> KernelPlan:
    """Choose the kernels of all batches; nothing is changed.

    Args:
        batches: all groups of one algorithm (several algorithms are fine too).
        prefer: the name of the kernel to use where it can be: "native", "fused",
            "triton", "foreach", "blockwise", "readable"; it goes before the preference of a batch.

    Raises:
        PlanError: a gradient is sparse and the rule is not made for that.
    """
    work: KernelPlan = {}
    last, its = None, []
    for batch in batches:
        if batch.params:
            kernel = choose(batch, prefer)[0]
            if kernel is not last:
                last, its = kernel, work.setdefault(kernel, [])
            its.append(batch)
    return work


def carry_out(work: KernelPlan) -> None:
    """Update all batches, in place; their steps are counted. To be called without autograd."""
    done: list[Batch] = []
    for kernel, batches in work.items():
        try:
            if not kernel.counts_steps:
                _count([step for batch in batches for step in batch.steps])
            run(kernel, batches)
        except Exception as error:
            error.add_note(_half_done(kernel, batches, done))
            raise
        done += batches
    for batch in done:
        if batch.has_new_state:
            batch.kernel = None  # it was chosen before this state was there


def _half_done(kernel: Kernel, batches: Sequence[Batch], done: Sequence[Batch]) -> str:
    called, before = (
        ", ".join(repr(batch.hyper.get("name", batch.algorithm.name)) for batch in each)
        for each in (batches, done)
    )
    return (
        f"The {kernel.name} kernel failed on the groups {called}: their step was counted, their "
        f"weights may be updated in part. Updated before them: {before or 'none'}."
    )


def choose(batch: Batch, prefer: str | None = None) -> tuple[Kernel, str]:
    """Return the kernel that updates this batch in this step, and why it is this one."""
    prefer = prefer or batch.prefer
    choice = batch.kernel
    if choice is None or choice.prefer != prefer:
        choice = batch.kernel = _choose(batch, prefer)
    known = batch.grads is batch.known_grads  # unless a gradient operation made others
    if known and batch.suited is not None and batch.suited[0] is choice:
        suited: Choice = batch.suited[1]
    else:
        suited = choice if _is_ready(choice.kernel, batch) else _instead_of(choice, batch)
        batch.suited = (choice, suited) if known else None
    return suited.kernel, suited.reason


def _refusal(kernel: Kernel, batch: Batch) -> str:
    """Return why a kernel cannot update these tensors; the fast ones read memory as it is."""
    for index, param in enumerate(batch.params):
        if kernel is not READABLE and param.is_neg():
            return f"{batch.name_of(index)} is a view that torch negates when it reads it"
    return kernel.refusal(batch)


def _is_ready(kernel: Kernel, batch: Batch) -> bool:
    """Return whether a kernel can read the gradients of this step."""
    if kernel is not READABLE and any(map(torch.Tensor.is_neg, batch.grads)):
        return False
    return kernel.ready(batch)


def _instead_of(choice: Choice, batch: Batch) -> Choice:
    """Choose the next best kernel for gradients that the chosen one cannot take."""
    why = (
        "in this step a gradient is sparse, or of another dtype or layout than its parameter, or a "
        "view that torch negates when it reads it"
    )
    for kernel in KERNELS[:-1]:
        if kernel is not choice.kernel and not _refusal(kernel, batch) and _is_ready(kernel, batch):
            break
    else:
        _refuse_sparse(batch)
        kernel = READABLE
    reason = f"{kernel.name}: {kernel.about}; not {choice.kernel.name}: {why}"
    return Choice(choice.prefer, kernel, reason)


def reason_of(batch: Batch) -> str:
    """Return the kernel of the last update of a batch, and why it was this one."""
    choice: Choice | None = batch.suited[1] if batch.suited else batch.kernel
    return "none yet: it was not updated" if choice is None else choice.reason


def step_device(param: torch.Tensor) -> torch.device:
    """Return the device for a step count, so that counting never waits."""
    return param.device if param.device.type in ("cuda", "xpu") else torch.device("cpu")


def _choose(batch: Batch, prefer: str | None) -> Choice:
    names = list(dict.fromkeys(kernel.name for kernel in KERNELS))
    if prefer is not None and prefer not in names:
        raise PlanError(
            f"There is no kernel {prefer!r}; there are {', '.join(names)}."
            f"{did_you_mean(prefer, names)}"
        )
    parts = _alike(batch)
    if len(parts) > 1:
        split = Split(batch, parts, prefer)
        return Choice(prefer, split, split.reason)
    refused: dict[str, str] = {}
    for kernel in sorted(KERNELS, key=lambda kernel: kernel.name != prefer):
        refusal = _refusal(kernel, batch)
        if not refusal:
            refused.pop(kernel.name, None)  # it has two forms, and the other one refused
            notes = "".join(f"; not {name}: {why}" for name, why in refused.items())
            return Choice(prefer, kernel, f"{kernel.name}: {kernel.about}{notes}")
        refused[kernel.name] = refusal
    raise AssertionError("the readable kernel refuses nothing")


def _alike(batch: Batch) -> list[list[int]]:
    """Group positions in a batch by device, dtype and mesh, which operators share."""
    groups: dict[tuple[torch.device, torch.dtype, Any], list[int]] = {}
    for index, param in enumerate(batch.params):
        mesh = getattr(param, "device_mesh", None)  # of a DTensor; an operator takes one of them
        groups.setdefault((param.device, param.dtype, mesh), []).append(index)
    return list(groups.values())


@final
class Split(Kernel):
    """A batch of several dtypes, devices or meshes, as one batch for each."""

    name: ClassVar[str] = "split"
    about: ClassVar[str] = "one part for each dtype and device"
    counts_steps: ClassVar[bool] = True
    masks: ClassVar[bool] = True  # it hands `found_inf` on to the kernels of the parts

    def __init__(self, batch: Batch, parts: list[list[int]], prefer: str | None) -> None:
        self._prefer = prefer
        self._parts = [(indices, part_of(batch, indices)) for indices in parts]
        choices = [_choose(part, prefer) for _, part in self._parts]
        self.reason = f"{self.about}: " + " | ".join(choice.reason for choice in choices)

    def ready(self, batch: Batch) -> bool:
        """Accept dense gradients; each part asks its own kernel, and sparse ones take the loop."""
        return all(grad.layout is torch.strided for grad in batch.grads)

    def run(self, batches: Sequence[Batch]) -> None:
        """Let the kernel of each part work."""
        for batch in batches:
            for indices, part in self._parts:
                part.grads = [batch.grads[i] for i in indices]
                part.hyper, part.scale = batch.hyper, batch.scale
                part.found_inf = _found_inf_for(part, batch)
                kernel = choose(part, self._prefer)[0]
                if not kernel.counts_steps:
                    _count(part.steps)
                update(kernel, [part])
                part.grads = []
                if part.has_new_state:
                    give_back(part, batch, indices)


def _found_inf_for(part: Batch, batch: Batch) -> torch.Tensor | None:
    found = batch.found_inf
    return None if found is None else found.to(part.params[0].device)


def _count(steps: list[torch.Tensor]) -> None:
    if steps[0].is_cpu:
        torch._foreach_add_(steps, _ONE, alpha=1.0)
    else:
        torch._foreach_add_(steps, 1)


def _refuse_sparse(batch: Batch) -> None:
    decay = bool(batch.hyper.get("weight_decay"))
    if batch.algorithm.sparse and not decay:
        return
    for index, grad in enumerate(batch.grads):
        if grad.layout is not torch.strided:
            what = "weight decay" if batch.algorithm.sparse else "sparse gradients"
            raise PlanError(
                f"{batch.algorithm.name} cannot update parameter {batch.name_of(index)}: its "
                f"gradient is sparse, and {what} would need all of its rows. Make the layer dense "
                f"(sparse=False), or update it with SGD without weight decay."
            )

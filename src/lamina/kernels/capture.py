"""CUDA graphs: what of a step they can record, and clear refusals of the rest.

A graph replays kernels with the numbers they were launched with; what Python computes between them
is not recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..algorithms.base import Batch
from ..errors import PlanError
from .dispatch import choose

#: hyperparameters that a kernel reads on the device, if they are tensors there
_READ_ON_DEVICE = {"fused": ("lr",)}


def is_capturing(device: torch.device) -> bool:
    """Return whether the work of this device is being recorded into a CUDA graph now."""
    return device.type == "cuda" and bool(torch.cuda.is_current_stream_capturing())


def refuse_captured_plan(device: torch.device) -> None:
    """Raise `PlanError` while a graph records the step of a plan, which decides on the host."""
    if is_capturing(device):
        raise PlanError(
            "the step of a plan cannot be recorded in a CUDA graph: every step has values of its "
            "own, worked out in Python, and a graph would repeat those of one step. Record forward "
            "and backward and call optimizer.step() outside of the graph; or record a drop-in "
            "optimizer (lamina.AdamW, Adam or SGD with capturable=True and a tensor as lr)."
        )


def refuse_host_reads(batches: Sequence[Batch]) -> None:
    """Raise `PlanError` while a graph records an update that would read a number on the host."""
    for batch in batches:
        if not is_capturing(batch.params[0].device):
            continue
        if not batch.hyper.get("capturable"):
            raise PlanError(
                f"{batch.algorithm.name} is being recorded in a CUDA graph without "
                "capturable=True; build it with capturable=True, and with a tensor on the "
                "accelerator as lr if the lr is to change between replays."
            )
        kernel = choose(batch)[0].name
        for key in read_on_host(batch, kernel):
            raise PlanError(
                f"{batch.algorithm.name} is being recorded in a CUDA graph, and its {kernel} "
                f"kernel reads {key}, a tensor, on the host. Give {key} as a Python number, which "
                "the graph repeats; a tensor is possible for the lr of Adam, AdamW and SGD."
            )


def read_on_host(batch: Batch, kernel: str) -> list[str]:
    """Return the hyperparameters that are tensors on an accelerator and are read on the host."""
    known = _READ_ON_DEVICE.get(kernel, ())
    return [
        key
        for key in batch.algorithm.defaults
        if key not in known and any(map(_is_on_device, _values(batch.hyper.get(key))))
    ]


def _values(value: object) -> Sequence[object]:
    return value if isinstance(value, (tuple, list)) else (value,)


def _is_on_device(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_cpu

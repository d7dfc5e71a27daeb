"""Whether a parameter, its gradient and its state agree, before an operator walks their memory.

The fused and foreach operators trust their caller: they take the number of elements from one tensor
and read and write the others at the same places. A weight that was resized under its optimizer, a
state tensor that was replaced, a gradient left over from before are then read past their end. So
every batch is compared with what it was when its kernel was chosen, and looked at closely where it
is not the same.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import le, methodcaller
from typing import Any, NamedTuple

import torch

from .._util.blocks import PLAIN
from .._util.numbers import is_number
from .._util.tensors import has_elements, have_addresses, overlaps_itself
from .base import short

Entry = dict[str, Any]
_held = methodcaller("nbytes")
#: parameters that an error names
_SHOWN = 5


class Misfit(NamedTuple):
    """What does not fit about one parameter, in words; `place` is its group and position there."""

    place: tuple[int, int]
    name: str
    shape: tuple[int, ...]
    of_param: list[str]
    of_state: list[str]
    of_gradient: list[str]

    def __str__(self) -> str:
        return f"{self.name} has " + ", ".join(
            [f"shape {self.shape}", *self.of_param, *self.of_state, *self.of_gradient]
        )


def plainly_fit(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    entries: Sequence[Entry],
    buffers: Collection[str],
) -> bool:
    """Return whether all of a group fits, as far as a quick look tells: all plain and contiguous.

    A model whose parameters have gradients in turn has other batches at every step.
    """
    sizes = list(map(torch.Tensor.size, params))
    every = [*params, *grads]
    for key in buffers:
        column = [entry[key] for entry in entries if key in entry]
        known = [size for size, entry in zip(sizes, entries, strict=True) if key in entry]
        if not _are_plain(column) or list(map(torch.Tensor.size, column)) != known:
            return False
        every += column
    steps = [entry["step"] for entry in entries if "step" in entry]
    if not _are_plain(every) or not _are_plain(steps):
        return False
    one_kind = len({each.dtype for each in every}) == 1 and every[0].is_floating_point()
    return (
        one_kind
        and list(map(torch.Tensor.size, grads)) == sizes
        and len(set(map(torch.Tensor.get_device, every))) == 1
        and all(map(torch.Tensor.is_contiguous, every))
        and set(map(torch.Tensor.numel, steps)) <= {1}
        and have_addresses(every)
        and have_addresses(steps)
        and _are_stored(every)
    )


def _are_plain(values: Iterable[Any]) -> bool:
    return all(type(value) in PLAIN and value.layout is torch.strided for value in values)


def _are_stored(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the storages of contiguous tensors reach to their ends."""
    ends = [each.storage_offset() * each.element_size() + each.nbytes for each in tensors]
    return all(map(le, ends, map(_held, map(torch.Tensor.untyped_storage, tensors))))


def wrong_with_state(param: torch.Tensor, entry: Entry, buffers: Collection[str]) -> list[str]:
    """Return in words what of a parameter's state does not fit it.

    Args:
        param: the parameter.
        entry: its state.
        buffers: the keys of tensors in the state that are as large as the parameter; others are
            nobody's, and no kernel touches them.
    """
    apart: dict[str, list[str]] = {}
    for key, value in entry.items():
        reason = ""
        if key == "step":
            reason = _wrong_with_step(value)
        elif key in buffers:
            reason = _wrong_with_buffer(param, value)
        if reason:
            apart.setdefault(reason, []).append(key)
    return [f"its {' and '.join(keys)} {reason}" for reason, keys in apart.items()]


def wrong_with_param(param: torch.Tensor) -> list[str]:
    """Return in words what keeps a parameter from being written to."""
    if not has_elements(param):
        return ["a storage that was freed or is too small for it"]
    if overlaps_itself(param):
        return [f"strides {param.stride()}, with which several elements share one place in memory"]
    return []


def _wrong_with_buffer(param: torch.Tensor, value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}"
    if value.shape != param.shape:
        return f"{tuple(value.shape)}"
    if value.is_complex() != param.is_complex() or not _is_number(value):
        return f"is {short(value.dtype)}"
    if value.is_meta and not param.is_meta:
        return "is on the meta device, without data"
    if param.is_meta and not value.is_meta:
        return f"is on {value.device}, and the parameter on meta"
    return "" if has_elements(value) else "is in a storage that was freed or is too small for it"


def _wrong_with_step(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "" if value.numel() == 1 and has_elements(value) else f"{tuple(value.shape)}"
    return "" if is_number(value) else f"is a {type(value).__name__}"


def wrong_with_grad(param: torch.Tensor, grad: torch.Tensor) -> list[str]:
    """Return in words what of a gradient does not fit its parameter."""
    if grad.shape != param.shape:
        return [f"its gradient {tuple(grad.shape)}"]
    if grad.device != param.device:
        return [f"its gradient is on {grad.device}, and the parameter on {param.device}"]
    if grad.is_complex() != param.is_complex() or not _is_number(grad):
        return [f"its gradient is {short(grad.dtype)}, and the parameter {short(param.dtype)}"]
    return [] if has_elements(grad) else ["the storage of its gradient was freed"]


def _is_number(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def message(found: Sequence[Misfit]) -> str:
    """Return the text of the error about parameters that cannot be updated."""
    shown = "; ".join(map(str, found[:_SHOWN]))
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    fixes = []
    if any(each.of_param for each in found):
        fixes.append(
            "Give a parameter memory of its own for all its elements: param.data = "
            "param.data.clone(), or its values again if they were freed."
        )
    if any(each.of_gradient for each in found):
        fixes.append(
            "A gradient left over from before a change is cleared with optimizer.zero_grad(); the "
            "next backward() makes one that fits."
        )
    outgrown = [each for each in found if each.of_state]
    if outgrown:
        fixes.append(
            "After a change of a weight's size, begin its state anew with "
            f"optimizer.restart_state({_arguments(outgrown)}), or bring the tensors of its state "
            "to the new size yourself."
        )
    return (
        "parameters no longer fit their gradients or their state, and nothing was updated: "
        f"{shown}{more}. {' '.join(fixes)}"
    )


def _arguments(found: Sequence[Misfit]) -> str:
    """Return the arguments of `restart_state` that choose these parameters."""
    return ", ".join(
        each.name
        if each.name.startswith("'")
        else f'optimizer.param_groups[{each.place[0]}]["params"][{each.place[1]}]'
        for each in found[:_SHOWN]
    )

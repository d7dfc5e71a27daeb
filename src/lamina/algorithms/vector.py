"""Parameters of several groups as one vector, for methods that need all of them at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._util.tensors import has_elements
from ..errors import MismatchError, NonFiniteError
from .base import number, widen

_ADVICE = (
    "the weights are as they were before this step. Lower the lr, use "
    "line_search_fn='strong_wolfe', or look at the loss of this batch"
)


@dataclass(frozen=True)
class Part:
    """One parameter in the vector: its place among all, its name, its learning rate."""

    place: int
    name: str
    param: torch.Tensor
    lr: float


class Vector:
    """The parameters that move: they need a gradient, have one, and their lr is not 0.

    The others are left out, so that they take no part in any norm or product.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]]) -> None:
        parts = [part for part in _parts(groups) if part.param.requires_grad]
        self.parts = [p for p in parts if p.param.grad is not None and p.lr > 0]
        _refuse_misfits(self.parts)
        self.lr = max((part.lr for part in self.parts), default=0.0)
        #: which parameters are in it
        self.places = [part.place for part in self.parts]

    def scale(self) -> torch.Tensor | None:
        """Return the diagonal D = lr / max lr; None if all learning rates are equal."""
        if all(part.lr == self.lr for part in self.parts):
            return None
        return self._cat(
            torch.full_like(_flat(part.param.detach()), part.lr / self.lr) for part in self.parts
        )

    def grad(self) -> torch.Tensor:
        """Return the gradient of all parts."""
        return self._cat(
            torch.zeros_like(part.param) if part.param.grad is None else part.param.grad
            for part in self.parts
        )

    def _cat(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        device = self.parts[0].param.device
        return torch.cat([_flat(tensor.detach()).to(device) for tensor in tensors])

    def values(self) -> list[torch.Tensor]:
        """Return a copy of all parts."""
        return [part.param.detach().clone() for part in self.parts]

    def put(self, values: Sequence[torch.Tensor]) -> None:
        """Set all parts to a copy made before."""
        for part, value in zip(self.parts, values, strict=True):
            part.param.copy_(value)

    def move(self, t: float, direction: torch.Tensor) -> None:
        """Add t * direction."""
        offset = 0
        for part in self.parts:
            param = torch.view_as_real(part.param) if part.param.is_complex() else part.param
            piece = direction[offset : offset + param.numel()].view(param.shape)
            param.add_(piece.to(param.device), alpha=t)
            offset += param.numel()

    def check(self, loss: float, grad: torch.Tensor) -> float:
        """Return the largest component of the gradient.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite.
        """
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of the closure is {loss}; {_ADVICE}.")
        largest = float(grad.abs().max()) if grad.numel() else 0.0
        if not math.isfinite(largest):
            raise NonFiniteError(f"the gradient of {self._culprit()} is not finite; {_ADVICE}.")
        return largest

    def _culprit(self) -> str:
        for part in self.parts:
            if part.param.grad is not None and not bool(torch.isfinite(part.param.grad).all()):
                return part.name
        return "a parameter"


def _refuse_misfits(parts: Sequence[Part]) -> None:
    """Raise `MismatchError` for gradients that would not lie where their parameters do."""
    for part in parts:
        grad = part.param.grad
        assert grad is not None
        sized = grad.shape == part.param.shape and grad.is_complex() == part.param.is_complex()
        if sized and has_elements(grad) and has_elements(part.param):
            continue
        raise MismatchError(
            f"{part.name} of shape {tuple(part.param.shape)} does not fit its gradient of shape "
            f"{tuple(grad.shape)}, or one of them has no data any more; the weights are as they "
            "were before this step. Let the closure call optimizer.zero_grad() before backward()."
        )


def _parts(groups: Iterable[Mapping[str, Any]]) -> list[Part]:
    parts: list[Part] = []
    for group in groups:
        names = group.get("param_names") or [None] * len(group["params"])
        lr = number(group["lr"])
        for name, param in zip(names, group["params"], strict=True):
            place = len(parts)
            called = f"parameter number {place}" if name is None else repr(name)
            parts.append(Part(place, called, param, lr))
    return parts


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return all numbers of a tensor in a row, in a dtype fit for arithmetic."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    return widen(real.reshape(-1))

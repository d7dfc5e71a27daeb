"""The tensors of one case: weights of each candidate, gradients as a backward pass leaves them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .shapes import Shape

#: large enough that a step shows in float32 weights, small enough for thousands of steps
LR = 1e-3


class Tensors:
    """Weights and gradients of given shapes.

    Args:
        shapes: by name.
        kept: whether gradients stay the same tensors from step to step, as they do after
            `zero_grad(set_to_none=False)`; else each step gets new ones.
        device: where all of them lie.
    """

    def __init__(
        self, shapes: dict[str, Shape], *, kept: bool = False, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes = shapes
        self.kept = kept
        weights = [0.02 * torch.randn(shape, generator=generator) for shape in shapes.values()]
        grads = [torch.randn(shape, generator=generator) for shape in shapes.values()]
        self._weights = [weight.to(device) for weight in weights]
        self._source = [grad.to(device) for grad in grads]
        # the same for all candidates, which take turns
        self._buffers = [torch.empty_like(grad) for grad in self._source] if kept else []

    def params(self) -> list[nn.Parameter]:
        """The weights of one candidate."""
        return [nn.Parameter(weight.clone()) for weight in self._weights]

    def give(self, params: list[nn.Parameter]) -> None:
        """Give each parameter its gradient; clipping changed those of the step before."""
        if self.kept:
            torch._foreach_copy_(self._buffers, self._source)
            grads = self._buffers
        else:
            grads = [grad.clone() for grad in self._source]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    def take(self, params: list[nn.Parameter]) -> None:
        """Take the gradients away, so that there is one set of them at a time."""
        if not self.kept:
            for param in params:
                param.grad = None

    def difference(self, mine: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
        """How far two ended from each other, as a share of how far they went; the worst tensor."""
        worst = 0.0
        with torch.no_grad():
            for start, one, other in zip(self._weights, mine, theirs, strict=True):
                apart = float((one - other).abs().max())
                way = float((other - start).abs().max())
                if apart > 0:
                    worst = max(worst, apart / way if way else float("inf"))
        return worst


def group_of(index: int, tensors: int, groups: int) -> int:
    """The group of a tensor: in order, and of about equal sizes."""
    return index * groups // tensors


def rate_of(group: int) -> float:
    """Every group has its own learning rate, or there would be no reason for groups."""
    return LR * (1 + 1e-3 * group)


def grouped(params: list[nn.Parameter], groups: int) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them."""
    parts: list[list[nn.Parameter]] = [[] for _ in range(groups)]
    for index, param in enumerate(params):
        parts[group_of(index, len(params), groups)].append(param)
    return [{"params": part, "lr": rate_of(index)} for index, part in enumerate(parts)]


class Holder(nn.Module):
    """Parameters under given names, as a model."""

    def __init__(self, names: list[str], params: list[nn.Parameter]) -> None:
        super().__init__()
        for name, param in zip(names, params, strict=True):
            self.register_parameter(self.plain(name), param)

    @staticmethod
    def plain(name: str) -> str:
        return name.replace(".", "__")

"""What is measured: one step over a model's shapes, by torch and by lamina."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import lamina as lm

from .shapes import Shape

Step = Callable[[], None]
#: learning rates are tiny, so that thousands of steps leave the numbers ordinary
LR = 1e-6
CLIP = 1.0


class Bench:
    """One model's tensors: the gradients are shared by all candidates, weights and state not."""

    def __init__(self, shapes: dict[str, Shape], groups: int, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.names = list(shapes)
        self.shapes = shapes
        self.groups = min(groups, len(shapes))
        self._fresh = [torch.randn(s, generator=generator).to(device) for s in shapes.values()]
        self._grads = [torch.empty_like(grad) for grad in self._fresh]

    def restore(self) -> None:
        """Clipping scales gradients in place, and a clipped gradient is cheaper to clip."""
        torch._foreach_copy_(self._grads, self._fresh)

    def params(self) -> list[nn.Parameter]:
        params = [nn.Parameter(torch.zeros(s, device=self.device)) for s in self.shapes.values()]
        for param, grad in zip(params, self._grads, strict=True):
            param.grad = grad
        return params

    def group(self, params: list[nn.Parameter]) -> list[dict[str, Any]]:
        """One group, or as many as asked for, in order."""
        parts: list[list[nn.Parameter]] = [[] for _ in range(self.groups)]
        for index, param in enumerate(params):
            parts[index * self.groups // len(params)].append(param)
        return [{"params": ps, "lr": LR * (1 + 1e-3 * i)} for i, ps in enumerate(parts)]

    def plain(self, optimizer: type[torch.optim.Optimizer], clip: bool, **options: Any) -> Step:
        """An optimizer over groups; clipping as a loop written for torch does it."""
        params = self.params()
        made = optimizer(self.group(params), lr=LR, **options)

        def step() -> None:
            if clip:
                torch.nn.utils.clip_grad_norm_(params, CLIP)
            made.step()

        return step

    def planned(self, optimizer: type[torch.optim.Optimizer], clip: bool, **options: Any) -> Step:
        """A plan with the same groups; it clips by itself."""
        model = _Holder(dict(zip(self.names, self.params(), strict=True)))
        place = {name: i * self.groups // len(self.names) for i, name in enumerate(self.names)}
        rates = {name: LR * (1 + 1e-3 * index) for name, index in place.items()}
        plan = lm.Plan(
            optimizer,
            lr=LR if self.groups == 1 else lambda info: rates[_Holder.given(info.name)],
            clip_norm=CLIP if clip else None,
            **options,
        )
        made: Step = plan.build(model).step
        return made


class _Holder(nn.Module):
    """Parameters under given names, as a model."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name.replace(".", "__"), param)

    @staticmethod
    def given(name: str) -> str:
        return name.replace("__", ".")


def against_torch(bench: Bench, name: str, clip: bool) -> dict[str, Step]:
    """Torch's ways to step, lamina's, and torch's fastest once more: the spread of the machine."""
    theirs, ours = getattr(torch.optim, name), getattr(lm.optim, name)
    options = {"momentum": 0.9} if name == "SGD" else {}
    candidates = {
        "torch default": bench.plain(theirs, clip, **options),
        "torch foreach": bench.plain(theirs, clip, foreach=True, **options),
        "torch fused": bench.plain(theirs, clip, fused=True, **options),
        "torch fused again": bench.plain(theirs, clip, fused=True, **options),
        "lamina plan": bench.planned(ours, clip, **options),
    }
    if not clip:
        candidates["lamina drop-in"] = bench.plain(ours, clip, **options)
    return candidates


def layer_adaptive(bench: Bench) -> dict[str, Step]:
    """LayerAdaptiveAdam beside the same formula as one would write it first."""
    return {
        "naive, .item() per tensor": _naive(bench),
        "naive again": _naive(bench),
        "lamina readable": bench.plain(lm.optim.LayerAdaptiveAdam, False, foreach=False),
        "lamina drop-in": bench.plain(lm.optim.LayerAdaptiveAdam, False),
    }


def _naive(bench: Bench) -> Step:
    params = bench.params()
    state = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    rates = [group["lr"] for group in bench.group(params) for _ in group["params"]]

    @torch.no_grad()
    def step() -> None:
        for param, (mean, square), lr in _together(params, state, rates):
            grad = param.grad
            mean.mul_(0.9).add_(grad, alpha=0.1)
            square.mul_(0.999).addcmul_(grad, grad, value=1e-3)
            size = lr * (mean.abs() / (square.sqrt() + 1e-8)).mean().item()
            param.add_(mean, alpha=-size)

    return step


def _together(*columns: Any) -> Iterator[Any]:
    return zip(*columns, strict=True)

"""LayerAdaptiveAdam as one would write it first: no package has it."""

from __future__ import annotations

from typing import Any

import torch


class NaiveLayerAdaptiveAdam(torch.optim.Optimizer):
    """A loop over all tensors; `item` reads each step size on the host, as such loops often do."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        item: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "item": item})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[param], param.grad
        if grad is None:
            return
        if not state:
            state["mean"], state["square"] = torch.zeros_like(param), torch.zeros_like(param)
        mean, square = state["mean"], state["square"]
        beta1, beta2 = group["betas"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = (mean.abs() / square.sqrt().add_(group["eps"])).mean() * group["lr"]
        if group["item"]:
            param.add_(mean, alpha=-size.item())
        else:
            param.addcmul_(mean, size, value=-1)

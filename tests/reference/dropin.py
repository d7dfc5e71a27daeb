"""The table that drives what every optimizer of `lamina.optim` promises to a training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lamina import optim


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer with options; `rosenbrock` and `net` are learning rates that converge there."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    rosenbrock: float = 0.01
    net: float = 0.01

    @property
    def make(self) -> type[torch.optim.Optimizer]:
        return getattr(optim, self.name)

    @property
    def torch_class(self) -> type[torch.optim.Optimizer] | None:
        return getattr(torch.optim, self.name, None)

    @property
    def matrices_only(self) -> bool:
        return self.name == "Muon"

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


CASES = [
    Case("SGD", rosenbrock=3e-3, net=0.3),
    Case("SGD", {"momentum": 0.9, "nesterov": True}, rosenbrock=1.5e-3, net=0.1),
    Case("RMSprop", rosenbrock=0.06, net=0.01),
    Case("RMSprop", {"momentum": 0.5, "centered": True}, rosenbrock=0.02, net=0.003),
    Case("Adam", {"amsgrad": True}, rosenbrock=0.5, net=0.03),
    Case("AdamW", {"weight_decay": 1e-4}, rosenbrock=0.5, net=0.03),
    Case("Muon", {"weight_decay": 0.0}, rosenbrock=0.02, net=0.03),
    Case("LARS", {"trust_coefficient": 0.01}, rosenbrock=1.0, net=1.0),
    Case("LAMB", rosenbrock=0.2, net=0.03),
    Case("LayerAdaptiveAdam", rosenbrock=0.012, net=0.3),
    Case("LBFGS", {"max_iter": 5}, rosenbrock=0.1, net=0.5),
    Case("LBFGS", {"max_iter": 5, "line_search_fn": "strong_wolfe"}, rosenbrock=1.0, net=1.0),
]
#: those that take gradients rather than a closure
STEPPERS = [case for case in CASES if case.name != "LBFGS"]


class Problem:
    """A small regression with a network and data of its own."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        bias = not case.matrices_only
        self.net = nn.Sequential(
            nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias)
        ).to(dtype)
        x = torch.randn(32, 4, dtype=torch.float64)
        y = torch.stack([x[:, 0] * 0.5 - x[:, 1] * 0.3, torch.tanh(x[:, 2])], dim=1)
        self.x, self.y = x.to(dtype), y.to(dtype)

    def loss(self) -> torch.Tensor:
        return (self.net(self.x) - self.y).square().mean()

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        """Steps with a closure, which suits every optimizer; the losses before each."""

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return [optimizer.step(closure).item() for _ in range(steps)]  # type: ignore[attr-defined]

    def weights(self) -> list[torch.Tensor]:
        return [param.detach() for param in self.net.parameters()]

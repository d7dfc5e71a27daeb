"""L-BFGS with torch's name, signature and defaults, and with parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ..algorithms import METHODS
from ..algorithms.base import Method
from ..algorithms.lbfgs import WHOLE_VECTOR, lbfgs_step
from ..errors import HyperparameterError
from .base import DropIn, arguments
from .engine import Closure


class LBFGS(DropIn):
    """L-BFGS; arguments and defaults are torch's, and every group may have its own lr.

    One estimate of the curvature over all parameters. With equal learning rates this is torch's
    algorithm; with different ones they scale the first guess of the inverse Hessian.

    `step` takes up to `max_iter` iterations and returns what the closure returned at its first
    evaluation. It raises `PlanError` without a closure, or if that returns no number, and
    `NonFiniteError` for a loss or a gradient that is not finite; weights and state are as before
    then.
    """

    algorithm: ClassVar[Method] = METHODS["LBFGS"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        if max_eval is None:
            max_eval = max_iter * 5 // 4
        super().__init__(**arguments(locals()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only its lr may differ from the other groups'."""
        first = self.param_groups[0] if self.param_groups else self.defaults
        for key in self.algorithm.defaults:
            if key != "lr" and key in param_group and param_group[key] != first[key]:
                raise HyperparameterError(
                    f"LBFGS, parameter group {len(self.param_groups)}: {key}={param_group[key]!r}, "
                    f"but it is {first[key]!r} for the others; there is one search over all "
                    "parameters, so that only lr can differ between groups."
                )
        super().add_param_group(param_group)

    def _step(self, closure: Closure | None) -> Any:
        params = (param for group in self.param_groups for param in group["params"])
        first = next(params, None)  # holds the state, as in torch
        return lbfgs_step(closure, self.param_groups, {} if first is None else self.state[first])

    def _kernel_of(self, group: dict[str, Any]) -> str:
        return WHOLE_VECTOR

    def _restart(self, chosen: Sequence[tuple[dict[str, Any], torch.Tensor, int]]) -> None:
        """Drop the memory, which is one over all parameters."""
        self.state.clear()

"""The optimizers with torch's names, signatures and defaults."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.optim.optimizer import ParamsT

from ..algorithms import ALGORITHMS
from ..algorithms.base import Algorithm
from ..engine import Engine
from ..errors import HyperparameterError


class _DropIn(Engine):
    """An optimizer without a plan: `param_groups` decides, as in torch."""

    def __init__(self, params: ParamsT, hyper: dict[str, Any], **implementation: Any) -> None:
        for key, value in implementation.items():
            if value and key == "differentiable":
                raise HyperparameterError(
                    f"{type(self).__name__}: differentiable=True is not supported; "
                    f"use torch.optim.{type(self).__name__}, which a plan accepts too."
                )
        assert self.algorithm is not None
        self.algorithm.check(hyper)
        super().__init__(params, {**hyper, **implementation})


class SGD(_DropIn):
    """Stochastic gradient descent with momentum; arguments and defaults are torch's."""

    algorithm: ClassVar[Algorithm] = ALGORITHMS["SGD"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        hyper = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, hyper, foreach=foreach, differentiable=differentiable, fused=fused)


class RMSprop(_DropIn):
    """RMSprop; arguments and defaults are torch's."""

    algorithm: ClassVar[Algorithm] = ALGORITHMS["RMSprop"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        hyper = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        super().__init__(
            params, hyper, foreach=foreach, capturable=capturable, differentiable=differentiable
        )


class Adam(_DropIn):
    """Adam; arguments and defaults are torch's."""

    algorithm: ClassVar[Algorithm] = ALGORITHMS["Adam"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        hyper = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(
            params,
            hyper,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay; arguments and defaults are torch's."""

    algorithm: ClassVar[Algorithm] = ALGORITHMS["AdamW"]

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

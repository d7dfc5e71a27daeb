"""A copy of a model and its optimizer that is trained in their place: the originals are only read.

So there is nothing to restore but the random sources, whatever happens in the middle of a test.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import SequentialSampler

from .._util.randomness import Randomness
from ..errors import LaminaError, LaminaWarning, NonFiniteError, PlanError
from .curve import Curve, has_exploded
from .targets import Target

Loss = Callable[[nn.Module, Any], torch.Tensor]


class _Diverged(Exception):
    """The loss is not finite; the step was not taken."""


class Trial:
    """A copy that takes steps at any multiple of its lr.

    Args:
        target: what to copy, and whose lr to scale.
        model: the model of the target.
        loss: gives the loss of a batch.
        scaler: a gradient scaler, which is copied too; None without one.
    """

    def __init__(self, target: Target, model: nn.Module, loss: Loss, scaler: Any) -> None:
        self.model, self.optimizer, self.scale = target.copy(model)
        self._swept = target.swept(self.optimizer)
        self._loss = loss
        self._scaler = copy.deepcopy(scaler)
        if not self.model.training:
            self.model.train()
        mode = getattr(self.optimizer, "train", None)
        if callable(mode):  # of schedule-free optimizers
            mode()

    def step(self, batches: Sequence[Any]) -> float | None:
        """Take one step and return the loss before it; None if the training has diverged."""
        losses: list[float] = []

        def closure() -> Any:
            self.optimizer.zero_grad()
            value = torch.stack([self._backward(batch, len(batches)) for batch in batches]).sum()
            losses.append(float(value))
            if not math.isfinite(losses[-1]):
                raise _Diverged
            return value

        try:
            if self._scaler is None:
                self.optimizer.step(closure)
                synchronize = getattr(self.optimizer, "synchronize", None)
                if callable(synchronize):  # an accelerator tells of this step with the next one
                    synchronize()
            else:
                closure()
                self._scaler.step(self.optimizer)
                self._scaler.update()
        except (_Diverged, NonFiniteError):
            return None
        except Exception:
            # Many losses refuse what a model of NaNs gives.
            if self._is_finite():
                raise
            return None
        return losses[0]

    def check_gradients(self) -> None:
        """Raise `PlanError` if the loss gave no swept parameter a gradient."""
        if all(param.grad is None for param in self._swept):
            raise PlanError(
                "find_lr: loss(model, batch) gave no gradient to any parameter whose lr is swept. "
                "It must compute the loss with the model that it is given."
            )

    def _backward(self, batch: Any, count: int) -> torch.Tensor:
        loss = self._loss(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise PlanError(
                f"find_lr: loss(model, batch) gave {_described(loss)}; expected a tensor with one "
                "number that depends on the parameters of the model."
            )
        loss = loss.reshape(()) / count
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return loss.detach()

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(param).all()) for param in self.model.parameters())


def sweep(
    trial: Trial, batches: Iterator[Any], lrs: Sequence[float], base: float, accumulate: int
) -> Curve:
    """Take one step at each lr, from the lowest to the highest, until the loss explodes.

    Args:
        trial: what is trained.
        batches: as many as are asked for.
        lrs: the learning rates of the group with the highest lr.
        base: the lr that this group has without the test.
        accumulate: batches for each step.
    """
    losses: list[float] = []
    diverged = False
    for lr in lrs:
        trial.scale(lr / base)
        value = trial.step([next(batches) for _ in range(accumulate)])
        if value is None:
            diverged = True
            break
        if not losses:
            trial.check_gradients()
        losses.append(value)
        if has_exploded(losses):
            diverged = True
            break
    return Curve(tuple(lrs[: len(losses)]), tuple(losses), len(lrs), diverged)


def endless(batches: Any, repeat: int, repeats: int) -> Iterator[Any]:
    """Yield batches again and again, for each repeat in another order.

    A list is shuffled. A loader draws its own order; one that has always the same begins at another
    place in each repeat.
    """
    skipped = 0
    if isinstance(getattr(batches, "sampler", None), SequentialSampler):
        skipped = repeat * len(batches) // repeats
    while True:
        found = False
        listed = isinstance(batches, Sequence)
        for batch in random.sample(batches, len(batches)) if listed else batches:
            found = True
            if skipped > 0:
                skipped -= 1
                continue
            yield batch
        if not found:
            raise LaminaError("find_lr: batches has none; give a loader with examples.")


@contextmanager
def random_sources_kept(batches: Any) -> Iterator[None]:
    """Give Python's, NumPy's, torch's and the loader's random sources their states of now back."""
    # A torch that is built for CUDA names it also where there is no GPU.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    sources = Randomness(device, batches)
    before = sources.now()
    with ExitStack() as stack:
        stack.callback(sources.set, before)
        if device.type == "cuda":  # of which there may be several, and a seed sets all
            every = range(torch.cuda.device_count())
            stack.enter_context(torch.random.fork_rng(every, device_type="cuda"))
        yield


def seed_all(seed: int) -> None:
    """Begin the random sources of the process anew."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # the global source: data sets draw from it
    torch.manual_seed(seed)


@contextmanager
def originals_untouched(model: nn.Module) -> Iterator[None]:
    """Refuse a forward of the original model, which would move its BatchNorm statistics.

    lamina's warnings are about runs, and a test is none.
    """
    originals = {id(module) for module in model.modules()}

    def refuse(module: nn.Module, _: Any) -> None:
        if id(module) in originals:
            raise PlanError(
                "find_lr: loss(model, batch) called the original model, but the test trains a "
                "copy; use the model that it is given as its first argument."
            )

    handle = nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LaminaWarning)
            yield
    finally:
        handle.remove()


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        tied = "" if value.requires_grad else " without a gradient"
        return f"a tensor of shape {tuple(value.shape)}{tied}"
    return f"a {type(value).__name__}"

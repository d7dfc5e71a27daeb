"""`find_lr`: a learning-rate range test that leaves everything as it was."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .._util.numbers import is_number, is_whole
from .._util.sharding import is_distributed, is_sharded
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..optimizer.wrapped import unwrap
from .curve import Curve
from .found import FoundLR
from .targets import PlanTarget, Target, TorchTarget
from .trial import Loss, Trial, endless, originals_untouched, random_sources_kept, seed_all, sweep

#: repeats that suggest lrs further apart than this factor agree on nothing
_AGREE = 10.0
_FEWEST_STEPS = 20


def find_lr(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Iterable[Any],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    repeats: int = 3,
    rule: str | int | None = None,
    at: int | None = None,
    accumulate: int = 1,
    scaler: Any = None,
    seed: int = 0,
) -> FoundLR:
    """Find a learning rate by a range test that keeps the ratios between groups.

    A copy of model and optimizer takes one step at each of `steps` learning rates, from `low` to
    `high` in equal factors, until the loss explodes; again for each repeat, with other batches and
    another seed. `FoundLR` says how the losses give a suggestion. Nothing that is given changes,
    and the random sources are put back, also if the test fails or is interrupted.

    Args:
        model: the model, before it is wrapped for several processes; a copy must fit into memory.
        optimizer: one built by `Plan.build`, or any other `torch.optim.Optimizer`.
        loss: `loss(model, batch)`, the mean loss of a batch with the model that it is given.
        batches: a `DataLoader`, a list, or what else can be iterated several times.
        low: the lowest learning rate, of the group that has the highest one.
        high: the highest learning rate.
        steps: how many learning rates are tried, at least 20.
        repeats: how often, at least 3.
        rule: the group whose lr alone is swept: of a plan a name or pattern, else a name or number.
        at: of a plan, the step at whose values schedules, windows and clipping are held. By default
            that of the rest of the run at which the lr, summed over what trains, is largest.
        accumulate: batches for each step.
        scaler: a `torch.amp.GradScaler`.
        seed: of the first repeat; the others count on from it.

    Returns:
        The suggestion, its interval and the curves; its docstring has an example.

    Raises:
        PlanError: for arguments that do not fit, or a model that cannot be copied.
    """
    least = {"steps": (steps, _FEWEST_STEPS), "repeats": (repeats, 3)}
    _check_numbers(low, high, {**least, "accumulate": (accumulate, 1), "seed": (seed, 0)})
    _check_objects(model, loss, batches)
    target = _target(optimizer, rule, at)
    _check_parameters(model, optimizer)
    reference = max(target.lr, key=lambda index: target.lr[index])
    lrs = [float(lr) for lr in np.geomspace(low, high, steps)]
    curves = []
    with random_sources_kept(batches), originals_untouched(model):
        for repeat in range(repeats):
            seed_all(seed + repeat)
            trial = Trial(target, model, loss, scaler)
            data = endless(batches, repeat, repeats)
            curves.append(sweep(trial, data, lrs, target.lr[reference], accumulate))
    return _judged(target, reference, tuple(curves))


def _judged(target: Target, reference: int, curves: tuple[Curve, ...]) -> FoundLR:
    """Return what the curves say together."""
    readings = [curve.read() for curve in curves]
    refused = [reading.reason for reading in readings if reading.reason]
    reason, suggestion, interval = "", None, None
    if refused:
        reason = f"in {len(refused)} of {len(curves)} repeats {refused[0]}."
    else:
        each = [reading.lr for reading in readings]
        interval = (min(each), max(each))
        suggestion = math.exp(statistics.median(map(math.log, each)))
        if interval[1] > _AGREE * interval[0]:
            reason = (
                f"the repeats suggest lrs from {interval[0]:.2g} to {interval[1]:.2g}, more than a "
                f"factor of {_AGREE:g} apart. Give more steps= or larger batches."
            )
            suggestion = interval = None
    now = {target.names[index]: lr for index, lr in target.lr.items()}
    name = target.names[reference]
    advice = target.written(1.0 if suggestion is None else suggestion / now[name])
    return FoundLR(suggestion, interval, reason, curves, name, now, target.held, advice)


def _target(optimizer: Any, rule: str | int | None, at: int | None) -> Target:
    try:
        planned: Optimizer | None = unwrap(optimizer)
    except PlanError:
        planned = None
    if planned is not None:
        if rule is not None and not isinstance(rule, str):
            raise PlanError(f"find_lr, rule={rule!r}: expected the name of a group or a pattern.")
        return PlanTarget(planned, rule, at)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise PlanError(
            f"find_lr was given an optimizer of type {type(optimizer).__name__}; expected one "
            "built by Plan.build, or a torch.optim.Optimizer."
        )
    if at is not None:
        raise PlanError(
            f"at={at!r} is a step of a plan, and this optimizer has none; leave it out. The groups "
            "are taken as they are."
        )
    return TorchTarget(optimizer, rule)


def _check_numbers(low: float, high: float, least: Mapping[str, tuple[int, int]]) -> None:
    """Raise `PlanError` for a range or a number that cannot be, given with the least it may be."""
    if not (is_number(low) and is_number(high) and 0 < low < high < math.inf):
        raise PlanError(
            f"find_lr: low={low!r}, high={high!r}: expected learning rates above 0, low below high."
        )
    for name, (value, fewest) in least.items():
        if not is_whole(value) or value < fewest:
            raise PlanError(
                f"find_lr: {name}={value!r}: expected a whole number of at least {fewest}."
            )


def _check_objects(model: Any, loss: Any, batches: Any) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"find_lr was given a model of type {type(model).__name__}.")
    if not callable(loss):
        raise PlanError(f"find_lr, loss={loss!r}: expected a function loss(model, batch).")
    if isinstance(batches, Iterator):
        raise PlanError(
            "find_lr: batches can be iterated only once, so that repeats would differ in their "
            "data and the position could not be restored. Give the loader or a list instead."
        )
    if not isinstance(batches, (Iterable, Sequence)):
        raise PlanError(f"find_lr, batches={batches!r}: expected a loader or a list of batches.")
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    several = is_distributed() and torch.distributed.get_world_size() > 1
    if wrapped or several or any(map(is_sharded, model.parameters())):
        raise PlanError(
            "find_lr trains a copy of the model in one process, and this one is wrapped or trained "
            "by several. Run the test once, in a process of its own, before wrapping, and pass the "
            "lr that it suggests."
        )
    if any(param.is_meta for param in model.parameters()):
        raise PlanError(
            "find_lr: the model is on the meta device, without values; give it weights."
        )


def _check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    known = {id(param) for param in model.parameters()}
    strange = [
        tuple(param.shape)
        for group in optimizer.param_groups
        for param in group["params"]
        if id(param) not in known
    ]
    if strange:
        raise PlanError(
            f"find_lr: the optimizer trains {len(strange)} tensor(s) that are no parameters of "
            f"this model, the first of shape {strange[0]}; give the model that it was built for."
        )

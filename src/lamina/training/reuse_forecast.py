"""What reuse will store and save in a run, before its first step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .._util.notices import warn
from .._util.randomness import Randomness
from ..errors import LaminaError, PlanError
from ..optimizer.optimizer import Optimizer
from ..reuse import Forecast, reuse
from .reuse_settings import ReuseSettings
from .task import Data, Task

#: for data of which each batch is padded to its own length
_LENGTHS = (
    "Batches have different lengths, and an example is only found again in the length that it had. "
    "The figures hold for one length: let the task pad all batches alike."
)


class _CalledError(Exception):
    """Ends a pass as soon as it is known what the model is called with."""


def forecast_run(
    settings: ReuseSettings,
    task: Task,
    data: Data,
    model: nn.Module,
    optimizer: Optimizer,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> Forecast | None:
    """Return what each stage of a run will store and save; None, with a word why, if unknown.

    One batch of the first examples is tried on copies of the model. Neither the order of the data
    nor any random source is moved on.

    Args:
        settings: those of reuse.
        task: the task.
        data: its data.
        model: its model, on the device.
        optimizer: under the plan of the run.
        device: that of the run.
        autocast: the precision of the run.

    Raises:
        PlanError: if the model cannot be followed.
    """
    sources = Randomness(device, data.train, data.validation)
    before, modes = sources.now(), [(module, module.training) for module in model.modules()]
    try:
        model.train()  # what is wholly frozen stays in eval mode
        batch, other = _first_batches(data.train, device)
        args, kwargs = _call_of(task, model, batch)
        examples = _length(data.train) + _length(data.validation)
        space, narrow = settings.space, settings.store_dtype
        with autocast, reuse(model, optimizer, space=space, store_dtype=narrow) as reused:
            found = reused.preview(examples, *args, **kwargs)
        return found if _lengths(batch) == _lengths(other) else replace(found, notes=(_LENGTHS,))
    except PlanError:
        raise
    except Exception as error:  # whatever a task's own code raises outside of a run
        warn(f"What reuse will save is not known before the run: {_reason(error)}")
        return None
    finally:
        for module, mode in modes:
            module.training = mode
        sources.set(before)


def _first_batches(loader: DataLoader[Any], device: torch.device) -> list[Any]:
    """Return a batch of the first examples and one of those that follow, else the same again.

    They are not taken from the loader, whose sampler would move on.
    """
    from accelerate.utils import send_to_device

    size = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(loader.dataset, IterableDataset) or not isinstance(size, int):
        raise LaminaError("the data is a stream, or its sampler does not say the size of a batch.")
    whole = _length(loader)
    first, second = range(min(size, whole)), range(whole)[size : 2 * size]
    batches = []
    for places in (first, second if len(second) == size else first):
        items = [loader.dataset[index] for index in places]
        batches.append(send_to_device(loader.collate_fn(items), device))
    return batches


def _lengths(batch: Any) -> list[torch.Size]:
    """Return the shapes of what a batch holds."""
    if isinstance(batch, torch.Tensor):
        return [batch.shape]
    parts = batch.values() if hasattr(batch, "values") else batch
    if isinstance(parts, (str, bytes)) or not hasattr(parts, "__iter__"):
        return []
    return [shape for part in parts for shape in _lengths(part)]


def _call_of(task: Task, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """Return the arguments that the model is called with for the loss of a batch."""
    found: list[tuple[Any, Any]] = []

    def note(_model: nn.Module, args: Any, kwargs: Any) -> None:
        found.append((args, kwargs))
        raise _CalledError

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        task.loss(model, batch)
    except _CalledError:
        pass
    finally:
        handle.remove()
    if not found:
        raise LaminaError(
            f"loss(model, batch) of {task.place} calls parts of the model, not the model itself, "
            "so that nothing can be reused. Let it call model(...)."
        )
    return found[0]


def _length(loader: DataLoader[Any]) -> int:
    data: Any = loader.dataset
    return len(data) if hasattr(data, "__len__") else 0


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, LaminaError) else repr(error)

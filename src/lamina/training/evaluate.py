"""Averages over held-out examples, exact over uneven batches and any number of processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import TaskError, did_you_mean
from .ready import ReadyRun
from .sharding import is_sharded
from .task import Task


def evaluate(session: ReadyRun, model: nn.Module) -> tuple[dict[str, float], int]:
    """Return the average of every metric, and the number of examples.

    The model is measured without its wrapper for many processes, whose forward would wait for the
    others: they may have fewer batches. A sharded model waits in any case, so there a process with
    fewer batches measures its last one again, and does not count it.
    """
    bare = session.accelerator.unwrap_model(model)
    bare.eval()
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    with torch.no_grad():
        for batch, is_counted in _batches(session):
            if is_counted:
                _measure(session.task, bare, batch, sums, counts)
            else:
                _measure(session.task, bare, batch, defaultdict(float), defaultdict(int))
    return _averages(sums, counts)


def _measure(
    task: Task, model: nn.Module, batch: Any, sums: dict[str, float], counts: dict[str, int]
) -> None:
    """Add what one batch gives to the sums, and how many numbers that are to the counts."""
    rows = task.metrics(model, batch)
    for name, values in rows.items():
        sums[name] += float(values.detach().cpu().double().sum())
        counts[name] += values.numel()
    size = batch_size(batch)
    if "loss" not in rows:
        if size is None:
            raise TaskError(
                f"{task.place}: the held-out loss cannot be averaged, because a batch of "
                f"type {type(batch).__name__} does not say how many examples it holds; "
                "let metrics(model, batch) give 'loss' with one number per example."
            )
        sums["loss"] += float(task.loss(model, batch).detach().double()) * size
        counts["loss"] += size
    counts[""] += next(iter(rows.values())).numel() if size is None else size


def _batches(session: ReadyRun) -> Iterator[tuple[Any, bool]]:
    """Return this process' batches, and whether each counts; equally many if it is sharded."""
    if not is_sharded(session.accelerator):
        for given in session.validation_loader:
            with session.reuse.batch(given) as batch:
                yield batch, True
        return
    from accelerate.utils import gather_object, send_to_device

    batches, last = iter(session.validation_loader), None
    while True:
        batch = next(batches, None)
        # Asked before each batch: in the middle of one the processes wait for each other's weights.
        if not any(gather_object([batch is not None])):
            return
        last = batch if batch is not None else last
        if last is None:
            last = send_to_device(next(iter(session.data.validation)), session.accelerator.device)
        yield last, batch is not None


def check_watched(session: ReadyRun) -> None:
    """Raise `TaskError` if a plan watches what no validation will report; one batch is measured.

    It comes from the task's own loader: Accelerate's would count as in use, left after one batch.
    """
    from accelerate.utils import send_to_device

    watched = [reaction.metric for _, reaction in session.optimizer.resolved.reactions]
    if not watched:
        return
    task, model = session.task, session.model
    now = session.randomness.now()  # which reading a batch would move on
    batch = send_to_device(next(iter(session.data.validation)), session.accelerator.device)
    model.eval()  # until an epoch begins
    with torch.no_grad():
        rows = task.metrics(model, batch)
    session.randomness.set(now)
    reported = [f"val_{name}" for name in dict.fromkeys(["loss", *rows])]
    for name in watched:
        if name not in reported:
            raise TaskError(
                f"the plan watches {name!r}, but the validation of {task.name!r} reports "
                f"{', '.join(reported)}.{did_you_mean(name, reported)}"
            )


def _averages(sums: dict[str, float], counts: dict[str, int]) -> tuple[dict[str, float], int]:
    from accelerate.utils import gather_object

    parts = gather_object([(dict(sums), dict(counts))])
    names = dict.fromkeys(name for part, _ in parts for name in part)
    total = {name: sum(count.get(name, 0) for _, count in parts) for name in ("", *names)}
    averages = {
        name: sum(part.get(name, 0.0) for part, _ in parts) / total[name]
        for name in names
        if total[name]
    }
    return averages, total[""]


def batch_size(batch: Any) -> int | None:
    """Return the length of the first tensor in a batch; None if there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else None
    values = batch.values() if isinstance(batch, dict) or hasattr(batch, "values") else batch
    if isinstance(batch, (str, bytes)) or not hasattr(values, "__iter__"):
        return None
    return next((size for value in values if (size := batch_size(value)) is not None), None)

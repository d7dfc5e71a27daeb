"""Averages over held-out examples, exact over uneven batches and any number of processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import TaskError, did_you_mean
from .task import Task


def evaluate(
    task: Task, model: nn.Module, batches: Iterable[Any], accelerator: Any
) -> tuple[dict[str, float], int]:
    """Return the average of every metric, and the number of examples.

    The model is measured without its wrapper for many processes, whose forward would wait for the
    others: they may have fewer batches.
    """
    bare = accelerator.unwrap_model(model)
    bare.eval()
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    with torch.no_grad():
        for batch in batches:
            rows = task.metrics(bare, batch)
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
                sums["loss"] += float(task.loss(bare, batch).detach().double()) * size
                counts["loss"] += size
            counts[""] += next(iter(rows.values())).numel() if size is None else size
    return _averages(sums, counts, accelerator)


def check_watched(
    task: Task, watched: Iterable[str], model: nn.Module, loader: Iterable[Any], device: Any
) -> None:
    """Raise `TaskError` if a plan watches what no validation will report; one batch is measured.

    `loader` is the task's own: Accelerate's would count as in use, left after one batch.
    """
    from accelerate.utils import send_to_device

    trains = model.training
    model.eval()
    with torch.no_grad():
        rows = task.metrics(model, send_to_device(next(iter(loader)), device))
    model.train(trains)
    reported = [f"val_{name}" for name in dict.fromkeys(["loss", *rows])]
    for name in watched:
        if name not in reported:
            raise TaskError(
                f"the plan watches {name!r}, but the validation of {task.name!r} reports "
                f"{', '.join(reported)}.{did_you_mean(name, reported)}"
            )


def _averages(
    sums: dict[str, float], counts: dict[str, int], accelerator: Any
) -> tuple[dict[str, float], int]:
    parts = [(dict(sums), dict(counts))]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        parts = gather_object(parts)
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

"""Previews of a task under one plan or several, on one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .._util.notices import warn
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..preview import Preview
from ..reuse import Forecast
from ..schedules.duration import Run
from ..training.load import choose_plan, error_location, load_task
from ..training.ready import batches
from ..training.reuse_forecast import forecast_run
from ..training.reuse_settings import ReuseSettings
from ..training.settings import Settings


def task_previews(
    source: str,
    plans: Sequence[Path | None],
    examples: Mapping[str, str],
    *,
    steps: int | None = None,
    **asked: Any,
) -> list[Preview]:
    """Return previews of the run that `lamina run` would do in one process.

    Args:
        source: the task.
        plans: a file for each preview; None for the task's own plan.
        examples: the example tasks, by name.
        steps: the length of the run in optimizer steps, instead of epochs.
        **asked: settings of the run, such as `epochs=` and `accumulate=`.
    """
    task = load_task(source, examples)
    settings = Settings.of(task, **asked)
    chosen = [choose_plan(task, plan) for plan in plans]
    loader = task.data(settings.seed).train
    model = task.model()
    found = []
    for plan, place in chosen:
        with error_location(place):
            found.append(
                plan.preview(
                    model,
                    steps=steps,
                    epochs=settings.epochs if steps is None else None,
                    steps_per_epoch=batches(task, loader),
                    accumulate=settings.accumulate,
                )
            )
    return found


def task_forecast(
    source: str, plan_file: Path | None, examples: Mapping[str, str], run: Run, **asked: Any
) -> Forecast | None:
    """Return what reuse will store and save in a run; None if it reuses nothing.

    Args:
        source: the task.
        plan_file: that of the plan; None for the task's own.
        examples: the example tasks, by name.
        run: the length of the run.
        **asked: settings of the run.
    """
    task = load_task(source, examples)
    settings = Settings.of(task, **asked)
    reuse = ReuseSettings.of(settings.reuse)
    if reuse is None:
        return None
    plan, place = choose_plan(task, plan_file)
    data, model = task.data(settings.seed), task.model()
    with error_location(place):
        # Not by plan.build, which warns of the findings: the preview prints them.
        optimizer = Optimizer(plan, model, run)
    cpu = torch.device("cpu")
    try:
        return forecast_run(reuse, task, data, model, optimizer, cpu, nullcontext())
    except PlanError as error:
        warn(f"The run would go on without reuse: {error}")
        return None

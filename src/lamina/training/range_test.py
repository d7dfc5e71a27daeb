"""The learning-rate range test of a task: what `lamina find-lr` does."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import LaminaError, require
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..range_test import FoundLR, find_lr
from ..schedules.duration import run_of
from .devices import begin, end, launched
from .load import choose_plan, error_location, load_task
from .ready import batches
from .settings import Settings
from .task import Task


def find_lr_of_task(
    task: Task | ModuleType | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    epochs: float | None = None,
    seed: int | None = None,
    accumulate: int | None = None,
    mixed_precision: str | None = None,
    cpu: bool = False,
    **test: Any,
) -> FoundLR:
    """Find a learning rate for a task and a plan; nothing is written.

    Args:
        task: a task, its module, or the path of its file.
        plan: a plan, or the path or text of one; by default the task's own.
        epochs: the length of the run that the plan is for.
        seed: of the weights, the data, and the test.
        accumulate: batches per optimizer step.
        mixed_precision: "no", "fp16" or "bf16".
        cpu: train on the CPU even if there is an accelerator.
        **test: `low`, `high`, `steps`, `repeats`, `rule` and `at`, as of `find_lr`.

    Raises:
        LaminaError: for a task, plan or setting that does not work, or in several processes.
    """
    require("accelerate", "train", "A range test of a task")
    from accelerate.utils import send_to_device

    task = load_task(task)
    _refuse_several()
    asked = {"epochs": epochs, "seed": seed, "accumulate": accumulate}
    settings = Settings.of(task, **asked, mixed_precision=mixed_precision)
    chosen, place = choose_plan(task, plan)
    accelerator = begin(settings, settings.accumulate, cpu)
    try:
        device = accelerator.device
        data, model = task.data(settings.seed), task.model().to(device)
        run = run_of(
            epochs=settings.epochs,
            steps_per_epoch=batches(task, data.train),
            accumulate=settings.accumulate,
        )

        def loss(twin: nn.Module, batch: Any) -> torch.Tensor:
            with accelerator.autocast():
                return task.loss(twin, send_to_device(batch, device))

        with error_location(place):
            # Not by plan.build, which warns of the findings: `show` and `check` print them.
            optimizer = Optimizer(chosen, model, run)
        known: dict[str, Any] = {"accumulate": settings.accumulate, "seed": settings.seed}
        known["scaler"] = accelerator.scaler
        return find_lr(model, optimizer, loss, data.train, **known, **test)
    finally:
        end(accelerator)


def _refuse_several() -> None:
    processes, said_by = launched()
    if processes > 1:
        raise LaminaError(
            f"{processes} processes were launched ({said_by}), and a range test runs in one; start "
            "it without a launcher."
        )

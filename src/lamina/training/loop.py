"""Epochs and steps. What the plan decides happens inside `optimizer.step()`, nothing of it here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import TaskError
from ..optimizer import Optimizer
from ..reporting import changes
from ..timeline import Feedback, values_at
from .evaluate import batch_size, evaluate
from .records import Event, Listener, StepRecord, Validation
from .task import Task


@dataclass
class _Taken:
    """A step whose numbers are still on the device: reading them at once would wait for it."""

    step: int
    epoch: int
    losses: list[torch.Tensor]
    lr: dict[str, float]
    norms: dict[str, torch.Tensor]
    examples: int
    seconds: float


@dataclass
class Loop:
    """Trains a model and tells its listeners.

    Args:
        task: gives the loss.
        accelerator: Accelerate's.
        model: as `accelerator.prepare` returned it.
        optimizer: the plan's, which keeps clock and values.
        wrapped: the same optimizer as `accelerator.prepare` returned it, which waits for the end
            of an accumulation and unscales gradients.
        train: batches of this process.
        validation: held-out batches of this process.
        accumulate: batches per step.
        listeners: told of everything.
        interrupted: asked after each step; stops the run with `KeyboardInterrupt`.
    """

    task: Task
    accelerator: Any
    model: nn.Module
    optimizer: Optimizer
    wrapped: Any
    train: DataLoader[Any]
    validation: DataLoader[Any]
    accumulate: int
    listeners: Sequence[Listener]
    interrupted: Callable[[], bool] = lambda: False
    #: whether weights, state and clock belong to the same step: not in the middle of one
    consistent: bool = True
    last: Validation | None = None
    _pending: _Taken | None = None
    _began: float = field(default_factory=time.perf_counter)
    _trains: list[bool] = field(default_factory=list)

    def run(self) -> None:
        """Train to the end of the plan's run, validating after each epoch."""
        run = self.optimizer.resolved.run
        assert run.steps is not None
        assert run.steps_per_epoch is not None
        total, per_epoch = run.steps, run.steps_per_epoch
        self._began, self._trains = time.perf_counter(), self._active()
        for epoch in range(math.ceil(total / per_epoch)):
            self._epoch(epoch, total - epoch * per_epoch)
            self._validate(epoch)
            if self.optimizer.should_stop:
                self._event(epoch, "stop", "early stopping: the metric stopped improving")
                break

    def _epoch(self, epoch: int, most: int) -> None:
        """One pass over the data, or its first `most` steps."""
        self.model.train()
        self.train.set_epoch(epoch)  # type: ignore[attr-defined]  # Accelerate's loader has it
        losses: list[torch.Tensor] = []
        examples = attempted = 0
        for index, batch in enumerate(self.train):
            with self.accelerator.accumulate(self.model):
                losses.append(self._gradients(index, batch))
                examples += batch_size(batch) or 0
                self._step(epoch, losses, examples)
            if self.accelerator.sync_gradients:
                losses, examples, attempted = [], 0, attempted + 1
                if self.interrupted():
                    raise KeyboardInterrupt
                if attempted == most:
                    break
        self.flush()

    def _gradients(self, index: int, batch: Any) -> torch.Tensor:
        """Add the gradients of a batch; returns its loss."""
        loss = self.task.loss(self.model, batch)
        # Accelerate divides by `accumulate`, even where an epoch ends in a step of fewer batches.
        begin = index - index % self.accumulate
        members = min(self.accumulate, len(self.train) - begin)
        if loss.requires_grad:
            self.accelerator.backward(
                loss if members == self.accumulate else loss * (self.accumulate / members)
            )
        elif any(self._trains):
            raise TaskError(
                f"{self.task.place}: loss(model, batch) gives a tensor without gradient, so that "
                "nothing would train; compute it from the model's output without detach() or "
                "no_grad()."
            )
        return loss.detach()

    def _step(self, epoch: int, losses: list[torch.Tensor], examples: int) -> None:
        if not self.accelerator.sync_gradients:
            return
        optimizer = self.optimizer
        before, skipped = optimizer.clock, optimizer.skipped
        self.consistent = False
        self.wrapped.step()
        self.consistent = True
        self.wrapped.zero_grad()
        if optimizer.clock == before:
            known = optimizer.skipped > skipped
            cause = "a gradient is not finite" if known else "the loss scale was too large"
            self._event(epoch, "skipped", f"step {before} was skipped: {cause}")
            return
        self.flush()
        self._pending = _Taken(
            step=before,
            epoch=epoch,
            losses=losses,
            lr={name: hyper["lr"] for name, hyper in optimizer.applied.items()},
            norms=dict(optimizer.norms),
            examples=examples * self.accelerator.num_processes,
            seconds=time.perf_counter() - self._began,
        )
        if optimizer.clock != optimizer.resolved.run.steps:
            self._tell_windows(epoch)

    def flush(self, *, alone: bool = False) -> None:
        """Tell of the step taken last; `alone` without asking other processes for their loss."""
        taken, self._pending = self._pending, None
        if taken is None:
            return
        loss = torch.stack(taken.losses).float().mean()
        if self.accelerator.num_processes > 1 and not alone:
            loss = self.accelerator.reduce(loss, "mean")
        norms = {name: float(norm) for name, norm in taken.norms.items()}
        record = StepRecord(
            taken.step, taken.epoch, float(loss), taken.lr, norms, taken.examples, taken.seconds
        )
        for listener in self.listeners:
            listener.on_step(record)

    def _validate(self, epoch: int) -> None:
        began = time.perf_counter()
        averages, examples = evaluate(self.task, self.model, self.validation, self.accelerator)
        clock, seconds = self.optimizer.clock, time.perf_counter() - began
        self.last = Validation(clock, epoch, averages, examples, seconds)
        for listener in self.listeners:
            listener.on_validation(self.last)
        if averages:
            seen = self.optimizer.param_groups[0]["feedback"]
            self.optimizer.report(**{f"val_{name}": value for name, value in averages.items()})
            for line in changes(seen, self.optimizer.param_groups[0]["feedback"]):
                self._event(epoch, "feedback", line)

    def _active(self) -> list[bool]:
        """Which groups train at the next step."""
        optimizer = self.optimizer
        feedback = Feedback(seen=optimizer.param_groups[0]["feedback"])
        values = values_at(optimizer.resolved, optimizer.clock, feedback)
        return [bool(values.active(index)) for index in range(len(optimizer.param_groups))]

    def _tell_windows(self, epoch: int) -> None:
        old, self._trains = self._trains, self._active()
        for kind, becomes in (("thaw", True), ("freeze", False)):
            names = tuple(
                group["name"]
                for group, was, now in zip(
                    self.optimizer.param_groups, old, self._trains, strict=True
                )
                if now is becomes and was is not becomes
            )
            if names:
                verb = "trains" if becomes else "is frozen"
                text = f"{', '.join(names)} {verb} from step {self.optimizer.clock} on"
                self._event(epoch, kind, text, names)

    def _event(self, epoch: int, kind: str, text: str, groups: tuple[str, ...] = ()) -> None:
        self.flush()  # in the order in which things happened
        event = Event(self.optimizer.clock, epoch, kind, text, groups)
        for listener in self.listeners:
            listener.on_event(event)

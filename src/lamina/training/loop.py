"""Epochs and steps. What the plan decides happens inside `optimizer.step()`, nothing of it here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import TaskError
from ..optimizer.optimizer import Optimizer
from ..runtime.reports import changes
from .evaluate import batch_size, evaluate
from .position import Position, Randomness
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
        randomness: the random sources of this process.
        listeners: told of everything.
        interrupted: asked after each step; what is true stops the run with `KeyboardInterrupt`.
        at_rest: called between steps and after validations, when the run could be saved.
        position: where the run begins.
        earlier: seconds that were trained before.
        last: the last validation before.
    """

    task: Task
    accelerator: Any
    model: nn.Module
    optimizer: Optimizer
    wrapped: Any
    train: DataLoader[Any]
    validation: DataLoader[Any]
    accumulate: int
    randomness: Randomness
    listeners: Sequence[Listener]
    interrupted: Callable[[], object] = lambda: None
    at_rest: Callable[[Loop], None] = lambda _: None
    position: Position = field(default_factory=Position)
    earlier: float = 0.0
    last: Validation | None = None
    #: whether weights, state, clock and position belong to the same step: not in the middle of one
    consistent: bool = True
    _pending: _Taken | None = None
    _began: float = field(default_factory=time.perf_counter)
    _trains: dict[str, bool] = field(default_factory=dict)
    _buffered: bool = False

    @property
    def seconds(self) -> float:
        """Since the run began, without the time in which it rested."""
        return self.earlier + time.perf_counter() - self._began

    def run(self) -> None:
        """Train to the end of the plan's run, validating after each epoch."""
        run = self.optimizer.resolved.run
        assert run.steps is not None
        assert run.steps_per_epoch is not None
        total, per_epoch = run.steps, run.steps_per_epoch
        self._began, self._trains = time.perf_counter(), self.optimizer.active
        self._buffered = any(True for _ in self.model.buffers())
        if self.position.after is not None:
            self.randomness.set(self.position.after)
        if self.position.validated and self.optimizer.should_stop:
            return
        for epoch in range(self.position.epoch, math.ceil(total / per_epoch)):
            if epoch > self.position.epoch:
                self.position = Position(epoch)
            most = total - epoch * per_epoch
            if not self._is_over(most):
                self._epoch(epoch, most)
            elif self.position.validated:
                continue
            self._validate(epoch)
            self.at_rest(self)
            if self.optimizer.should_stop:
                break

    def _is_over(self, most: int) -> bool:
        """Return whether the epoch's batches are used, or as many as make `most` steps."""
        batches = self.position.batches
        return batches >= min(len(self.train), most * self.accumulate)

    def _epoch(self, epoch: int, most: int) -> None:
        """Return one pass over the data, or its first `most` steps."""
        self.model.train()
        losses: list[torch.Tensor] = []
        examples = 0
        for position, batch in self._batches(epoch):
            with self.accelerator.accumulate(self.model):
                if self._buffered:  # which a forward pass may change
                    self.consistent = False
                losses.append(self._gradients(position.batches - 1, batch))
                examples += batch_size(batch) or 0
                self._step(epoch, losses, examples)
            if self.accelerator.sync_gradients:
                losses, examples = [], 0
                self.position, self.consistent = position, True
                if not self._is_over(most):
                    self.at_rest(self)
                if self.interrupted():
                    raise KeyboardInterrupt
                if self._is_over(most):
                    break
        self.flush()

    def _batches(self, epoch: int) -> Iterator[tuple[Position, Any]]:
        """Return the batches of an epoch that are not used yet, each with the position after it."""
        self.train.set_epoch(epoch)  # type: ignore[attr-defined]  # Accelerate's loader has it
        random, used = self.randomness, self.position
        if used.start is not None:
            random.set(used.start)
        start = used.start or random.now()
        batches = iter(self.train)
        for index in range(used.batches):  # read again, as they were
            if index == used.batches - 1 and used.before is not None:
                random.set(used.before)
            next(batches, None)
            if self.interrupted():
                raise KeyboardInterrupt
        if used.after is not None:
            random.set(used.after)
        for number in itertools.count(used.batches + 1):
            before = random.now()
            if self.position.after is None:
                self.position = replace(self.position, after=before)
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield Position(epoch, number, start=start, before=before), batch

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
        elif any(self._trains.values()):
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
            seconds=self.seconds,
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
        self.position = self.position.settled(self.randomness)
        began = time.perf_counter()
        averages, examples = evaluate(self.task, self.model, self.validation, self.accelerator)
        clock, seconds = self.optimizer.clock, time.perf_counter() - began
        self.consistent = False
        self.last = Validation(clock, epoch, averages, examples, seconds)
        for listener in self.listeners:
            listener.on_validation(self.last)
        if averages:
            seen = self.optimizer.param_groups[0]["feedback"]
            self.optimizer.report(**{f"val_{name}": value for name, value in averages.items()})
            for line in changes(seen, self.optimizer.param_groups[0]["feedback"]):
                self._event(epoch, "feedback", line)
        if self.optimizer.should_stop:
            self._event(epoch, "stop", "early stopping: the metric stopped improving")
        self.position = replace(self.position, validated=True, after=None)
        self.consistent = True

    def _tell_windows(self, epoch: int) -> None:
        old, self._trains = self._trains, self.optimizer.active
        for kind, becomes in (("thaw", True), ("freeze", False)):
            names = tuple(
                name
                for name, now in self._trains.items()
                if now is becomes and old[name] is not becomes
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

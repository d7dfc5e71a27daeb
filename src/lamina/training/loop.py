"""Epochs and steps. What the plan decides happens inside `optimizer.step()`, nothing of it here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import TaskError
from ..runtime.reports import changes
from .evaluate import batch_size, evaluate
from .measured import Measured
from .position import Position
from .ready import ReadyRun
from .records import Event, Listener, StepRecord, Validation


@dataclass
class Loop:
    """Trains the model of a session and tells its listeners.

    Args:
        session: the run; its optimizer keeps clock and values.
        model: as `accelerator.prepare` returned it.
        wrapped: the optimizer as `accelerator.prepare` returned it, which waits for the end of an
            accumulation and unscales gradients.
        listeners: told of everything.
        interrupted: asked after each step; what is true stops the run with `KeyboardInterrupt`.
        at_rest: called between steps and after validations, when the run could be saved.
    """

    session: ReadyRun
    model: nn.Module
    wrapped: Any
    listeners: Sequence[Listener]
    interrupted: Callable[[], object]
    at_rest: Callable[[Loop], None]
    #: whether weights, state, clock and position belong to the same step: not in the middle of one
    consistent: bool = True

    def __post_init__(self) -> None:
        session = self.session
        self.task, self.accelerator = session.task, session.accelerator
        self.optimizer, self.randomness = session.optimizer, session.randomness
        self.position = session.begins
        # A step whose numbers are still on the device: reading them at once would wait for it.
        self._pending: tuple[StepRecord, list[torch.Tensor], dict[str, torch.Tensor]] | None = None
        self._accumulate = session.dealing.accumulate
        self._began = time.perf_counter()
        self._trains = self.optimizer.active
        self._measured = Measured(self.optimizer)
        self._buffered = any(True for _ in self.model.buffers())

    @property
    def seconds(self) -> float:
        """Since the run began, without the time in which it rested."""
        return self.session.earlier + time.perf_counter() - self._began

    def run(self) -> None:
        """Train to the end of the plan's run, validating after each epoch."""
        run = self.optimizer.resolved.run
        total, per_epoch = run.steps or 0, run.steps_per_epoch or 1  # both are known
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
        return batches >= min(len(self.session.train_loader), most * self._accumulate)

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
                if not self.accelerator.sync_gradients:
                    continue
                self._step(epoch, losses, examples)
            losses, examples = [], 0
            self.position, self.consistent = position, True
            over = self._is_over(most)
            if not over:
                self.at_rest(self)
            if self.interrupted():
                raise KeyboardInterrupt
            if over:
                break
        self.flush()

    def _batches(self, epoch: int) -> Iterator[tuple[Position, Any]]:
        """Return the batches of an epoch that are not used yet, each with the position after it."""
        loader, random, used = self.session.train_loader, self.randomness, self.position
        loader.set_epoch(epoch)
        start = used.start or random.now()  # the latter if the epoch begins
        random.set(start)
        batches = iter(loader)
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
                given = next(batches)
            except StopIteration:
                return
            with self.session.reuse.batch(given) as batch:
                yield Position(epoch, number, start=start, before=before), batch

    def _gradients(self, index: int, batch: Any) -> torch.Tensor:
        """Add the gradients of a batch; returns its loss."""
        loss = self.task.loss(self.model, batch)
        # Accelerate divides by `accumulate`, even where an epoch ends in a step of fewer batches.
        accumulate = self._accumulate
        begin = index - index % accumulate
        members = min(accumulate, len(self.session.train_loader) - begin)
        if loss.requires_grad:
            self.accelerator.backward(
                loss if members == accumulate else loss * (accumulate / members)
            )
        elif any(self._trains.values()):
            raise TaskError(
                f"{self.task.place}: loss(model, batch) gives a tensor without gradient, so that "
                "nothing would train; compute it from the model's output without detach() or "
                "no_grad()."
            )
        return loss.detach()

    def _step(self, epoch: int, losses: list[torch.Tensor], examples: int) -> None:
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
        lr = {name: hyper["lr"] for name, hyper in optimizer.applied.items()}
        examples *= self.accelerator.num_processes
        record = StepRecord(before, epoch, math.nan, lr, {}, examples, self.seconds)
        self._pending = record, losses, optimizer.norms
        if optimizer.clock != optimizer.resolved.run.steps:
            self._tell_windows(epoch)

    def flush(self, *, alone: bool = False) -> None:
        """Tell of the step taken last; `alone` without asking other processes for their loss."""
        if self._pending is None:
            return
        (record, losses, norms), self._pending = self._pending, None
        loss = torch.stack(losses).float().mean()
        if self.accelerator.num_processes > 1 and not alone:
            loss = self.accelerator.reduce(loss, "mean")
        numbers = {name: float(norm) for name, norm in norms.items()}
        groups = self._measured.take(record.step)
        record = replace(record, loss=float(loss), norms=numbers, groups=groups)
        for listener in self.listeners:
            listener.on_step(record)

    def _validate(self, epoch: int) -> None:
        self.position = self.position.settled(self.randomness)
        began = time.perf_counter()
        averages, examples = evaluate(self.session, self.model)
        clock, seconds = self.optimizer.clock, time.perf_counter() - began
        self.consistent = False
        self.session.last = Validation(clock, epoch, averages, examples, seconds)
        for listener in self.listeners:
            listener.on_validation(self.session.last)
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
        changed = {name: now for name, now in self._trains.items() if now != old[name]}
        for kind, becomes, verb in (("thaw", True, "trains"), ("freeze", False, "is frozen")):
            names = tuple(name for name, now in changed.items() if now == becomes)
            if names:
                text = f"{', '.join(names)} {verb} from step {self.optimizer.clock} on"
                self._event(epoch, kind, text, names)

    def _event(self, epoch: int, kind: str, text: str, groups: tuple[str, ...] = ()) -> None:
        self.flush()  # in the order in which things happened
        event = Event(self.optimizer.clock, epoch, kind, text, groups)
        for listener in self.listeners:
            listener.on_event(event)

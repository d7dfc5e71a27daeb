"""`lamina.watch`: see what a training loop really does."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..model.finding import Finding
from ..record import Record
from ..record.planned import ParameterEntry
from ..report_page import write_report
from .guard import Guard
from .observer import Observer
from .taps import Taps


class Seen:
    """What a watch has seen; the object of `with lamina.watch(...) as seen`.

    It may be read during the watch and after it.
    """

    def __init__(self, observer: Observer, guard: Guard) -> None:
        self._observer = observer
        self._guard = guard
        self._final: tuple[Finding, ...] | None = None

    @property
    def record(self) -> Record:
        """The values, norms and events, step by step."""
        return self._observer.seen.record

    @property
    def steps(self) -> int:
        """How many optimizer steps were seen, of all optimizers together."""
        return sum(watch.steps for watch in self._observer.seen.watches)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found so far, problems before advice."""
        return self._observer.findings() if self._final is None else self._final

    @property
    def failure(self) -> str | None:
        """The first error of the watch itself, which the watched code did not notice."""
        return self._guard.failure

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "What the training did",
        facts: Mapping[str, str] | None = None,
    ) -> None:
        """Write a report of the run as one HTML file, which works without a network.

        Args:
            path: the file; it is replaced if it exists.
            title: what it is about.
            facts: what else is known of the run, by name.

        Raises:
            MissingExtraError: if plotly is not installed.
            LaminaError: if the file cannot be written.
        """
        write_report(
            self.record,
            path,
            parameters=self._parameters(),
            title=title,
            facts={"optimizer steps": f"{self.steps:,}", **(facts or {})},
        )

    def _parameters(self) -> list[ParameterEntry]:
        entries: dict[str, ParameterEntry] = {}
        for watch in self._observer.seen.watches:
            for name, seen in watch.params.items():
                entries[name] = ParameterEntry(name, seen.shape, seen.group, seen.trains)
        for name, shape in self._observer.seen.left_out().items():
            entries.setdefault(name, ParameterEntry(name, shape, None, False))
        return [*entries.values()]

    def after_step(self, function: Callable[[], None]) -> None:
        """Call a function after every step that is seen; its errors do not reach the loop."""
        self._observer.after_step = function

    @property
    def is_here(self) -> bool:
        """Return whether this process is the one that watches, and not a fork of it."""
        return self._guard.is_here

    def settle(self) -> None:
        """Work out the findings for the last time, and record them."""
        if self._final is None:
            found: list[Finding] = []
            self._guard.call(lambda: found.extend(self._observer.findings()))
            self._final = tuple(found)
            for finding in found:
                self._guard.call(self.record.finding, finding)


class watch:
    """Watch a training loop, and find what is wrong in it.

    Inside the `with` block every step of every optimizer is seen, also of trainers; results do not
    change. Nothing is asked of the loop.

    Args:
        model: the model, for the names of its parameters; without it, models are found by the
            parameters of the optimizers.
        *optimizers: if any is given, others are not watched.
        schedulers: their schedulers, if these were built before the watch.
        record: a `lamina.record.Record` to write into; by default a new one.

    Returns:
        As the value of `with`, a `Seen`: `findings`, `record`, `steps` and `report(path)`.

    Raises:
        PlanError: if the model is no module, or an optimizer no optimizer.

    Example:
        >>> import torch, lamina as lm
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with watch(model, optimizer) as seen:
        ...     for _ in range(8):  # zero_grad is forgotten
        ...         model(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> [finding.code for finding in seen.findings]
        ['gradients-accumulate']
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *optimizers: torch.optim.Optimizer,
        schedulers: Sequence[Any] = (),
        record: Record | None = None,
    ) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise PlanError(
                f"a model of type {type(model).__name__} was given; expected a torch.nn.Module, or "
                "None to find it by the parameters of the optimizers."
            )
        for optimizer in optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise PlanError(
                    f"an optimizer of type {type(optimizer).__name__} was given; expected a "
                    "torch.optim.Optimizer. Schedulers are passed as schedulers=[...]."
                )
        self._guard = Guard()
        models = () if model is None else (model,)
        self._observer = Observer(models, optimizers, Record() if record is None else record)
        self._taps = Taps(self._observer, self._guard)
        self._given = optimizers, tuple(schedulers)
        self.seen = Seen(self._observer, self._guard)

    def __enter__(self) -> Seen:
        optimizers, schedulers = self._given
        for optimizer in optimizers:
            self._guard.call(self._observer.built, optimizer)
        for scheduler in schedulers:
            self._guard.call(self._observer.scheduler_built, scheduler)
        self._taps.install()
        return self.seen

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seen.settle()
        self._taps.remove()

"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ..errors import printable
from .records import Event, Listener, StepRecord, Validation

SHOWN_GROUPS = 3


def lr_text(lr: Mapping[str, float]) -> str:
    """Return the lr of the groups that train: each if they are few, else the range."""
    training = {name: value for name, value in lr.items() if value}
    if not training:
        return "lr 0"
    if len(training) <= SHOWN_GROUPS:
        return "lr " + ", ".join(f"{name} {value:.3g}" for name, value in training.items())
    low, high = min(training.values()), max(training.values())
    return f"lr {low:.3g} to {high:.3g} in {len(training)} groups"


class Pace:
    """Examples per second over the last steps, so that a thaw shows at once.

    Args:
        seconds: that were trained before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.rate = 0.0

    def note(self, record: StepRecord) -> None:
        """Take a step into account; the first has nothing to compare with."""
        took, self._seconds = record.seconds - self._seconds, record.seconds
        if took > 0 and record.examples:
            rate = record.examples / took
            self.rate = 0.9 * self.rate + 0.1 * rate if self.rate else rate

    def pause(self, seconds: float) -> None:
        """Stop the clock of the display while nothing trains."""
        self._seconds += seconds


class PlainDisplay:
    """One line for each epoch and event, for logs and pipes."""

    def __init__(self, console: Console, epochs: int, steps: int, earlier: float = 0.0) -> None:
        self.console, self.epochs, self.steps = console, epochs, steps
        self._losses: list[float] = []
        self._examples = 0
        self._last: StepRecord | None = None
        self._epoch_began = earlier

    def on_step(self, record: StepRecord) -> None:
        self._losses.append(record.loss)
        self._examples += record.examples
        self._last = record

    def on_event(self, event: Event) -> None:
        self.say(f"step {event.step}: {event.text}")

    def on_validation(self, result: Validation) -> None:
        parts = [f"epoch {result.epoch + 1}/{self.epochs}", f"step {result.step}/{self.steps}"]
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.4g}")
        parts += [f"held-out {name} {value:.4g}" for name, value in result.averages.items()]
        if self._last is not None:
            parts.append(lr_text(self._last.lr))
            took = self._last.seconds - self._epoch_began
            if self._examples and took > 0:
                parts.append(f"{self._examples / took:.3g} examples/s")
            self._epoch_began = self._last.seconds + result.seconds
        self.say(" · ".join(parts))
        self._losses, self._examples = [], 0

    def say(self, text: str) -> None:
        """Return a line as it is: long ones are not cut, brackets in patterns are not markup."""
        self.console.print(Text(printable(text)), soft_wrap=True)


class LiveDisplay:
    """A progress bar with loss and lr below it; epochs and events scroll by above."""

    def __init__(self, console: Console, epochs: int, steps: int, earlier: float = 0.0) -> None:
        self._plain = PlainDisplay(console, epochs, steps, earlier)
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=console,
        )
        self._bar = self._progress.add_task(f"epoch 1/{epochs} · step 0/{steps}", total=steps)
        self._pace = Pace(earlier)
        self.live = Live(console=console, refresh_per_second=8, transient=True)
        self.live.update(self._content(""))

    def on_step(self, record: StepRecord) -> None:
        self._plain.on_step(record)
        self._pace.note(record)
        plain, done = self._plain, record.step + 1
        where = f"epoch {record.epoch + 1}/{plain.epochs} · step {done}/{plain.steps}"
        self._progress.update(self._bar, completed=done, description=where)
        parts = [f"loss {record.loss:.4g}", lr_text(record.lr)]
        if self._pace.rate:
            parts.append(f"{self._pace.rate:.3g} examples/s")
        self.live.update(self._content(" · ".join(parts)))

    def on_event(self, event: Event) -> None:
        self._plain.on_event(event)

    def on_validation(self, result: Validation) -> None:
        self._plain.on_validation(result)
        self._pace.pause(result.seconds)

    def _content(self, text: str) -> Any:
        return Group(self._progress, Text(text, style="dim", no_wrap=True, overflow="ellipsis"))


@contextmanager
def display(console: Console, epochs: int, steps: int, earlier: float = 0.0) -> Iterator[Listener]:
    """Give the display that fits where the output goes; `earlier`: seconds trained before."""
    if not console.is_terminal:
        yield PlainDisplay(console, epochs, steps, earlier)
        return
    shown = LiveDisplay(console, epochs, steps, earlier)
    with shown.live:
        yield shown

"""A run that is ready to start: its data, how far it is, and the checkpoint it continues."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .._util.randomness import Randomness
from ..errors import LaminaError, StateError, TaskError
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..reuse import Forecast
from ..state.extend import WAYS
from ..state.schema import is_count, short
from .dealing import Dealing
from .position import Position
from .records import Validation
from .run_folder import ABOUT, plan_text
from .run_reuse import RunReuse
from .settings import FREE, Settings
from .snapshot import Snapshot
from .task import Data, Task


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    Args:
        folder: that of the run.
        path: the checkpoint.
        snapshot: what it holds.
        damaged: newer checkpoints that cannot be used.
        about: what `run.json` says: how the run ended, and what was asked for last, which a run
            that was killed before it saved again has nowhere else.
    """

    folder: Path
    path: Path
    snapshot: Snapshot
    damaged: tuple[Path, ...]
    about: Mapping[str, Any]

    def settings(self, **asked: Any) -> Settings:
        """Return the settings of the run, but for what is asked for now."""
        last = {name: self.about[name] for name in FREE if name in self.about}
        try:
            return Settings.resumed({**self.snapshot.settings, **last}, **asked)
        except StateError:
            raise
        except LaminaError as error:
            Settings.resumed(self.snapshot.settings, **asked)  # what is asked for may be at fault
            raise StateError(f"{self.folder / ABOUT}: {error} Correct it there.") from error

    @property
    def batches_in_a_step(self) -> int:
        """Of all processes together; checkpoints of earlier versions do not say it."""
        snapshot = self.snapshot
        made = snapshot.processes * Settings.resumed(snapshot.settings).accumulate
        saved = snapshot.data.get("batches_in_a_step", made)
        if not is_count(saved) or not saved:
            raise StateError(
                f"{self.path}: the checkpoint says that a step has {short(saved)} batches; it was "
                "changed by hand. Use another."
            )
        return int(saved)

    def way(self, settings: Settings) -> str | None:
        """Return the saved choice of `extend`, if the run keeps the length it was made for."""
        way = self.about.get("extend")
        return way if way in WAYS and settings.epochs == self.about.get("epochs") else None


@dataclass
class ReadyRun:
    """What a run needs to train, and how far it is."""

    task: Task
    settings: Settings
    accelerator: Any
    model: nn.Module
    plan: Plan
    data: Data
    dealing: Dealing
    out: Path | None
    start: Resumption | None = None
    extend: str | None = None
    #: undone when the session is closed: the lock of the folder, what Accelerate began
    undo: ExitStack = field(default_factory=ExitStack)
    reuse: RunReuse = field(init=False)
    #: what reuse will save; None if nothing is reused, or that is not known
    forecast: Forecast | None = field(init=False)
    train_loader: Any = field(init=False)
    validation_loader: Any = field(init=False)
    optimizer: Optimizer = field(init=False)
    randomness: Randomness = field(init=False)
    begins: Position = field(init=False)
    #: the last validation
    last: Validation | None = field(init=False)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return bool(self.accelerator.is_main_process)

    @property
    def earlier(self) -> float:
        """Seconds that were trained before this session."""
        return 0.0 if self.start is None else self.start.snapshot.seconds

    @property
    def since(self) -> int:
        """The step from which on the run has followed this plan over this length."""
        if self.start is None:
            return 0
        snapshot = self.start.snapshot
        same = snapshot.steps == self.optimizer.resolved.run.steps
        same &= snapshot.plan == plan_text(self.plan)[0]
        return snapshot.since if same else snapshot.clock

    def progress(self, position: Position) -> int:
        """Return steps that were taken or skipped up to a position."""
        of_epoch = -(-position.batches // self.dealing.accumulate)
        return position.epoch * (self.optimizer.resolved.run.steps_per_epoch or 0) + of_epoch

    @property
    def batches_in_a_step(self) -> int:
        """Of all processes together, as the task cuts them."""
        processes = int(self.accelerator.num_processes)
        return self.dealing.accumulate * processes // self.dealing.parts

    def data_form(self) -> dict[str, Any]:
        """Return what the training data must be alike in to go on in the middle of it."""
        loader, data = self.data.train, self.data.train.dataset
        return {
            "batches": len(self.train_loader),
            "batches_in_a_step": self.batches_in_a_step,
            "examples_in_a_batch": loader.batch_size,
            "examples": len(data) if hasattr(data, "__len__") else None,
        }


def batches(task: Task, loader: Any) -> int:
    """Return how many batches an epoch has."""
    try:
        number = len(loader)
    except TypeError as error:
        raise TaskError(
            f"{task.place}: the training loader has no length ({error}), so that "
            "neither epochs nor shares of the run can be counted; give its data set a __len__."
        ) from error
    if number == 0:
        raise TaskError(f"{task.place}: the training loader has no batches; give it examples.")
    return number

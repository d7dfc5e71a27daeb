"""`prepare` settles everything that can be wrong; `Session.train` then trains and writes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import nn

from ..errors import LaminaError, TaskError, require
from ..plan import Plan
from ..preview import Preview
from ..report.confirm import Confirmation
from .confirmer import Confirmer
from .evaluate import shard
from .interrupts import patient
from .loop import Loop
from .recorder import Recorder
from .records import Listener
from .run_folder import RunFolder, check_free
from .settings import Settings
from .task import Data, Task, load_task


@dataclass(frozen=True)
class Result:
    """What a run came to, on the main process; other processes have no folder and no baseline."""

    task: Task
    folder: Path | None
    saved: tuple[str, ...]
    metrics: dict[str, float]
    examples: int
    baseline: dict[str, float]
    confirmation: Confirmation | None
    steps: int
    seconds: float
    interrupted: bool = False


@dataclass
class Session:
    """A run that is ready to start; made by `prepare`, closed by `with` or `close`."""

    task: Task
    settings: Settings
    accelerator: Any
    model: nn.Module
    plan: Plan
    data: Data
    out: Path | None
    train_loader: Any = field(init=False)

    def __post_init__(self) -> None:
        accelerator, seed = self.accelerator, self.settings.seed
        self.train_loader = accelerator.prepare(self.data.train)
        self.validation_loader = shard(accelerator, self.data.validation, seed)
        self.optimizer = self.plan.build(
            self.model.to(accelerator.device),
            epochs=self.settings.epochs,
            steps_per_epoch=batches(self.task, self.train_loader),
            accumulate=self.settings.accumulate,
        )
        self.preview = Preview(self.optimizer.resolved)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return bool(self.accelerator.is_main_process)

    def train(self, listeners: Sequence[Listener] = ()) -> Result:
        """Train; a run that is interrupted saves its last whole step and says so.

        Args:
            listeners: told of every step, event and validation, on the main process.
        """
        began = time.perf_counter()
        folder = RunFolder(self.out, self.task.name) if self.is_main else None
        heard: list[Listener] = []
        confirmer = Confirmer(self.preview)
        recorder = None
        if folder is not None:
            folder.begin(self.plan, self.preview, self._about())
            recorder = Recorder(folder.path / "metrics.jsonl")
            folder.saved.append("metrics.jsonl")
            heard = [recorder, confirmer, *listeners]
        with patient(self.accelerator.num_processes == 1) as pressed:
            loop = self._loop(heard, pressed)
            interrupted, status = False, "failed"
            try:
                loop.run()
                status = "finished"
            except KeyboardInterrupt:
                interrupted, status = True, "interrupted"
            finally:
                if folder is not None and recorder is not None:
                    with suppress(Exception):  # an error of the device was told already
                        loop.flush(alone=True)
                    recorder.close()
                    if status != "failed" and loop.consistent:
                        self._checkpoint(folder, loop)
                    folder.end(status, **self._found(loop))
            baseline = {}
            if folder is not None and not interrupted:
                baseline = self.task.baseline(self.data)
                folder.end(status, baseline=baseline)
        last = loop.last
        return Result(
            self.task,
            folder.path if folder else None,
            tuple(folder.saved) if folder else (),
            last.averages if last else {},
            last.examples if last else 0,
            baseline,
            confirmer.result() if folder else None,
            self.optimizer.clock,
            time.perf_counter() - began,
            interrupted,
        )

    def _loop(self, heard: list[Listener], pressed: Any) -> Loop:
        from accelerate.utils import set_seed

        model, wrapped = self.accelerator.prepare(self.model, self.optimizer)
        # Processes must draw different dropout masks, now that all have the same model.
        set_seed(self.settings.seed, device_specific=True)
        return Loop(
            self.task,
            self.accelerator,
            model,
            self.optimizer,
            wrapped,
            self.train_loader,
            self.validation_loader,
            self.settings.accumulate,
            heard,
            pressed,
        )

    def _about(self) -> dict[str, Any]:
        run = self.optimizer.resolved.run
        return {
            "task": self.task.name,
            **asdict(self.settings),
            "steps": run.steps,
            "steps_per_epoch": run.steps_per_epoch,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
        }

    def _checkpoint(self, folder: RunFolder, loop: Loop) -> None:
        folder.checkpoint(
            task=self.task.name,
            model=self.accelerator.unwrap_model(loop.model).state_dict(),
            optimizer=self.optimizer.state_dict(),
            clock=self.optimizer.clock,
            settings=asdict(self.settings),
            plan=repr(self.plan),
            **self._found(loop),
        )

    def _found(self, loop: Loop) -> dict[str, Any]:
        found: dict[str, Any] = {"steps_taken": self.optimizer.clock}
        if loop.last is not None:
            found["validation"] = asdict(loop.last)
        return found

    def close(self) -> None:
        """End what Accelerate began, so that another run may follow in this process."""
        from accelerate.state import AcceleratorState, GradientState

        self.accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def prepare(
    task: Task | ModuleType | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    epochs: float | None = None,
    seed: int | None = None,
    accumulate: int | None = None,
    mixed_precision: str | None = None,
    cpu: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> Session:
    """Everything up to the first step; whatever is wrong fails here and leaves nothing behind.

    Args:
        task: a task, its module, or the path of its file.
        plan: a plan, or the path or text of one; by default the task's own.
        epochs: passes over the data, not necessarily whole ones.
        seed: of the weights, the order of the data and dropout.
        accumulate: batches per optimizer step.
        mixed_precision: "no", "fp16" or "bf16"; by default as `accelerate launch` says, else no.
        cpu: train on the CPU even if there is an accelerator.
        out: the folder of the run; by default a new one under `runs`.

    Raises:
        LaminaError: for a task, plan or setting that does not work.
    """
    require("accelerate", "train", "Training")
    require("matplotlib", "train", "Training (the picture of the plan)")
    task = load_task(task)
    settings = Settings.of(task, epochs, seed, accumulate, mixed_precision)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_free(folder)
    if plan is None:
        plan = task.plan()
    elif not isinstance(plan, Plan):
        plan = Plan.from_toml(plan)
    accelerator = settings.accelerator(cpu)
    session = None
    try:
        data = task.data(settings.seed)
        model = task.model()
        session = Session(task, settings, accelerator, model, plan, data, folder)
    finally:
        if session is None:
            accelerator.end_training()
    return session


def fit(
    task: Task | ModuleType | str | os.PathLike[str],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> Result:
    """Train a task by a plan: `prepare`, then `Session.train`; arguments as there."""
    with prepare(task, plan, **settings) as session:
        return session.train(listeners)


def batches(task: Task, loader: Any) -> int:
    """The batches of an epoch."""
    try:
        number = len(loader)
    except TypeError as error:
        raise TaskError(
            f"{task.place}: the training loader has no length ({error}), so that neither epochs nor "
            "shares of the run can be counted; give its data set a __len__."
        ) from error
    if number == 0:
        raise TaskError(f"{task.place}: the training loader has no batches; give it examples.")
    return number




"""`prepare` settles everything that can be wrong; `Session.train` then trains and writes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from torch import nn

from ..errors import TaskError, require
from ..plan import Plan
from ..preview import Preview
from .confirmer import Confirmer
from .evaluate import shard
from .interrupts import patient
from .load import choose_plan, load_task, placed
from .loop import Loop
from .recorder import Recorder
from .records import Listener
from .result import Result
from .run_folder import RunFolder, check_free
from .settings import Settings
from .task import Data, Task


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
        if not self.is_main:
            loop = self._loop([], lambda: False)
            loop.run()
            return self._result(loop, began)
        folder, confirmer = RunFolder(self.out, self.task.name), Confirmer()
        folder.begin(self.plan, self.preview, self._about())
        recorder = Recorder(folder.path / "metrics.jsonl")
        folder.saved.append("metrics.jsonl")
        with patient(self.accelerator.num_processes == 1) as pressed:
            loop = self._loop([recorder, confirmer, *listeners], pressed)
            status = self._run(loop, folder, recorder)
        baseline: dict[str, float] = {}
        if status == "finished":
            try:
                baseline = self.task.baseline(self.data)
                folder.end(status, baseline=baseline)
            except KeyboardInterrupt:
                status = "interrupted"
        return replace(
            self._result(loop, began),
            folder=folder.path,
            saved=tuple(folder.saved),
            baseline=baseline,
            confirmation=confirmer.confirm(self.optimizer),
            interrupted=status == "interrupted",
        )

    def _run(self, loop: Loop, folder: RunFolder, recorder: Recorder) -> str:
        """Train, and write what came of it however it ends."""
        status = "failed"
        try:
            loop.run()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            with suppress(RuntimeError):  # an error of the device, which is told already
                loop.flush(alone=True)
            recorder.close()
            if status != "failed" and loop.consistent:
                self._checkpoint(folder, loop)
            folder.end(status, **self._found(loop))
        return status

    def _result(self, loop: Loop, began: float) -> Result:
        last = loop.last
        return Result(
            self.task,
            metrics=last.averages if last else {},
            examples=last.examples if last else 0,
            steps=self.optimizer.clock,
            seconds=time.perf_counter() - began,
        )

    def _loop(self, heard: Sequence[Listener], pressed: Callable[[], bool]) -> Loop:
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
        end(self.accelerator)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:  # no process may end its group while another still talks to it
            self.accelerator.wait_for_everyone()
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
    chosen, place = choose_plan(task, plan)
    accelerator = settings.accelerator(cpu)
    session = None
    try:
        data = task.data(settings.seed)
        model = task.model()
        with placed(place):
            session = Session(task, settings, accelerator, model, chosen, data, folder)
    finally:
        if session is None:
            end(accelerator)
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
            f"{task.place}: the training loader has no length ({error}), so that "
            "neither epochs nor shares of the run can be counted; give its data set a __len__."
        ) from error
    if number == 0:
        raise TaskError(f"{task.place}: the training loader has no batches; give it examples.")
    return number


def end(accelerator: Any) -> None:
    """End the processes' group and forget the settings, which Accelerate keeps as globals."""
    from accelerate.state import AcceleratorState, GradientState

    accelerator.end_training()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

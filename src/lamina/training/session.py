"""A run that is ready to start, and its life."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from .._util.randomness import Randomness
from ..checkpoint import tidy
from ..errors import PlanError
from ..optimizer.optimizer import Optimizer
from ..preview import preview_of
from ..reuse import Forecast
from ..schedules.duration import run_of
from .confirmer import Confirmer
from .devices import naming_lost_processes
from .evaluate import check_watched
from .folder_lock import FolderLock
from .interrupts import graceful_interrupt, signal_of
from .loaders import training_loader, validation_loader
from .loop import Loop
from .position import Position
from .ready import ReadyRun, batches
from .recorder import Recorder, cut_back, recorded_lr
from .records import Event, Listener
from .result import Result
from .resume import check_fits, restore
from .reuse_forecast import forecast_run
from .reuse_settings import ReuseSettings
from .run_folder import FILES, METRICS, RunFolder, check_free, make_folder
from .run_reuse import RunReuse
from .saver import Saver
from .sharding import choose_blocks
from .snapshot import Snapshot


@dataclass
class Session(ReadyRun):
    """A run that is ready to start; made by `prepare_run`, closed by `with` or `close`."""

    def __post_init__(self) -> None:
        accelerator, seed = self.accelerator, self.settings.seed
        self.dealing.cut(self.data.train)
        self.reuse = RunReuse(ReuseSettings.of(self.settings.reuse), accelerator)
        train = self.reuse.loader(self.data.train, "train")
        validation = self.reuse.loader(self.data.validation, "validation")
        self.train_loader = training_loader(accelerator, train)
        self.validation_loader = validation_loader(accelerator, validation, seed)
        self.randomness = Randomness(accelerator.device, self.train_loader, self.validation_loader)
        if self.start is not None:
            check_fits(self.start, self)
        model = self.model.to(accelerator.device)
        run = run_of(
            epochs=self.settings.epochs,
            steps_per_epoch=batches(self.task, self.train_loader),
            accumulate=self.dealing.accumulate,
        )
        saved = None if self.start is None else self.start.snapshot.optimizer
        self.preview = preview_of(self.plan, model, run, saved, self.extend)
        # Not by plan.build, which warns of the findings: the preview prints them.
        self.optimizer = Optimizer(self.plan, model, run, resume=saved, extend=self.extend)
        self.last = None if self.start is None else self.start.snapshot.last
        self.begins = Position() if self.start is None else restore(self.start, self)
        check_watched(self)
        self.forecast = self._forecast()

    def _forecast(self) -> Forecast | None:
        """Return what reuse will save, on the process that says so."""
        if self.reuse.settings is None or not self.is_main:
            return None
        given = (self.reuse.settings, self.task, self.data, self.model, self.optimizer)
        try:
            return forecast_run(*given, self.accelerator.device, self.accelerator.autocast())
        except PlanError as error:
            self.reuse.give_up(error)
            return None

    def train(self, listeners: Sequence[Listener] = ()) -> Result:
        """Train; a run that is interrupted saves its last whole step and says so.

        Args:
            listeners: told of every step, event and validation, on the main process.

        Raises:
            LaminaError: if another process of the run is gone, or a file cannot be written.
        """
        with naming_lost_processes(self.accelerator):
            return self._train(listeners)

    def _train(self, listeners: Sequence[Listener]) -> Result:
        began = time.perf_counter() - self.earlier
        if self.start is not None:  # no process may still read what this one tidies
            self.accelerator.wait_for_everyone()
        if not self.is_main:
            saver = Saver(self)
            loop = self._loop([], lambda: None, saver, None)
            loop.run()
            saver.finish(loop)
            self.reuse.close()
            return self._result(began)
        with graceful_interrupt(self.accelerator.num_processes == 1) as asked_to_stop:
            folder, confirmer = self._folder(listeners)
            with folder.closing(self._found):
                with closing(Recorder(folder.path / METRICS)) as recorder:
                    saver = Saver(self, recorder)
                    heard: list[Listener] = [recorder, confirmer, *listeners]
                    loop = self._loop(heard, asked_to_stop, saver, folder.path)
                    stopped = self._run(loop, saver)
                if stopped:
                    folder.end("interrupted", **self._found())
            stopped = stopped and (asked_to_stop() or stopped)
        baseline: dict[str, float] = {}
        if stopped is None:
            try:
                baseline = self.task.baseline(self.data)
            except KeyboardInterrupt as error:
                stopped = signal_of(error)
            finally:  # written once: a run that says so has nothing left to do
                folder.end("finished", baseline=baseline, **self._found())
                self.reuse.finish(folder.path)
        return self._result(
            began,
            folder=folder.path,
            saved=tuple(name for name in FILES if (folder.path / name).exists()),
            checkpoint=saver.newest,
            baseline=baseline,
            confirmation=confirmer.confirm(self.optimizer),
            interrupted=stopped,
        )

    def _folder(self, listeners: Sequence[Listener]) -> tuple[RunFolder, Confirmer]:
        """Return the folder of the run, ready to be written to, and what it has recorded so far."""
        start = self.start
        if start is None:
            folder = RunFolder(make_folder(self.out, self.task.name))
            self.undo.callback(FolderLock(folder.path).release)
            check_free(folder.path)  # again: another run may have chosen it at the same moment
            folder.begin(self.plan, self.preview, self._about())
            return folder, Confirmer(0)
        snapshot, metrics = start.snapshot, start.folder / METRICS
        lr, unread = recorded_lr(metrics, snapshot.recorded, snapshot.clock)
        cut_back(metrics, snapshot.recorded)
        tidy(start.path.parent, start.damaged)
        folder = RunFolder(start.folder)
        passed = [path.name for path in start.damaged]
        changed = str(self.optimizer.last_load).splitlines()[1:]
        if snapshot.processes != self.accelerator.num_processes:
            changed.append(self._dealt_anew(snapshot.processes))
        if unread:
            changed.append(f"{METRICS}: skipped {unread} damaged line{'s' * (unread > 1)}")
        seen = {"from": start.path.name, "step": snapshot.clock, "passed_over": passed}
        folder.resume(self.plan, self.preview, self._about(), **seen, changed=changed)
        text = f"resumed from {start.path.name} ({_place(snapshot)})"
        if passed:
            text += f"; skipped damaged checkpoints: {', '.join(passed)}"
        text = "; ".join([text, *changed])
        for listener in listeners:
            listener.on_event(Event(snapshot.clock, snapshot.epoch, "resumed", text))
        lr = lr[max(0, len(lr) - (snapshot.clock - self.since)) :]  # what followed this plan
        confirmer = Confirmer(snapshot.clock - len(lr))
        for values in lr:
            confirmer.note(values)
        return folder, confirmer

    def _dealt_anew(self, before: int) -> str:
        now, dealing = self.accelerator.num_processes, self.dealing
        each = f"{dealing.accumulate} batch{'es' * (dealing.accumulate > 1)} of each in a step"
        if dealing.parts > 1:
            each += f", 1/{dealing.parts} of the size"
        return f"processes: {before} before, {now} now; {each}, so that it has the same examples"

    def _run(self, loop: Loop, saver: Saver) -> Signals | None:
        """Train, and save what came of it if that was interrupted.

        Returns:
            The signal that stopped the run, or None if it went to its end.
        """
        stopped = None
        try:
            loop.run()
            saver.finish(loop)
        except KeyboardInterrupt as error:
            stopped = signal_of(error)
        finally:
            with suppress(RuntimeError):  # an error of the device, which is told already
                loop.flush(alone=True)
            # Several processes would have to tell each other their random states.
            if stopped and loop.consistent and self.accelerator.num_processes == 1:
                saver.finish(loop)
        return stopped

    def _result(self, began: float, **more: Any) -> Result:
        metrics, examples = (self.last.averages, self.last.examples) if self.last else ({}, 0)
        seconds = time.perf_counter() - began
        more["reuse"] = self.reuse.report()
        return Result(self.task, metrics, examples, self.optimizer.clock, seconds, **more)

    def _loop(
        self,
        heard: Sequence[Listener],
        pressed: Callable[[], object],
        saver: Saver,
        home: Path | None,
    ) -> Loop:
        from accelerate.utils import set_seed

        choose_blocks(self.accelerator, self.model)
        model, wrapped = self.accelerator.prepare(self.model, self.optimizer)
        # Processes must draw different dropout masks, now that all have the same model.
        set_seed(self.settings.seed, device_specific=True)
        self.reuse.begin(self.model, model, self.optimizer, home)
        self.undo.callback(self.reuse.close)
        return Loop(self, model, wrapped, heard, pressed, saver.at_rest)

    def _about(self) -> dict[str, Any]:
        run = self.optimizer.resolved.run
        return {
            "task": self.task.name,
            "task_file": self.task.file,
            **asdict(self.settings),
            "extend": self.extend,
            "steps": run.steps,
            "steps_per_epoch": run.steps_per_epoch,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
        }

    def _found(self) -> dict[str, Any]:
        found: dict[str, Any] = {"steps_taken": self.optimizer.clock}
        if self.last is not None:
            found["validation"] = asdict(self.last)
        if (reused := self.reuse.report()) is not None:
            found["reused"] = asdict(reused)
        return found

    def close(self) -> None:
        """End what Accelerate began, so that another run may follow in this process."""
        self.undo.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # no process may end its group while another still talks to it
            self.accelerator.wait_for_everyone()
        self.close()


def _place(snapshot: Snapshot) -> str:
    """Return where in the data a snapshot was taken."""
    if snapshot.batches == 0:
        return f"start of epoch {snapshot.epoch + 1}"
    return f"epoch {snapshot.epoch + 1}, batch {snapshot.batches}"

"""When a run is saved, and what is kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import FOLDER, mark_best, prune, save
from .ready import ReadyRun
from .recorder import Recorder
from .run_folder import plan_text, versions
from .snapshot import Snapshot, as_plain, position_states

if TYPE_CHECKING:
    from .loop import Loop


class Saver:
    """Saves every so often, after a validation that is the best so far, and at the end.

    Every process has one, since each gives its random states; the main one writes.

    Args:
        session: the run.
        folder: that of the run; None on processes that do not write.
        recorder: writes `metrics.jsonl`, whose length is saved; None there too.
    """

    def __init__(
        self, session: ReadyRun, folder: Path | None = None, recorder: Recorder | None = None
    ) -> None:
        self._session, self._recorder = session, recorder
        self._folder = None if folder is None else folder / FOLDER
        self._every = session.settings.save_interval(session.optimizer.resolved.run)
        self._keep = session.settings.keep
        stop = session.plan.stop
        self._watched, self._mode = (stop.metric, stop.mode) if stop else ("val_loss", "min")
        start = session.start
        #: how far the run was when it was saved last, and whether it was validated there
        self._saved = (session.progress(session.begins), session.begins.validated)
        self.best: dict[str, Any] | None = None if start is None else start.snapshot.best
        self.newest: Path | None = None if start is None else start.path

    def at_rest(self, loop: Loop) -> None:
        """Save if it is time; called between steps and after validations."""
        better = loop.position.validated and self._improved(loop)
        last = self._saved[0]
        due = math.floor(self._now(loop)[0] / self._every) > math.floor(last / self._every)
        if due or better:
            self.save(loop)
        if better and self.newest is not None and self._folder is not None:
            mark_best(self.newest)

    def finish(self, loop: Loop) -> None:
        """Save what is not saved yet."""
        if self._saved != self._now(loop):
            self.save(loop)

    def _now(self, loop: Loop) -> tuple[int, bool]:
        return self._session.progress(loop.position), loop.position.validated

    def save(self, loop: Loop) -> None:
        """Write a checkpoint, then remove what is no longer kept."""
        session = self._session
        loop.flush()
        loop.position = loop.position.settled(loop.randomness)
        states = [position_states(loop.position)]
        if session.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            states = gather_object(states)
        if self._folder is not None and self._recorder is not None:
            content = self._snapshot(loop, states, self._recorder.sync()).content()
            self.newest = save(self._folder, session.optimizer.clock, content)
            prune(self._folder, self._keep, self.newest)
        self._saved = self._now(loop)

    def _improved(self, loop: Loop) -> bool:
        """Return whether the last validation is the best so far; NaN never is."""
        averages = loop.last.averages if loop.last is not None else {}
        value = averages.get(self._watched.removeprefix("val_"))
        if value is None or math.isnan(value):
            return False
        if self.best is not None and self.best["metric"] == self._watched:
            sign = 1 if self._mode == "min" else -1
            if sign * value >= sign * self.best["value"]:
                return False
        step = self._session.optimizer.clock
        self.best = {"metric": self._watched, "value": value, "step": step}
        return True

    def _snapshot(self, loop: Loop, states: list[Any], recorded: int) -> Snapshot:
        session, position = self._session, loop.position
        scaler = session.accelerator.scaler
        precision = session.accelerator.mixed_precision  # also where the launcher chose it
        return Snapshot(
            task=session.task.name,
            plan=plan_text(session.plan)[0],
            settings=asdict(session.settings) | {"mixed_precision": precision},
            data=session.data_form(),
            processes=session.accelerator.num_processes,
            clock=session.optimizer.clock,
            skipped=session.optimizer.skipped,
            since=session.since,
            steps=session.optimizer.resolved.run.steps or 0,
            epoch=position.epoch,
            batches=position.batches,
            validated=position.validated,
            seconds=loop.seconds,
            recorded=recorded,
            validation=as_plain(loop.last),
            best=self.best,
            random=states,
            scaler=None if scaler is None else scaler.state_dict(),
            versions=versions(),
            model=session.model.state_dict(),
            optimizer=session.optimizer.state_dict(),
        )

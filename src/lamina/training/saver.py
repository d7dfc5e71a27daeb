"""When a run is saved, and what is kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import FOLDER, mark_best, prune, save
from ..checkpoint.sharded import SHARDS, begin_shards, write_shards
from ..schedules.duration import parse
from .loop import Loop
from .ready import ReadyRun
from .recorder import Recorder
from .run_folder import plan_text, versions
from .sharding import is_sharded
from .snapshot import Snapshot


class Saver:
    """Saves every so often, after a validation that is the best so far, and at the end.

    Every process has one, since each gives its random states; the main one writes.

    Args:
        session: the run.
        recorder: writes `metrics.jsonl` in the folder of the run, whose length is saved; None on
            processes that do not write.
    """

    def __init__(self, session: ReadyRun, recorder: Recorder | None = None) -> None:
        self._session, self._recorder = session, recorder
        # In steps, not rounded.
        self._every = parse(session.settings.save_every).in_steps(session.optimizer.resolved.run)
        stop = session.plan.stop
        self._watched, self._mode = (stop.metric, stop.mode) if stop else ("val_loss", "min")
        start = session.start
        #: how far the run was when it was saved last, and whether it was validated there
        self._saved = (session.progress(session.begins), session.begins.validated)
        self.best: dict[str, Any] | None = None if start is None else start.snapshot.best
        self.newest: Path | None = None if start is None else start.path

    def at_rest(self, loop: Loop) -> None:
        """Save if it is time; called between steps and after validations."""
        better = loop.position.validated and self._improved()
        due = self._now(loop)[0] // self._every > self._saved[0] // self._every
        if due or better:
            self.save(loop)
        if better and self.newest is not None and self._recorder is not None:
            mark_best(self.newest)

    def finish(self, loop: Loop) -> None:
        """Save what is not saved yet."""
        if self._saved != self._now(loop):
            self.save(loop)

    def _now(self, loop: Loop) -> tuple[int, bool]:
        return self._session.progress(loop.position), loop.position.validated

    def save(self, loop: Loop) -> None:
        """Write a checkpoint, then remove what is no longer kept."""
        from accelerate.utils import gather_object

        session = self._session
        loop.flush()
        position = loop.position = loop.position.settled(loop.randomness)
        own = {"start": position.start, "before": position.before, "after": position.after}
        states = gather_object([own])
        shards = self._write_shards() if is_sharded(session.accelerator) else {}
        if self._recorder is not None:
            folder = self._recorder.path.parent / FOLDER
            content = vars(self._snapshot(loop, states, self._recorder.sync(), bool(shards)))
            if shards:
                content[SHARDS] = shards
            self.newest = save(folder, session.optimizer.clock, content, sharded=bool(shards))
            prune(folder, session.settings.keep, self.newest)
        self._saved = self._now(loop)

    def _write_shards(self) -> dict[str, str]:
        """Write this process' part of model and state; returns the checksums of all parts."""
        from accelerate.utils import broadcast_object_list, gather_object

        home = [""]  # of which only the main process knows
        if self._recorder is not None:
            path = self._recorder.path.parent.resolve() / FOLDER
            begin_shards(path)
            home = [str(path)]
        broadcast_object_list(home)
        session = self._session
        return write_shards(Path(home[0]), session.model, session.optimizer, gather_object)

    def _improved(self) -> bool:
        """Return whether the last validation is the best so far; NaN never is."""
        last = self._session.last
        averages = last.averages if last is not None else {}
        value = averages.get(self._watched.removeprefix("val_"))
        if value is None or math.isnan(value):
            return False
        if self.best is not None and self.best["metric"] == self._watched:
            sign = 1 if self._mode == "min" else -1
            if sign * value >= sign * self.best["value"]:
                return False
        self.best = {"metric": self._watched, "value": value, "step": self._session.optimizer.clock}
        return True

    def _snapshot(self, loop: Loop, states: list[Any], recorded: int, sharded: bool) -> Snapshot:
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
            validation=None if session.last is None else asdict(session.last),
            best=self.best,
            random=states,
            scaler=None if scaler is None else scaler.state_dict(),
            versions=versions(),
            model={} if sharded else session.model.state_dict(),
            optimizer={} if sharded else session.optimizer.state_dict(),
        )

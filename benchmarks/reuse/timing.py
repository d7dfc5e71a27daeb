"""Steps, epochs and whole runs with and without reuse, in turns within one run."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lamina as lm

from ..measure import Timing
from .workloads import Batch, Stage, Workload

LR = 1e-4
WITHOUT, MEMORY, FILES = "without reuse", "reuse", "reuse, in files"
SPACE = "8 GB"


class Trainee:
    """A model of its own that trains with or without reuse; its random numbers are its own too."""

    def __init__(
        self, workload: Workload, plan: lm.Plan, epochs: int, *, reuse: bool, folder: Path | None
    ) -> None:
        torch.manual_seed(0)
        self.workload, self.folder = workload, folder
        self.model = workload.model().train()
        self.optimizer = plan.build(
            self.model, epochs=epochs, steps_per_epoch=workload.steps_per_epoch
        )
        self.losses: list[float] = []
        #: milliseconds of each step, by epoch
        self.times: list[list[float]] = [[] for _ in range(epochs)]
        start = time.perf_counter()
        self.reused = (
            lm.reuse(self.model, self.optimizer, space=SPACE, folder=folder) if reuse else None
        )
        self.setup_ms = 1e3 * (time.perf_counter() - start)
        self.stored_bytes = 0
        self._random = torch.get_rng_state()

    def step(self, epoch: int, batch: Batch) -> None:
        """Train with a batch; forward, backward, clip and optimizer are timed."""
        torch.set_rng_state(self._random)
        start = time.perf_counter()
        loss = self.workload.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times[epoch].append(1e3 * (time.perf_counter() - start))
        self._random = torch.get_rng_state()
        self.losses.append(loss.item())
        if self.reused is not None:  # a thaw gives room back
            self.stored_bytes = max(self.stored_bytes, self.reused.store.used)

    def same_bits(self, other: Trainee) -> bool:
        """Whether all losses, weights and buffers are equal, bit for bit."""
        mine, theirs = self.model.state_dict(), other.model.state_dict()
        return self.losses == other.losses and all(
            torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
        )

    def epoch_ms(self) -> list[float]:
        return [sum(steps) for steps in self.times]

    def whole_ms(self) -> float:
        return self.setup_ms + sum(self.epoch_ms())

    def row(self, base: Trainee) -> dict[str, Any]:
        """What is reported of it, beside the one without reuse."""
        first, later = Timing(tuple(self.times[0])), self._later()
        row = {
            "first_epoch_step_ms": round(first.median, 3),
            "median_ms": round(later.median, 3),
            "middle_half_ms": [round(value, 3) for value in later.middle_half],
            "epochs_ms": [round(value, 1) for value in self.epoch_ms()],
            "ratio": round(later.median / base._later().median, 4),
            "epoch_ratio": round(_last(self.epoch_ms()) / _last(base.epoch_ms()), 4),
            "first_epoch_ratio": round(self.epoch_ms()[0] / base.epoch_ms()[0], 4),
            "same_bits": self.same_bits(base),
        }
        if self.reused is not None:
            row["stored_bytes"] = self.stored_bytes
            row["refused"] = dict(self.reused.refused)
        if self.folder is not None:
            row["disk_bytes"] = disk_bytes(self.folder)
        return row

    def _later(self) -> Timing:
        return Timing(tuple(value for steps in self.times[1:] for value in steps))


def _last(epochs: Sequence[float]) -> float:
    return min(epochs[1:])


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def stage_plan(workload: Workload, stage: Stage) -> lm.Plan:
    """Train one part, and keep the rest frozen."""
    rules = [lm.Rule("*", frozen=True), lm.Rule(stage.trains, frozen=False)]
    return _plan(workload, rules)


def tune_plan(workload: Workload, stage: Stage, probe_epochs: int) -> lm.Plan:
    """Train the head alone for some epochs, then another part with it."""
    rules = [lm.Rule("*", frozen=True)]
    if stage.trains == "*":
        rules.clear()
    rules += [
        lm.Rule(stage.trains, thaw=f"{probe_epochs} epochs"),
        lm.Rule(workload.stages[0].trains, frozen=False),
    ]
    return _plan(workload, rules)


def _plan(workload: Workload, rules: list[lm.Rule]) -> lm.Plan:
    if workload.rests:
        rules.append(lm.Rule(workload.rests, frozen=True))
    return lm.Plan(lm.AdamW, lr=LR, clip_norm=1.0, rules=rules)


def side_by_side(
    workload: Workload, plan: lm.Plan, epochs: int, folder: Path | None = None
) -> tuple[dict[str, Trainee], Any]:
    """Train without and with reuse, step by step in turns.

    Args:
        workload: what is trained.
        plan: by which all of them train.
        epochs: how many.
        folder: of a third one, whose outputs are stored in files.

    Returns:
        The trained ones, and what the preview predicted before the first step.
    """

    def build(reuse: bool, where: Path | None = None) -> Trainee:
        return Trainee(workload, plan, epochs, reuse=reuse, folder=where)

    trainees = {WITHOUT: build(False), MEMORY: build(True)}
    if folder is not None:
        trainees[FILES] = build(True, folder)
    reused = trainees[MEMORY].reused
    assert reused is not None
    predicted = reused.preview(workload.count, *workload.arguments(workload.epoch(0)[0]))
    draw, names = random.Random(0), list(trainees)
    for epoch in range(epochs):
        for batch in workload.epoch(epoch):
            draw.shuffle(names)
            for name in names:
                trainees[name].step(epoch, batch)
    for trainee in trainees.values():
        if trainee.reused is not None:
            trainee.reused.close()
    return trainees, predicted


def stage_rows(workload: Workload, stage: Stage, epochs: int) -> dict[str, Any]:
    """A stage: the steps from the second epoch on, and the space that is used."""
    with tempfile.TemporaryDirectory() as folder:
        plan = stage_plan(workload, stage)
        trainees, predicted = side_by_side(workload, plan, epochs, Path(folder))
        rows = {name: each.row(trainees[WITHOUT]) for name, each in trainees.items()}
    return {
        "workload": workload.name,
        "title": workload.title,
        "stage": stage.label,
        "limit": stage.limit,
        "epochs": epochs,
        "steps_per_epoch": workload.steps_per_epoch,
        "estimated_bytes": predicted.space,
        "estimated_saved": round(predicted.stages[0].saved, 4),
        "rows": rows,
    }


def tune_rows(workload: Workload, stage: Stage, probe: int, after: int) -> dict[str, Any]:
    """A linear probe, then fine-tuning: the time of the whole run, preparation included."""
    plan = tune_plan(workload, stage, probe)
    trainees, predicted = side_by_side(workload, plan, probe + after)
    base, reused = trainees[WITHOUT], trainees[MEMORY]
    return {
        "workload": workload.name,
        "title": workload.title,
        "then": stage.label,
        "limit": stage.limit,
        "epochs": [probe, after],
        "estimated_bytes": predicted.space,
        "stored_bytes": reused.stored_bytes,
        "epochs_ms": {
            name: [round(value, 1) for value in each.epoch_ms()] for name, each in trainees.items()
        },
        "seconds": {name: round(each.whole_ms() / 1e3, 2) for name, each in trainees.items()},
        "ratio": round(reused.whole_ms() / base.whole_ms(), 4),
        "same_bits": reused.same_bits(base),
    }

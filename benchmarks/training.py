"""Whole training steps of the example tasks: the optimizer's share, and the stages of a thaw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lamina as lm
from lamina.training.example_tasks import example_tasks
from lamina.training.load import load_task
from lamina.training.task import Task

from .candidates import CLIP
from .measure import Contestant, Timing, race
from .memory import profile_step

RATE = 1e-5
ALL = "all trainable"
#: steps between two stages of a thaw: many more than are measured
EVERY = 1000
#: steps before the measured ones
WARMUP = 1


@dataclass(frozen=True)
class Thaw:
    """How a task thaws: its layers from the top, then what lies below them.

    `stages` are the numbers of layers at which it is measured, of `layers` in all.
    """

    pattern: str
    below: str
    layers: int
    stages: tuple[int, ...]

    def plan(self) -> lm.Plan:
        rules = [
            lm.Rule(self.pattern, thaw=lm.top_down(every=EVERY)),
            lm.Rule(self.below, thaw=(self.layers + 1) * EVERY),
        ]
        return lm.Plan(lm.AdamW, lr=RATE, clip_norm=CLIP, rules=rules)


THAWS = {
    "reviews": Thaw("encoder.layer.{depth}.*", "embeddings.*", 6, (0, 1, 2, 3, 4, 5, 6)),
    "digits": Thaw("_blocks.{depth}.*", "_conv_stem.* | _bn0.*", 16, (0, 4, 8, 12, 16)),
}


class Trainee:
    """A model of its own with an optimizer; a step is forward, backward, clip and step."""

    def __init__(
        self,
        task: Task,
        build: Callable[..., Any],
        batch: Any,
        *,
        clip: bool = False,
        kept: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.task, self.batch, self.kept = task, batch, kept
        self.model = task.model().train()
        self.params = list(self.model.parameters())
        self.clip = clip
        self.optimizer = build(self.model)
        #: milliseconds of clip and step, in every step so far
        self.spent: list[float] = []

    def step(self) -> None:
        self.task.loss(self.model, self.batch).backward()
        start = time.perf_counter()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        self.optimizer.step()
        self.spent.append(1e3 * (time.perf_counter() - start))

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.kept)

    def contestant(self) -> Contestant:
        return Contestant(self.step, after=self.clear)

    @property
    def trainable(self) -> int:
        return sum(param.numel() for param in self.params if param.requires_grad)

    @property
    def state_bytes(self) -> int:
        tensors = (value for entry in self.optimizer.state.values() for value in entry.values())
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def peak_bytes(self) -> int:
        """The most memory at one time that a step takes, beyond weights and state."""
        peak: int = profile_step(self.step)["peak_bytes"]
        self.clear()
        return peak


def training_rows(name: str, rounds: int, *, kept: bool = False) -> dict[str, Any]:
    """Steps of a task in which all of it trains, with the optimizer's share of each."""
    task, batch = _task(name)
    adamw = torch.optim.AdamW
    builds: dict[str, Callable[[Any], Any]] = {
        "torch default": lambda model: adamw(model.parameters(), lr=RATE),
        "torch foreach": lambda model: adamw(model.parameters(), lr=RATE, foreach=True),
        "torch fused": lambda model: adamw(model.parameters(), lr=RATE, fused=True),
        "torch fused again": lambda model: adamw(model.parameters(), lr=RATE, fused=True),
        "lamina plan": lm.Plan(lm.AdamW, lr=RATE, clip_norm=CLIP).build,
    }
    trainees = {
        label: Trainee(task, build, batch, clip=label.startswith("torch"), kept=kept)
        for label, build in builds.items()
    }
    times = race({label: each.contestant() for label, each in trainees.items()}, rounds, WARMUP)
    rows = {}
    for label, trainee in trainees.items():
        spent = Timing(tuple(trainee.spent[-rounds:]))
        rows[label] = {
            "median_ms": round(times[label].median, 3),
            "middle_half_ms": [round(value, 3) for value in times[label].middle_half],
            "optimizer_ms": round(spent.median, 3),
            "optimizer_share": round(spent.median / times[label].median, 4),
        }
    return {"title": f"{name}: forward, backward, clip and step with AdamW", "rows": rows}


def thaw_rows(name: str, rounds: int) -> dict[str, Any]:
    """Steps of a task at the stages of a thaw, beside all of it trainable from the start."""
    task, batch = _task(name)
    thaw = THAWS[name]
    whole = lm.Plan(lm.AdamW, lr=RATE, clip_norm=CLIP)
    trainees = {each: Trainee(task, whole.build, batch) for each in (ALL, f"{ALL} again")}
    labels = {layers: f"top {layers}" if layers else "head" for layers in thaw.stages}
    labels[thaw.layers + 1] = "all thawed"
    for layers, label in labels.items():
        trainees[label] = Trainee(task, _at_stage(thaw.plan(), layers), batch)
    times = race({label: each.contestant() for label, each in trainees.items()}, rounds, WARMUP)
    rows = {
        label: {
            "median_ms": round(times[label].median, 3),
            "middle_half_ms": [round(value, 3) for value in times[label].middle_half],
            "trainable": each.trainable,
            "state_bytes": each.state_bytes,
            "peak_bytes": each.peak_bytes(),
        }
        for label, each in trainees.items()
    }
    return {"title": f"{name}: stages of a thaw from the top, with AdamW", "rows": rows}


def _at_stage(plan: lm.Plan, stage: int) -> Callable[[Any], Any]:
    def build(model: Any) -> Any:
        optimizer = plan.build(model, steps=50 * EVERY)
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["clock"] = stage * EVERY
        optimizer.load_state_dict(state)
        return optimizer

    return build


def _task(name: str) -> tuple[Task, Any]:
    """An example task and the first batch of its training data."""
    task = load_task(name, example_tasks())
    return task, next(iter(task.data(seed=0).train))

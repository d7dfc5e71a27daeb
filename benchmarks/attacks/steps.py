"""A long run with many windows, overrides and reports: neither the step nor the state grows.

Each step is timed beside one of a plan without all that, so that the judgement is of the run and
not of what else the machine did meanwhile. A step that thaws or freezes looks at all plans in
force, so that those which nobody holds any more are collected before.
"""

from __future__ import annotations

import copy
import gc
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import lamina as lm

from .count import Counts, Wrong

#: the last steps may take so much more CPU time than the early ones
MOST = 1.1
#: bytes of the pickled state, of which weights, moments and settings are about 6,000
MOST_BYTES = 40_000
WINDOWS = 40


@dataclass
class Long:
    """What was measured of a run.

    Args:
        steps: how many it has.
        sizes: bytes of the pickled state after so many steps.
        times: nanoseconds of each step.
        plain: nanoseconds of the step beside it, of a plan without windows.
    """

    steps: int
    sizes: dict[int, int] = field(default_factory=dict)
    times: list[int] = field(default_factory=list)
    plain: list[int] = field(default_factory=list)

    def ratios(self) -> tuple[float, float]:
        """Return late steps over early ones: as they are, and in units of the plain step."""
        early, late = slice(50, max(100, self.steps // 40)), slice(-max(50, self.steps // 40), None)
        times = [statistics.median(self.times[part]) for part in (early, late)]
        plain = [statistics.median(self.plain[part]) for part in (early, late)]
        raw = times[1] / times[0]
        return raw, raw / (plain[1] / plain[0])

    def table(self) -> str:
        """Return the measurements as a markdown table."""
        lines = [
            "| steps | us of CPU time a step | plain step beside it | pickled state, bytes |",
            "|---|---|---|---|",
        ]
        ends = [min(500, self.steps // 2), *self.sizes]
        for end in ends:
            part = slice(max(50, end - 500), end)
            took, plain = (
                statistics.median(each[part]) / 1000 for each in (self.times, self.plain)
            )
            size = self.sizes.get(end, "")
            lines.append(f"| {part.start}-{end} | {took:.0f} | {plain:.0f} | {size} |")
        raw, ratio = self.ratios()
        lines.append(f"\nlast 500 steps / steps 50-500: {raw:.3f}; beside plain ones: {ratio:.3f}")
        return "\n".join(lines)


def long_run(steps: int, clock: Callable[[], int]) -> Long:
    """Take the steps, with an override every 10 and a report every 50."""
    gc.collect()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    every = steps // WINDOWS
    plan = lm.Plan(
        lm.AdamW,
        lr=1e-3,
        schedule=lm.cosine(to=0.1),
        feedback=lm.plateau("loss", patience=3, factor=0.9, min_factor=1e-3),
        rules=[
            lm.Rule(
                "0",
                thaw=[*range(every // 10, steps, every)],
                freeze=[*range(every // 2, steps, every)],
                rewarm=lm.warmup(max(1, every // 25)),
            )
        ],
    )
    optimizer = plan.build(model, steps=steps)
    beside = copy.deepcopy(model)
    plain = lm.Plan(lm.AdamW, lr=1e-3).build(beside, steps=steps)
    measured = Long(steps)
    for step in range(steps):
        for param in [*model.parameters(), *beside.parameters()]:
            param.grad = torch.full_like(param, 0.01)
        measured.times.append(timed(optimizer.step, clock))
        measured.plain.append(timed(plain.step, clock))
        if step % 10 == 0:
            optimizer.override(lr=1e-3 + 1e-7 * (step % 1000), rule=("0", None)[step // 10 % 2])
        if step % 50 == 0:
            optimizer.report(loss=1.0 + step % 7)
        if (step + 1) % (steps // 10) == 0:
            measured.sizes[step + 1] = len(pickle.dumps(optimizer.state_dict()))
    return measured


def timed(step: Callable[[], object], clock: Callable[[], int]) -> int:
    begin = clock()
    step()
    return clock() - begin


def steps(
    full: bool = True, clock: Callable[[], int] = time.process_time_ns, show: bool = True
) -> list[Counts]:
    """Judge a long run twice: by the time of its steps, and by the size of its state."""
    measured = long_run(20_000 if full else 400, clock)
    if show:
        print(measured.table(), "\n")
    times = Counts("time of a step in a long run")
    times.attempt("last / early", lambda: judge_times(measured))
    sizes = Counts("size of the state in a long run")
    sizes.attempt("at the end", lambda: judge_sizes(measured, full))
    return [times, sizes]


def judge_times(measured: Long) -> str:
    raw, ratio = measured.ratios()
    if ratio > MOST:
        raise Wrong(f"the last steps take {ratio:.2f} ({raw:.2f}) times as long as the early ones")
    return "taken"


def judge_sizes(measured: Long, full: bool) -> str:
    """Require a bound, and of a long run that its last fifth adds nearly nothing."""
    sizes = list(measured.sizes.values())
    if sizes[-1] > MOST_BYTES:
        raise Wrong(f"{sizes[-1]} bytes; at most {MOST_BYTES} are expected")
    if full and sizes[-1] > 1.02 * sizes[-3]:
        raise Wrong(f"{sizes[-3]} bytes before the last fifth of the run, {sizes[-1]} at its end")
    return "taken"

"""What a plan costs in one process: time, memory and state, for models of more and more tensors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lamina as lm
from lamina.resolve.resolve import resolve_plan
from lamina.schedules.duration import Run

ROOT = Path(__file__).parents[2]
#: tensors in a block, all of them tiny: what is measured is the cost of each tensor, not of numbers
IN_BLOCK = 12
STEPS = 100_000
#: seconds that one size of one plan may take
LIMIT = 3600

Plans = dict[str, Callable[[], lm.Plan]]
_SCHEDULE = lm.warmup("10%") >> lm.cosine(to=0.05)
_NO_DECAY = lm.Rule("*.bias | *norm*", weight_decay=0.0)
_LAYERS = lm.Rule("layers.{depth}.*", lr=lm.by_depth(0.999))
PLANS: Plans = {
    "2 groups": lambda: lm.Plan(
        lm.AdamW, lr=1e-3, schedule=_SCHEDULE, clip_norm=1.0, rules=[_NO_DECAY]
    ),
    "2 per layer": lambda: lm.Plan(
        lm.AdamW, lr=1e-3, schedule=_SCHEDULE, clip_norm=1.0, rules=[_LAYERS, _NO_DECAY]
    ),
    "1 per tensor": lambda: lm.Plan(lm.AdamW, lr=_own_rate, schedule=_SCHEDULE, clip_norm=1.0),
}


def _own_rate(info: lm.ParamInfo) -> float:
    """Return a rate that no other parameter has."""
    layer, rest = info.name.removeprefix("layers.").split(".", 1)
    return 1e-3 / (1 + int(layer) + sum(map(ord, rest)) / 1e4)


def make_model(tensors: int) -> nn.Module:
    """Make a model with about so many tensors, in blocks like those of a Transformer."""

    def block() -> nn.ModuleDict:
        sizes = {"qkv": nn.Linear(2, 2), "out": nn.Linear(2, 2), "up": nn.Linear(2, 2)}
        norms = {"norm1": nn.LayerNorm(2), "norm2": nn.LayerNorm(2)}
        return nn.ModuleDict({**sizes, **norms, "act": nn.GELU(), "down": nn.Linear(2, 2)})

    blocks = nn.ModuleList(block() for _ in range(max(1, tensors // IN_BLOCK)))
    return nn.ModuleDict({"layers": blocks})


@dataclass(frozen=True)
class Cost:
    """Processor seconds, and bytes, of one plan on one model.

    `step` is the median of several, with all tensors trained, `torch_step` that of torch's AdamW
    on the same groups; `memory` is what the process grew by in the build, without the state;
    `saved` what `torch.save` writes of a `state_dict` beside the numbers of its tensors, and
    `torch_saved` the same of torch's AdamW.
    """

    plan: str
    tensors: int
    groups: int
    resolve: float
    preview: float
    build: float
    step: float
    torch_step: float
    state_dict: float
    load: float
    memory: int
    saved: int
    torch_saved: int


def measure(name: str, tensors: int) -> Cost:
    """Measure one plan on one model, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    plan, model = PLANS[name](), make_model(tensors)
    _warm_up(plan)
    run = _seconds(lambda: resolve_plan(plan, model, Run(STEPS)))[0]
    preview, _ = _seconds(lambda: str(plan.preview(model, steps=STEPS)))
    before = _resident()
    build, optimizer = _seconds(lambda: plan.build(model, steps=STEPS))
    grown = _resident() - before
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    state = sum(_numbers(entry) for entry in optimizer.state.values())
    step = _step_of(optimizer)
    state_dict, saved = _seconds(optimizer.state_dict)
    load, _ = _seconds(lambda: optimizer.load_state_dict(saved))
    groups = [{k: g[k] for k in ("params", "lr", "weight_decay")} for g in optimizer.param_groups]
    other = torch.optim.AdamW(groups, foreach=True)
    return Cost(
        plan=name,
        tensors=sum(1 for _ in model.parameters()),
        groups=len(optimizer.param_groups),
        resolve=run,
        preview=preview,
        build=build,
        step=step,
        torch_step=_step_of(other),
        state_dict=state_dict,
        load=load,
        memory=max(0, grown - state),
        saved=_written(saved),
        torch_saved=_written(other.state_dict()),
    )


def _warm_up(plan: lm.Plan) -> None:
    """Pay for imports, and for compiling patterns, on a small model."""
    model = make_model(4 * IN_BLOCK)
    optimizer = plan.build(model, steps=STEPS)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.release()
    str(plan.preview(model, steps=STEPS))


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds that this process took, and the result."""
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def _step_of(optimizer: Any) -> float:
    optimizer.step()  # makes what is kept from step to step
    return statistics.median(_seconds(optimizer.step)[0] for _ in range(7))


def _resident() -> int:
    """Return the bytes of memory that this process holds; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * 4096
    return 0


def _numbers(entry: Any) -> int:
    """Return the bytes of the tensors in a part of a state."""
    if isinstance(entry, torch.Tensor):
        return entry.numel() * entry.element_size()
    if isinstance(entry, dict):
        return sum(map(_numbers, entry.values()))
    return sum(map(_numbers, entry)) if isinstance(entry, list) else 0


def _written(state: dict[str, Any]) -> int:
    """Return the bytes that a file of a state has beside the numbers of its tensors."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.tell() - _numbers(state)


def costs(sizes: list[int], plans: list[str]) -> list[Cost]:
    """Measure every plan at every size, each in a new process."""
    rows = []
    for name in plans:
        for size in sizes:
            command = [sys.executable, "-m", "benchmarks.scaling.local", name, str(size)]
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
            )
            rows.append(Cost(**json.loads(done.stdout.splitlines()[-1])))
            print(f"measured: {name}, {size:,} tensors", file=sys.stderr, flush=True)
    return rows


def exponent(sizes: list[int], amounts: list[float]) -> float:
    """Return the power of the size that an amount grows with, by least squares over logarithms."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, amounts, strict=True) if y > 0]
    if len(points) < 2:
        return math.nan
    middle = [statistics.mean(axis) for axis in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


if __name__ == "__main__":
    print(json.dumps(vars(measure(sys.argv[1], int(sys.argv[2])))))

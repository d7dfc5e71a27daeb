"""The pictures of the documentation, with the numbers that they show inside: `make pictures`.

`python -m benchmarks.pictures` writes `docs/pictures/`, and the printed preview in the README.
Each PNG holds its curves as JSON in a text chunk; `tests/test_pictures.py` computes the curves anew
and compares numbers, not pixels.

A picture has no background, and its colours can be read on white and on the dark page of the site.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lamina as lm
from lamina.toy import toy_problem

OUT = Path(__file__).parents[1] / "docs" / "pictures"
README = Path(__file__).parents[1] / "README.md"
KEY = "curves"
#: text and axes; and the one curve of a small picture
INK, CURVE = "#7d8590", "#6478f0"
#: the curves of a large picture, in turn
PALETTE = ("#4d86e8", "#cf7a22", "#2f9e62", "#e0574f", "#a070dc", "#b07a4e")
#: a curve: the places on the horizontal axis, and the values there
Curve = tuple[list[float], list[float]]
Curves = dict[str, Curve]

#: what the small pictures show, over a run of 100 steps
SCHEDULES: dict[str, Any] = {
    "constant": lm.constant(),
    "cosine": lm.cosine(to=0.1),
    "cyclic": lm.cyclic(up=15, base=0.2),
    "exponential": lm.exponential(0.5, every=20),
    "inverse_sqrt": lm.inverse_sqrt(warmup=10),
    "linear": lm.linear(to=0.0),
    "multi_step": lm.multi_step([40, 70], gamma=0.4),
    "noam": lm.noam(512, warmup=20),
    "one_cycle": lm.one_cycle(),
    "one_cycle_momentum": lm.one_cycle_momentum(),
    "one_minus_sqrt": lm.one_minus_sqrt(),
    "piecewise": lm.piecewise([(0, 1.0), (30, 0.4), (60, 0.8), (90, 0.1)]),
    "polynomial": lm.polynomial(power=2),
    "repeat": lm.repeat(lm.linear(to=0.2, length=25)),
    "step_decay": lm.step_decay(every=25, gamma=0.5),
    "warm_restarts": lm.warm_restarts(first=20, mult=2),
    "warmup": lm.warmup(30) >> lm.constant(),
    "wsd": lm.wsd(warmup="10%", decay="20%"),
}


def sampled(schedule: lm.Schedule, steps: int = 100) -> Curve:
    """Return a schedule at every step of a run."""
    plan = lm.Plan("SGD", lr=schedule) if schedule.kind == "value" else None
    plan = plan or lm.Plan("SGD", lr=1.0, schedule=schedule)
    return next(iter(planned(plan, steps).values()))


def planned(plan: lm.Plan, steps: int) -> Curves:
    """Return the lr of each group of a plan for the toy problem, by the group's name."""
    preview = plan.preview(toy_problem().model, steps=steps)
    places = list(range(steps))
    at = [preview.at(step) for step in places]
    return {name: (places, [values[name]["lr"] for values in at]) for name in at[0]}


def momentum(steps: int = 100) -> Curve:
    """Return the momentum of the one-cycle policy."""
    plan = lm.Plan("SGD", lr=1.0, momentum=lm.one_cycle_momentum())
    preview = plan.preview(toy_problem().model, steps=steps)
    places = list(range(steps))
    return places, [next(iter(preview.at(step).values()))["momentum"] for step in places]


def readme_plan() -> Curves:
    """Return the lr of each group: warmup and cosine, decay by layer, gradual unfreezing."""
    plan = lm.Plan(
        "AdamW",
        lr=2e-5,
        schedule=lm.warmup("6%") >> lm.cosine(to=0.01),
        rules=[
            lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(0.7), thaw=lm.top_down(every="12%")),
            lm.Rule("embeddings.*", frozen=True),
            lm.Rule("classifier.*", lr=1e-4),
        ],
    )
    return planned(plan, 200)


def windows() -> Curves:
    """Return a window with and without a short warmup after each thaw."""
    rules = [
        lm.Rule("encoder.*", thaw=["20%", "70%"], freeze="50%", rewarm=lm.warmup("10%")),
        lm.Rule("embeddings.*", lr=0.6, thaw=["20%", "70%"], freeze="50%"),
    ]
    plan = lm.Plan("SGD", lr=1.0, schedule=lm.cosine(to=0.1), rules=rules)
    return planned(plan, 200)


def hold_and_stretch() -> Curves:
    """Return a run of 100 steps that goes on at step 50 with 150 steps, in both ways."""
    plan = lm.Plan("SGD", lr=1.0, schedule=lm.cosine(to=0.1))
    optimizer = plan.build(toy_problem().model, steps=100)
    train(optimizer, 50)
    curves = {"planned for 100 steps": sampled(lm.cosine(to=0.1))}
    for extend in ("hold", "stretch"):
        model = toy_problem().model
        again = plan.build(model, steps=150, resume=optimizer.state_dict(), extend=extend)
        curves[f'extend="{extend}"'] = (list(range(50, 150)), train(again, 100))
    return curves


def train(optimizer: lm.Optimizer, steps: int) -> list[float]:
    """Take steps with gradients of 0, and return the lr that each of them applied."""
    applied = []
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = parameter.detach() * 0
        applied.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
    return applied


def reactions() -> Curves:
    """Return a made-up loss, the lr that a plateau gives, and where early stopping ends the run."""
    plan = lm.Plan(
        "SGD",
        lr=1.0,
        feedback=lm.plateau("val_loss", factor=0.5, patience=2),
        stop=lm.early_stop("val_loss", patience=6),
    )
    optimizer = plan.build(toy_problem().model, epochs=30, steps_per_epoch=1)
    losses: list[float] = []
    rates: list[float] = []
    for epoch in range(30):
        rates += train(optimizer, 1)
        losses.append(round(max(0.3, 1.0 - 0.1 * epoch), 6))
        optimizer.report(val_loss=losses[-1])
        if optimizer.should_stop:
            break
    epochs = [float(epoch) for epoch in range(len(losses))]
    return {"val_loss": (epochs, losses), "lr, with plateau": (epochs, rates)}


def small(name: str) -> Curves:
    """Return the one curve of a small picture."""
    if name == "one_cycle_momentum":
        return {name: momentum()}
    return {name: sampled(SCHEDULES[name])}


#: the large pictures: the curves, and the names of the axes
LARGE: dict[str, tuple[Callable[[], Curves], str, str]] = {
    "plan": (readme_plan, "step", "learning rate"),
    "windows": (windows, "step", "learning rate"),
    "hold-and-stretch": (hold_and_stretch, "step", "learning rate"),
    "reactions": (reactions, "epoch", "factor on lr, and loss"),
}
ALL: dict[str, Callable[[], Curves]] = {
    **{f"schedule-{name}": lambda name=name: small(name) for name in SCHEDULES},
    **{name: curves for name, (curves, _, _) in LARGE.items()},
}


def draw_small(curves: Curves, path: Path) -> None:
    """Draw one curve without numbers, as it stands in a row of a table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6, 0.7), layout="constrained")
    axes = figure.add_subplot()
    for places, values in curves.values():
        axes.plot(places, values, color=CURVE, linewidth=1.6)
        axes.set_ylim(min(0.0, *values), 1.08 * max(values))
    axes.set_xticks([])
    axes.set_yticks([])
    use_ink(axes)
    save(figure, curves, path, dpi=80)


def draw_large(curves: Curves, path: Path, x: str, y: str) -> None:
    """Draw curves on one axis with a legend; where a rate is 0, its part is frozen: no line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=PALETTE)
    for number, (name, (places, values)) in enumerate(curves.items()):
        if any(values):
            shown = np.where(np.asarray(values) > 0, values, np.nan)
            steps = "steps-post" if x == "epoch" and "lr" in name else "default"
            line = ("-", "--")[number // 5 % 2]
            axes.plot(places, shown, label=name, linestyle=line, drawstyle=steps)
        else:
            axes.plot([], [], " ", label=f"{name}: frozen")
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.grid(color=INK, alpha=0.3)
    use_ink(axes)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False, labelcolor=INK)
    save(figure, curves, path, dpi=110)


def use_ink(axes: Any) -> None:
    """Draw axes and their text in a grey for light and dark pages."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def save(figure: Any, curves: Curves, path: Path, dpi: int) -> None:
    """Write a picture with its numbers; without matplotlib's version, which is no content."""
    metadata = {KEY: json.dumps(curves), "Software": None}
    figure.savefig(path, dpi=dpi, metadata=metadata, transparent=True)


def shown(path: Path) -> Any:
    """Return the curves that a picture shows."""
    from PIL import Image

    with Image.open(path) as picture:
        return json.loads(picture.info[KEY])


def is_current(path: Path, curves: Curves) -> bool:
    """Return whether a picture shows these curves, to six digits."""
    there = shown(path)
    if list(there) != list(curves):
        return False
    return all(
        np.shape(there[name]) == np.shape(curve) and np.allclose(there[name], curve, rtol=1e-6)
        for name, curve in curves.items()
    )


def readme_with_preview(page: str) -> str:
    """Return the README with what its first program prints in the block below the marker."""
    program = re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert program is not None
    printed = io.StringIO()
    width = {"COLUMNS": "160"}  # wide enough for every column
    with contextlib.redirect_stdout(printed), unittest.mock.patch.dict(os.environ, width):
        exec(compile(program[1], str(README), "exec"), {"__name__": "__main__"})
    lines = (line.rstrip() for line in printed.getvalue().rstrip().splitlines())
    block = "<!-- preview -->\n\n```text\n" + "\n".join(lines) + "\n```"
    return re.sub(r"<!-- preview -->\n\n```text\n.*?```", lambda _: block, page, flags=re.DOTALL)


def main() -> None:
    README.write_text(readme_with_preview(README.read_text("utf-8")), "utf-8")
    OUT.mkdir(exist_ok=True)
    for name, make in ALL.items():
        path = OUT / f"{name}.png"
        curves = make()
        if name in LARGE:
            draw_large(curves, path, *LARGE[name][1:])
        else:
            draw_small(curves, path)
        sys.stdout.write(f"{path.relative_to(OUT.parents[1])}\n")


if __name__ == "__main__":
    main()

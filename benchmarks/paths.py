"""The pictures of docs/reference/optimizers: every optimizer's path on a function of two numbers.

`python -m benchmarks.paths` writes one PNG for each page. A learning rate that is not given is
the best of a grid (the lowest loss in the last tenth of the steps, among the paths that stay in the
picture), so that no path is slow because of a poor guess; the grid and the choice are printed.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from lamina import optim

OUT = Path(__file__).parents[1] / "docs" / "reference" / "optimizers"
GRID = [round(digit * 10.0**power, 6) for power in range(-4, 2) for digit in (1, 2, 5)]
GREY, BLUE, ORANGE = "#8a8a8a", "#1f6fb4", "#d9661f"


@dataclass(frozen=True)
class Surface:
    """A function of (x, y), where a path starts, and the part of the plane to show."""

    name: str
    loss: Callable[[Any, Any], Any]
    start: tuple[float, float]
    minimum: tuple[float, float]
    view: tuple[float, float, float, float]  # left, right, bottom, top
    powers: tuple[float, float]  # of the lowest and the highest contour
    steps: int


ROSENBROCK = Surface(
    name="Rosenbrock, $(1-x)^2 + 100\\,(y-x^2)^2$",
    loss=lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
    start=(-1.2, 1.0),
    minimum=(1.0, 1.0),
    view=(-1.7, 1.7, -0.7, 1.9),
    powers=(-1, 3),
    steps=300,
)
BOWL = Surface(
    name="skewed bowl, $(x-1)^2/2 + 25\\,(y-1)^2$",
    loss=lambda x, y: (x - 1) ** 2 / 2 + 25 * (y - 1) ** 2,
    start=(-1.2, 1.7),
    minimum=(1.0, 1.0),
    view=(-1.6, 1.7, 0.1, 1.9),
    powers=(-1.5, 1.5),
    steps=100,
)


@dataclass(frozen=True)
class Runner:
    """An optimizer with its settings, as one line of a picture."""

    label: str
    make: Callable[..., torch.optim.Optimizer]
    color: str
    settings: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None  # None: the best of the grid
    falling: bool = False  # the learning rate falls to 0 in a straight line


@dataclass(frozen=True)
class Walk:
    """Where a runner went: points, losses, and the learning rate."""

    points: torch.Tensor
    losses: list[float]
    lr: float


PLAIN = Runner("SGD with momentum 0.9", optim.SGD, GREY, {"momentum": 0.9})


@dataclass(frozen=True)
class Picture:
    """One file: the paths on one function."""

    file: str
    surface: Surface
    runners: Sequence[Runner]


def _constant_and_falling(
    name: str, make: Callable[..., torch.optim.Optimizer], lr: float, settings: dict[str, Any]
) -> list[Runner]:
    """For steps whose length is not the gradient's: only a schedule makes them end."""
    return [
        PLAIN,
        Runner(name, make, ORANGE, settings, lr),
        Runner(name, make, BLUE, settings, lr, falling=True),
    ]


WOLFE = {"line_search_fn": "strong_wolfe", "max_iter": 1, "max_eval": 20}
PICTURES = [
    Picture(
        "sgd.png",
        BOWL,
        [
            Runner("SGD", optim.SGD, GREY),
            Runner("momentum 0.9", optim.SGD, BLUE, {"momentum": 0.9}),
            Runner("Nesterov 0.9", optim.SGD, ORANGE, {"momentum": 0.9, "nesterov": True}),
        ],
    ),
    Picture(
        "rmsprop.png",
        ROSENBROCK,
        [
            PLAIN,
            Runner("RMSprop", optim.RMSprop, BLUE, {"alpha": 0.9}),
            Runner("RMSprop, momentum 0.9", optim.RMSprop, ORANGE, {"alpha": 0.9, "momentum": 0.9}),
        ],
    ),
    Picture(
        "adam.png",
        BOWL,
        [
            Runner("Adam", optim.Adam, GREY, lr=0.1),
            Runner("Adam, weight_decay 0.3", optim.Adam, BLUE, {"weight_decay": 0.3}, lr=0.1),
            Runner("AdamW, weight_decay 0.3", optim.AdamW, ORANGE, {"weight_decay": 0.3}, lr=0.1),
        ],
    ),
    Picture(
        "lbfgs.png",
        ROSENBROCK,
        [PLAIN, Runner("LBFGS, strong Wolfe", optim.LBFGS, BLUE, WOLFE, lr=1.0)],
    ),
    Picture("muon.png", BOWL, _constant_and_falling("Muon", optim.Muon, 0.1, {"weight_decay": 0})),
    Picture("lars.png", BOWL, _constant_and_falling("LARS", optim.LARS, 20.0, {})),
    Picture("lamb.png", BOWL, _constant_and_falling("LAMB", optim.LAMB, 0.05, {})),
    Picture(
        "layer-adaptive-adam.png",
        BOWL,
        [
            PLAIN,
            Runner("Adam", optim.Adam, ORANGE),
            Runner("LayerAdaptiveAdam", optim.LayerAdaptiveAdam, BLUE),
        ],
    ),
]


def walk(runner: Runner, surface: Surface, lr: float) -> Walk:
    """The path at one learning rate; x and y are one tensor of shape (1, 2)."""
    place = torch.tensor([surface.start], dtype=torch.float64, requires_grad=True)
    optimizer = runner.make([place], lr=lr, **runner.settings)
    points, losses = [place.detach().clone()], []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = surface.loss(place[0, 0], place[0, 1])
        loss.backward()
        return loss

    for step in range(surface.steps):
        if runner.falling:
            optimizer.param_groups[0]["lr"] = lr * (1 - step / surface.steps)
        loss = float(torch.as_tensor(optimizer.step(closure)).detach())
        losses.append(loss)
        if not math.isfinite(loss) or loss > 1e4:
            break
        points.append(place.detach().clone())
    losses.append(float(surface.loss(*points[-1][0])))
    return Walk(torch.cat(points), losses, lr)


_BEST: dict[tuple[str, str], Walk] = {}


def best(runner: Runner, surface: Surface) -> Walk:
    """Of the paths over the grid that stay in view, the lowest mean loss in the last tenth."""
    if runner.lr is not None:
        return walk(runner, surface, runner.lr)
    key = (runner.label, surface.name)
    if key not in _BEST:
        _BEST[key] = _search(runner, surface)
    return _BEST[key]


def _in_view(points: torch.Tensor, surface: Surface) -> bool:
    left, right, bottom, top = surface.view
    x, y = points.T
    return bool(((x > left) & (x < right) & (y > bottom) & (y < top)).all())


def _search(runner: Runner, surface: Surface) -> Walk:
    paths = [walk(runner, surface, lr) for lr in GRID]
    whole = [path for path in paths if len(path.losses) == surface.steps + 1]
    whole = [path for path in whole if _in_view(path.points, surface)]
    tail = surface.steps // 10
    return min(whole, key=lambda path: sum(path.losses[-tail:]))


def draw(picture: Picture) -> Figure:
    """The paths on the left, their losses on the right."""
    surface = picture.surface
    figure = Figure(figsize=(8.6, 3.7), dpi=90, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    contours(left, surface)
    for runner in picture.runners:
        path = best(runner, surface)
        label = f"{runner.label}, lr {path.lr:g}{' to 0' * runner.falling}"
        x_end, y_end = path.points[-1].tolist()
        print(f"  {label}: loss {path.losses[-1]:.2e} at ({x_end:.3f}, {y_end:.3f})")
        x, y = path.points.T
        left.plot(x, y, color=runner.color, lw=1.3, marker=".", ms=3.2, label=label)
        right.plot(path.losses, color=runner.color, lw=1.6)
    left.plot(*surface.start, "o", color="black", ms=6, zorder=5)
    left.plot(*surface.minimum, "*", color="black", ms=12, zorder=5)
    left.set_title(surface.name, fontsize=10)
    left.legend(fontsize=8, loc="lower right", framealpha=0.9)
    right.set(yscale="log", xlabel="step", title="loss")
    right.title.set_fontsize(10)
    right.set_ylim(bottom=max(right.get_ylim()[0], 1e-10))
    right.grid(color="#dddddd", lw=0.6)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def contours(axes: Any, surface: Surface) -> None:
    left, right, bottom, top = surface.view
    x = torch.linspace(left, right, 160, dtype=torch.float64)
    y = torch.linspace(bottom, top, 120, dtype=torch.float64)
    loss = surface.loss(x[None, :], y[:, None])
    levels = torch.logspace(*surface.powers, 9)
    axes.contour(x, y, loss, levels=levels, colors="#c4ccd4", linewidths=0.8)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a palette, which is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paths", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"learning rates: the best of {', '.join(f'{lr:g}' for lr in GRID)}, or as given")
    for picture in PICTURES:
        print(picture.file)
        save(draw(picture), arguments.out / picture.file)


if __name__ == "__main__":
    main()

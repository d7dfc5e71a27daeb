"""Pictures of curves, with matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import require

_POINTS = 2000


def plot(
    curves: Mapping[str, Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]],
    steps: int,
    path: str | os.PathLike[str] | None = None,
    label: str = "factor or value",
) -> Any:
    """Draw curves by name on one axis, over steps 0 to steps - 1.

    Args:
        curves: functions of an array of steps, by the name that the legend shows.
        steps: how many steps.
        path: a file to write, if any.
        label: what the vertical axis shows.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = require("matplotlib.figure", "plot", "A plot").Figure(
        figsize=(7.0, 3.5), layout="constrained"
    )
    axes = figure.add_subplot()
    places = np.unique(np.linspace(0, max(steps - 1, 0), min(steps, _POINTS)).round())
    for name, curve in curves.items():
        axes.plot(places, curve(places), label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    if path is not None:
        figure.savefig(os.fspath(path))
    return figure

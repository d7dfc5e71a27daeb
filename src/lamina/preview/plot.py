"""A preview as a picture: the lr of every group over the run, and when each one trains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._util.numbers import where_positive
from ..errors import TimeUnitError, require
from .curves import Course, Twin, colours, courses, twins
from .header import facts, training
from .rows import epochs
from .shown import Shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


#: peaks further apart than this are drawn on a logarithmic axis
_LOG_RATIO = 20.0
#: length of a dash, in widths of the line
_DASH = 4.0
#: so many bars are tall enough for a name inside
_NAMED = 14
_INK, _FAINT, _GRID = "#24292f", "#6e7781", "#e4e7eb"


def plot(
    preview: Shown, path: str | os.PathLike[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Draw a preview; see `Preview.plot`."""
    if preview.run.steps is None:
        raise TimeUnitError(
            "the length of the run is unknown, so that it cannot be drawn; pass steps=, or epochs= "
            "with steps_per_epoch=, to preview or build."
        )
    require("matplotlib", "plot", "preview.plot()")
    found = courses(preview)
    bars = 0.23 * len(found) if len(found) <= _NAMED else min(4.0, 2.2 + 0.018 * len(found))
    own = ax is None
    if ax is None:
        ax = _new_axes(bars, len(found) > _NAMED, preview.run.steps_per_epoch is not None)
    else:
        bars = min(bars, 0.4 * ax.get_window_extent().height / ax.figure.dpi)
    palette = colours(found)
    _curves(ax, preview, found, palette)
    _bars(_below(ax, bars), preview, found, palette)
    if own:
        _title(ax, preview)
    figure = ax.get_figure(root=True)
    assert figure is not None
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _new_axes(bars: float, names_outside: bool, epochs_shown: bool) -> Axes:
    """Return axes in a figure of their own, without pyplot: no display and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide, high = 9.6, 5.0 + bars
    figure = Figure(figsize=(wide, high), facecolor="white")
    FigureCanvasAgg(figure)
    left = 2.6 if names_outside else 0.95
    figure.subplots_adjust(
        left=left / wide,
        right=1 - 0.5 / wide,
        bottom=0.55 / high,
        top=1 - (0.95 if epochs_shown else 0.7) / high,
    )
    return figure.subplots()


def _below(ax: Axes, height: float) -> Any:
    """Return axes for the bars, cut off from the lower end of `ax`, so that nothing else moves."""
    grid = require("mpl_toolkits.axes_grid1", "plot", "preview.plot()")
    return grid.make_axes_locatable(ax).append_axes("bottom", size=height, pad=0.12, sharex=ax)


def _curves(ax: Axes, preview: Shown, found: list[Course], palette: list[Any]) -> None:
    steps, log, hiding = preview.steps, _far_apart(found), twins(found)
    # Dashed ones last: what lies below shows between the dashes.
    for place in sorted(range(len(found)), key=lambda place: place in hiding):
        course, colour = found[place], palette[place]
        if not course.active.any():
            continue
        lr = np.where(course.active, course.lr, np.nan)
        if log:  # a 0 would be drawn as a line down to the axis
            lr = where_positive(lr)
        ax.plot(
            steps, lr, color=colour, linewidth=1.8, label=course.label, solid_capstyle="round",
            linestyle=_style(hiding.get(place)), dash_capstyle="butt",
        )  # fmt: skip
        for first, last in course.spans():
            if first > 0:
                ax.plot(steps[first], lr[first], "o", color=colour, markersize=4)
            if last < len(steps):
                ax.plot(steps[last - 1], lr[last - 1], "o", color=colour, mfc="white", markersize=4)
    _scale(ax, found)
    if preview.resumed is not None:
        _clock(ax, preview.resumed.clock)
    ax.set_xlim(0, preview.run.steps)
    ax.set_ylabel("learning rate", color=_INK)
    ax.grid(True, color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=_FAINT, labelbottom=False, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "left")
        spine.set_color(_GRID)
    _epochs(ax, preview)


def _style(twin: Twin | None) -> Any:
    """Return how a curve is drawn: one that lies on another in dashes, in turn with its likes."""
    if twin is None:
        return "-"
    return (_DASH * twin.rank, (_DASH, _DASH * twin.count))


def _peaks(found: Sequence[Course]) -> list[float]:
    peaks = [float(course.lr[course.active].max()) for course in found if course.active.any()]
    return [peak for peak in peaks if peak > 0]


def _far_apart(found: Sequence[Course]) -> bool:
    """Return whether groups are so far apart that only a logarithmic axis shows all."""
    peaks = _peaks(found)
    return bool(peaks) and max(peaks) >= _LOG_RATIO * min(peaks)


def _clock(ax: Axes, step: int) -> None:
    """Return a line where a saved run goes on."""
    ax.axvline(step, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="_resumed")
    ax.annotate(
        f"resumes at step {step:,}", (step, 1), (5, -4), xycoords=("data", "axes fraction"),
        textcoords="offset points", va="top", fontsize=8.5, color=_INK,
    )  # fmt: skip


def _scale(ax: Axes, found: list[Course]) -> None:
    """Set a logarithmic axis where groups are far apart, cut where curves end."""
    peaks = _peaks(found)
    if not peaks:
        ax.set_ylim(0, 1)
        return
    if not _far_apart(found):
        ax.set_ylim(0, 1.06 * max(peaks))
        # Whole numbers on each tick: a common power of ten would lie over the title.
        ax.yaxis.set_major_formatter(lambda lr, _: f"{lr:.4g}")
        return
    trained = np.concatenate([course.lr[course.active] for course in found])
    positive = float(trained[trained > 0].min())
    ax.set_yscale("log", nonpositive="clip")
    ax.set_ylim(max(positive, min(peaks) / 300) / 1.5, 1.8 * max(peaks))


def _title(ax: Axes, preview: Shown) -> None:
    said = facts(preview)
    optimizers = said.get("optimizer") or " and ".join(
        dict.fromkeys(row.optimizer for row in preview.rows)
    )
    many = len(preview.rows)
    size = f"{preview.run.steps:,} steps  ·  {many} group{'s' * (many != 1)}"
    detail = f"{optimizers}  ·  {size}  ·  {training(preview)}"
    above = 26 if preview.run.steps_per_epoch else 10
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(
        "Learning rate by group", (0, 1), xytext=(0, above + 16), color=_INK, fontsize=13,
        fontweight="bold", **place,
    )  # fmt: skip
    ax.annotate(detail, (0, 1), xytext=(0, above), color=_FAINT, fontsize=9, **place)


def _epochs(ax: Axes, preview: Shown) -> None:
    per = preview.run.steps_per_epoch
    if not per:
        return
    from matplotlib.ticker import MaxNLocator

    def epoch_of(step: Any) -> Any:
        return step / per

    def step_of(epoch: Any) -> Any:
        return epoch * per

    top = ax.secondary_xaxis("top", functions=(epoch_of, step_of))
    whole = (preview.run.steps or 0) >= 2 * per
    top.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=whole))
    top.xaxis.set_major_formatter(lambda epoch, _: f"epoch {epochs(round(epoch * per), per)}")
    top.tick_params(colors=_FAINT, length=0, labelsize=8.5)
    top.spines["top"].set_visible(False)


def _bars(ax: Any, preview: Shown, found: list[Course], palette: list[Any]) -> None:
    """Return one bar for each course: filled while it trains, hatched while it is frozen."""
    steps, total = preview.steps, int(preview.run.steps or 0)
    named = len(found) <= _NAMED
    high = 0.8 if named else 1.0
    labels = _labels(found)
    for place, (course, colour) in enumerate(zip(found, palette, strict=True)):
        low = place - high / 2
        ax.broken_barh(
            [(0, total)], (low, high), facecolor="#f6f8fa", edgecolor="#c3c9d0",
            hatch="/////", linewidth=0,
        )  # fmt: skip
        spans = [
            (int(steps[first]), int(steps[last] if last < len(steps) else total))
            for first, last in course.spans()
        ]
        ax.broken_barh([(a, b - a) for a, b in spans], (low, high), facecolor=colour, linewidth=0)
        if named:
            _name(ax, place, labels[place], colour, spans, total)
    ax.set_ylim(len(found) - 0.5, -0.5)
    hatched = any(not course.active.all() for course in found)
    key = "   (filled: trains, hatched: frozen)" if hatched else ""
    ax.set_xlabel(f"optimizer step{key}", color=_INK)
    ax.tick_params(colors=_FAINT, length=0)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    every, end = -(-len(found) // 18), len(found) - 1
    shown = [] if named else [*range(0, end - every + 1, every), end]
    ax.set_yticks(shown, [labels[place] for place in shown], fontsize=7.5)
    ax.spines[:].set_visible(False)


def _labels(found: Sequence[Course]) -> list[str]:
    """Return what to call each course; of those that lie on another one, on which."""
    hiding = twins(found)
    return [
        f"{course.label} (same lr as {found[hiding[place].base].label})" if place in hiding
        else course.label
        for place, course in enumerate(found)
    ]  # fmt: skip


def _name(
    ax: Any, place: int, label: str, colour: Any, spans: list[tuple[int, int]], total: int
) -> None:
    """Write the name of a course inside its bar, where it is filled if that is wide enough."""
    need = total * min(0.9, 0.012 * len(label) + 0.02)
    filled = next((begin for begin, end in spans if end - begin >= need), None)
    dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour[:3], strict=True)) < 0.62
    style: dict[str, Any] = {"color": "white" if dark else _INK}
    if filled is None:
        box = {"facecolor": "#f6f8fa", "edgecolor": "none", "pad": 1.2}
        style = {"color": _INK, "bbox": box}
    x = (filled or 0) + 0.008 * total
    ax.text(x, place, label, va="center_baseline", fontsize=8, clip_on=True, **style)

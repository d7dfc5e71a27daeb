"""What the losses of one sweep say: where the loss falls, how far, and beyond what noise.

The learning rate rises geometrically, one step at each value, so that all of this counts in steps
of the logarithm of lr.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: a fall must be so many standard errors deep; of curves of pure noise, which have a minimum too,
#: one in eight at most passes (a test holds that), and every repeat has to
CLEAR = 3.0
#: the share of the fall at which the suggestion stands
HALF = 0.5
#: the suggestion stays below the lr of the smallest loss by this factor
BELOW_MINIMUM = 3.0
#: a fall of less than this share of the loss is rounding, not learning
_ROUNDING = 1e-5
#: differences of losses count as noise up to so many times their usual size
_CUT = 5.0


class Reading(NamedTuple):
    """What was read from a curve: a suggestion, or why there is none.

    `lr` is nan if there is none. `start` is the loss before the lr matters, `fall` how far the
    smoothed loss falls from there, `noise` the standard deviation of the loss from step to step.
    """

    lr: float
    reason: str
    start: float
    fall: float
    noise: float


@dataclass(frozen=True)
class Curve:
    """One sweep.

    Args:
        lr: the learning rates that were tried, in order.
        loss: the loss of the step at each, before the step; all finite.
        planned: how many learning rates were to be tried.
        diverged: whether the sweep ended because the loss exploded or was not finite.
    """

    lr: tuple[float, ...]
    loss: tuple[float, ...]
    planned: int
    diverged: bool

    @property
    def smooth(self) -> tuple[float, ...]:
        """The loss averaged over neighbours with a Gaussian kernel, which has no lag."""
        return tuple(map(float, smoothed(np.asarray(self.loss), width_of(self.planned))))

    def read(self) -> Reading:
        """Return the suggestion of this curve.

            lr = min(first lr with s(lr) <= start - fall / 2,  argmin(s) / 3)

        with `s` the smoothed loss, `start` the mean loss of the first tenth of the sweep and
        `fall = start - min(s)`. The first is about where a curve falls most steeply, found by a
        level instead of by a derivative, which noise would move about. The second is a margin: a
        sweep runs past the largest stable lr before that shows in the loss.
        """
        if len(self.loss) < max(5, self.planned // 10):
            return _nothing("the loss explodes at the first learning rates; lower `low`")
        return _read(np.asarray(self.lr), np.asarray(self.loss), self.planned, self.diverged)


def width_of(planned: int) -> float:
    """Return the standard deviation of the kernel, in steps of a sweep."""
    return max(1.0, planned / 40)


def smoothed(loss: Floats, width: float) -> Floats:
    """Return a weighted mean of each value and its neighbours (Nadaraya-Watson)."""
    place = np.arange(len(loss))
    weight = np.exp(-0.5 * ((place[:, None] - place[None, :]) / width) ** 2)
    average: Floats = (weight @ loss) / weight.sum(axis=1)
    return average


def noise_of(loss: Floats) -> float:
    """Return the standard deviation of a loss around its trend.

        sigma = sqrt(mean(d ** 2) / 2),  d = loss[i + 1] - loss[i], cut off at 5 scales,
        scale = median(abs(d)) * 1.4826

    Differences of neighbours do not see a slow trend (von Neumann 1941), and cut off, single leaps
    do not count for more than the tails of noise do.
    """
    if len(loss) < 2:
        return 0.0
    steps = np.abs(np.diff(loss))
    scale = 1.4826 * float(np.median(steps))
    return float(np.sqrt((np.minimum(steps, _CUT * scale) ** 2).mean() / 2))


def has_exploded(loss: Sequence[float]) -> bool:
    """Return whether a sweep need not go on: the loss rose far above where it began.

    Far is four times the fall so far (as in fastai) and ten times the noise; by the median of three
    steps, so that one bad batch ends nothing.
    """
    if len(loss) < 8:
        return False
    values = np.asarray(loss)
    start = float(np.median(values[:5]))
    trios = np.median(np.lib.stride_tricks.sliding_window_view(values, 3), axis=1)
    fall = max(0.0, start - float(trios.min()))
    quiet = values[: int(np.argmin(values)) + 1]
    noise = noise_of(quiet if len(quiet) >= 5 else values[:5])
    margin = max(4 * fall, 10 * noise, 1e-3 * abs(start))
    return bool(trios[-1] > start + margin)


def _read(lr: Floats, loss: Floats, planned: int, diverged: bool) -> Reading:
    width, first = width_of(planned), max(5, planned // 10)
    start = float(loss[:first].mean())
    # What exploded must not weigh on the average of the steps before it.
    noise = noise_of(loss[: int(np.argmin(loss)) + 1])
    loss = np.minimum(loss, start + (start - float(loss.min())) + CLEAR * noise)
    smooth = smoothed(loss, width)
    bottom = int(np.argmin(smooth))
    fall = start - float(smooth[bottom])
    error = noise * math.sqrt(1 / first + 1 / (2 * math.sqrt(math.pi) * width))
    seen: Any = (start, fall, noise)
    if fall <= max(CLEAR * error, _ROUNDING * abs(start)):
        return _nothing(
            f"the loss falls by {max(fall, 0.0):.3g} from {start:.3g}, which is within its noise "
            f"of {noise:.3g} from batch to batch",
            *seen,
        )
    if not diverged and _still_falls(smooth, fall, error):
        return _nothing("the loss still falls at the highest learning rate; raise `high`", *seen)
    half = _first_at_or_below(lr, smooth, start - HALF * fall)
    return Reading(min(half, float(lr[bottom]) / BELOW_MINIMUM), "", *seen)


def _nothing(
    reason: str, start: float = math.nan, fall: float = math.nan, noise: float = math.nan
) -> Reading:
    return Reading(math.nan, reason, start, fall, noise)


def _still_falls(smooth: Floats, fall: float, error: float) -> bool:
    """Return whether more than a tenth of the fall came in the last tenth of the sweep."""
    last = float(smooth[-max(2, len(smooth) // 10)] - smooth[-1])
    return last > max(fall / 10, 2 * error)


def _first_at_or_below(lr: Floats, smooth: Floats, level: float) -> float:
    """Return the lr at which a curve first reaches a level, between two points on a log scale."""
    place = int(np.argmax(smooth <= level))
    if place == 0:
        return float(lr[0])
    above, below = float(smooth[place - 1]), float(smooth[place])
    share = (above - level) / (above - below)
    return float(lr[place - 1] * (lr[place] / lr[place - 1]) ** share)

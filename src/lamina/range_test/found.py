"""The result of a learning-rate range test."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import printable
from .curve import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: so many groups are listed; of more, how many there are
_LISTED = 12


@dataclass(frozen=True)
class FoundLR:
    """What `find_lr` found; `str` gives it in words.

    With `s` the loss of a repeat, smoothed over the neighbours by a Gaussian kernel of a fortieth
    of the steps, and `start` the mean loss of the first tenth, the repeat suggests

        min(first lr with s(lr) <= start - fall / 2,  argmin(s) / 3),  fall = start - min(s),

    and the suggestion is the median of the repeats. There is none, and `reason` says why, if in a
    repeat the loss does not fall by three standard errors of its noise, still falls at the highest
    lr, or explodes at once, or if the repeats disagree by more than a factor of 10.

    Args:
        suggestion: the lr to train with, of the group `reference`; None if there is none.
        interval: the smallest and the largest lr that a repeat suggests. With three repeats it
            holds the median of all repeats that could be made with a probability of 75 %, with five
            of 94 %: 1 - 2 ** (1 - repeats).
        reason: why there is no suggestion, else empty.
        curves: one for each repeat, with `lr`, `loss` and `smooth`.
        reference: the swept group with the highest lr, whose lr the curves show.
        now: the lr of each swept group without the test, by name.
        held: the step of the plan whose schedules and windows were held; None without a plan.
        advice: how to take the suggestion over.

    References:
        Smith, Cyclical learning rates for training neural networks, WACV 2017, section 3.3, for the
        test; Howard and Gugger, fastai: a layered API for deep learning, 2020, whose `lr_find`
        sweeps exponentially and suggests the lr of the steepest fall.

    Example:
        >>> import torch, lamina as lm
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(8, 1)
        >>> inputs = [torch.randn(32, 8) for _ in range(20)]
        >>> optimizer = lm.Plan("SGD", lr=0.01).build(model)
        >>> def loss(model, x):
        ...     return (model(x) - x.sum(1, keepdim=True)).square().mean()
        >>> found = lm.find_lr(model, optimizer, loss, inputs)
        >>> 0.005 < found.suggestion < 0.5
        True
    """

    suggestion: float | None
    interval: tuple[float, float] | None
    reason: str
    curves: tuple[Curve, ...]
    reference: str
    now: Mapping[str, float]
    held: int | None
    advice: str

    @property
    def factor(self) -> float | None:
        """The factor for every swept group, which keeps their ratios; None if there is none."""
        return None if self.suggestion is None else self.suggestion / self.now[self.reference]

    @property
    def lrs(self) -> dict[str, float]:
        """The suggested lr of every swept group, by name; empty if there is none."""
        factor = self.factor
        return {} if factor is None else {name: lr * factor for name, lr in self.now.items()}

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the curves, the suggestion and its interval.

        Args:
            path: a .png, .svg or .pdf file to write.

        Returns:
            The figure of matplotlib.

        Raises:
            LaminaError: if the file cannot be written; what was there is left.
            MissingExtraError: without the extra `plot`.
        """
        from .plot import plot

        return plot(self, path)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        curves = [
            {
                "lr": list(curve.lr),
                "loss": list(curve.loss),
                "diverged": curve.diverged,
                "suggestion": None if math.isnan(reading.lr) else reading.lr,
                "reason": reading.reason,
            }
            for curve, reading in ((curve, curve.read()) for curve in self.curves)
        ]
        return {
            "suggestion": self.suggestion,
            "interval": None if self.interval is None else list(self.interval),
            "factor": self.factor,
            "reason": self.reason,
            "reference": self.reference,
            "now": dict(self.now),
            "suggested": self.lrs,
            "held": self.held,
            "curves": curves,
        }

    def __str__(self) -> str:
        return printable("\n".join(self._lines()))

    def _lines(self) -> list[str]:
        first = self.curves[0]
        head = f"learning-rate range test: {len(self.curves)} repeats of {first.planned} steps"
        if self.held is not None:
            head += f", the plan held at step {self.held}"
        if self.suggestion is None or self.interval is None or self.factor is None:
            return [head, f"no suggestion: {self.reason}"]
        low, high = self.interval
        lines = [
            head,
            f"suggestion: lr {self.suggestion:.2g} for {self.reference!r}, now "
            f"{self.now[self.reference]:.2g}; the repeats suggest {low:.2g} to {high:.2g}",
        ]
        if len(self.now) > 1:
            lines.append(f"all ratios kept, every lr times {self.factor:.2g}:")
            width = max(map(len, list(self.now)[:_LISTED]))
            rows = [f"  {n:<{width}}  {lr:.2g} -> {self.lrs[n]:.2g}" for n, lr in self.now.items()]
            lines += rows[:_LISTED]
            if len(rows) > _LISTED:
                lines.append(f"  and {len(rows) - _LISTED} more groups")
        if len({curve.loss for curve in self.curves}) == 1:
            lines.append(
                "all repeats gave the same losses, so that the interval says nothing: there is one "
                "batch, or nothing random"
            )
        lines.append(f"to use it, {self.advice}")
        return lines

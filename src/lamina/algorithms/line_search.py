"""A line search for the strong Wolfe conditions, as torch's L-BFGS does it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

#: a sufficient decrease, and a sufficiently flat slope (Nocedal and Wright 2006, section 3.1)
DECREASE, CURVATURE = 1e-4, 0.9


class Point(NamedTuple):
    """Where a line search has looked: the step length, the loss, its gradient and its slope."""

    t: float
    loss: float
    grad: torch.Tensor
    slope: float


Evaluate = Callable[[float], Point]


def strong_wolfe(
    evaluate: Evaluate,
    start: Point,
    t: float,
    width: float,
    *,
    tolerance_change: float,
    max_evals: int,
) -> tuple[Point, int]:
    """Return a step length with a sufficient decrease and a flat slope.

        loss(t) <= loss(0) + 1e-4 * t * slope(0)     and     |slope(t)| <= 0.9 * |slope(0)|

    Args:
        evaluate: loss, gradient and slope at a step length.
        start: the point at t = 0.
        t: the first length to try.
        width: the largest component of the direction.
        tolerance_change: smallest change of a parameter that is worth an evaluation.
        max_evals: the number of further evaluations after which to stop.

    Returns:
        The best point, and the number of evaluations.

    References:
        Nocedal and Wright 2006, "Numerical optimization", algorithms 3.5 and 3.6.
    """
    previous, now = start, evaluate(t)
    for count in range(max_evals):
        enough = now.loss <= start.loss + DECREASE * now.t * start.slope
        good = enough and not (count > 1 and now.loss >= previous.loss)
        if good and _flat(now, start):
            return now, count + 1
        if not good or now.slope >= 0:
            bracket = [previous, now]
            return _zoom(evaluate, start, bracket, width, tolerance_change, count, max_evals)
        low, high = now.t + 0.01 * (now.t - previous.t), now.t * 10
        previous, now = now, evaluate(_cubic_minimum(previous, now, low, high))
    return (start if start.loss <= now.loss else now), max_evals + 1


def _flat(point: Point, start: Point) -> bool:
    return abs(point.slope) <= -CURVATURE * start.slope


def _zoom(
    evaluate: Evaluate,
    start: Point,
    bracket: list[Point],
    width: float,
    tolerance_change: float,
    count: int,
    max_evals: int,
) -> tuple[Point, int]:
    """Narrow a bracket that holds a good point; `count` evaluations beside the first are done."""
    low = 0 if bracket[0].loss <= bracket[1].loss else 1
    stuck = False
    while count < max_evals:
        left, right = sorted(point.t for point in bracket)
        if (right - left) * width < tolerance_change:
            break
        t, stuck = _inside(_cubic_minimum(bracket[0], bracket[1], left, right), left, right, stuck)
        now = evaluate(t)
        count += 1
        enough = now.loss <= start.loss + DECREASE * now.t * start.slope
        if not enough or now.loss >= bracket[low].loss:
            bracket[1 - low] = now
            low = 0 if bracket[0].loss <= bracket[1].loss else 1
            continue
        if _flat(now, start):
            return now, count + 1
        if now.slope * (bracket[1 - low].t - bracket[low].t) >= 0:
            bracket[1 - low] = bracket[low]
        bracket[low] = now
    return bracket[low], count + 1


def _inside(t: float, left: float, right: float, stuck: bool) -> tuple[float, bool]:
    """Keep a trial off the ends of its bracket if it was near one the last time too."""
    margin = 0.1 * (right - left)
    if min(right - t, t - left) >= margin:
        return t, False
    if stuck or t >= right or t <= left:
        nearer_right = abs(t - right) < abs(t - left)
        return (right - margin if nearer_right else left + margin), False
    return t, True


def _cubic_minimum(first: Point, second: Point, low: float, high: float) -> float:
    """Return where the cubic through two points and slopes is least, within bounds."""
    if first.t > second.t:
        first, second = second, first
    (x1, f1, _, g1), (x2, f2, _, g2) = first, second
    if x1 == x2:
        return (low + high) / 2
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2)
    square = d1**2 - g1 * g2
    if square < 0:
        return (low + high) / 2
    d2 = math.sqrt(square)
    divisor = g2 - g1 + 2 * d2
    if divisor == 0:
        return (low + high) / 2
    return min(max(x2 - (x2 - x1) * ((g2 + d2 - d1) / divisor), low), high)

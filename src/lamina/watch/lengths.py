"""How many calls of `step()` a scheduler was made for, where it tells."""

from __future__ import annotations

import functools
from typing import Any


def length_of(scheduler: Any) -> int | None:
    """Return the number of calls after which a schedule is over, or None if it does not tell.

    Args:
        scheduler: of torch, lamina or Transformers, or anything that has their attributes.
    """
    parts = parts_of(scheduler)
    if parts and hasattr(scheduler, "_milestones"):
        last = length_of(parts[-1])
        return None if last is None else int(scheduler._milestones[-1]) + last
    if parts:
        lengths = [length_of(part) for part in parts]
        return max((length for length in lengths if length is not None), default=None)
    for attribute in ("T_max", "total_steps"):
        given = _length(getattr(scheduler, attribute, None))
        if given is not None:
            return given
    if type(scheduler).__name__ == "PolynomialLR":
        return _length(scheduler.total_iters)
    return _length_in_functions(getattr(scheduler, "lr_lambdas", ()))


def parts_of(scheduler: Any) -> list[Any]:
    """Return the schedulers that a composed one holds."""
    parts = getattr(scheduler, "_schedulers", ())
    return list(parts) if isinstance(parts, (list, tuple)) else []


def all_of(scheduler: Any) -> list[Any]:
    """Return a scheduler and all that it is composed of."""
    return [scheduler, *(inner for part in parts_of(scheduler) for inner in all_of(part))]


def _length(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 1 <= value < float("inf") else None


def _length_in_functions(functions: Any) -> int | None:
    """Return the length that functions of Transformers carry with them."""
    for function in functions:
        if isinstance(function, functools.partial):
            length = _length(function.keywords.get("num_training_steps"))
            if length is not None:
                return length
    return None

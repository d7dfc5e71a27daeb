"""Checks and conversions of single numbers."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from ..errors import HyperparameterError


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a Python number; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a Python int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_amount(owner: str, key: str, value: Any) -> None:
    """Raise `HyperparameterError` unless value is a finite number of at least 0.

    With an empty key the owner is the place of the value itself.
    """
    if not is_number(value) or not 0 <= value <= sys.float_info.max:
        what = f"{owner} was given {key}={value!r};" if key else f"{owner}={value!r}:"
        raise HyperparameterError(f"{what} expected a finite number of at least 0.")


def python_number(value: Any) -> Any:
    """Convert a NumPy number to Python's; checkpoints with NumPy's do not load."""
    return value.item() if isinstance(value, np.generic) else value


def where_positive(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return a curve with gaps where it is 0, which has no place on a logarithmic axis."""
    return np.where(values > 0, values, np.nan)

"""Time is counted in optimizer steps; users may write steps, epochs or a share of the run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .._util.numbers import is_whole
from ..errors import TimeUnitError

#: What a user writes: `500`, `"500 steps"`, `"2 epochs"`, `"10%"`.
TimeLike = int | str

#: the most that is counted: whole numbers up to it are exact as floats too
LONGEST = 2**53
#: the most steps of a run, every one of which is looked at before it begins
LONGEST_RUN = 10**9

_TEXT = re.compile(r"\s*(\d{1,100}(?:\.\d{0,100})?|\.\d{1,100})\s*(%|steps?|epochs?)?\s*", re.ASCII)
_HELP = "write a whole number of steps (500 or '500 steps'), '2 epochs' or '10%'"


@dataclass(frozen=True)
class Run:
    """The length of a run, as far as it is known: its steps and the steps of one epoch."""

    steps: int | None = None
    steps_per_epoch: int | None = None


@dataclass(frozen=True)
class Time:
    """An exact length of time: an amount and its unit (`steps`, `epochs` or `%` of the run)."""

    amount: Fraction
    unit: str

    @property
    def text(self) -> TimeLike:
        """The shortest form a user would write."""
        if self.unit == "steps":
            return int(self.amount)
        number = _decimal(self.amount)
        return f"{number}%" if self.unit == "%" else f"{number} epochs"

    def in_steps(self, run: Run) -> Fraction:
        """Return the exact number of steps, not yet rounded; raise if the run is unknown."""
        if self.unit == "steps":
            return self.amount
        if self.unit == "epochs":
            if run.steps_per_epoch is None:
                raise TimeUnitError(
                    f"{self.text!r} is counted in epochs, but the length of an epoch is unknown; "
                    "pass steps_per_epoch= (optimizer steps in one epoch)."
                )
            return self.amount * run.steps_per_epoch
        if run.steps is None:
            raise TimeUnitError(
                f"{self.text!r} is a share of the run, but the length of the run is unknown; "
                "pass steps=, or epochs= with steps_per_epoch=."
            )
        return self.amount * run.steps / 100


def _decimal(amount: Fraction) -> str:
    """Return all digits of an amount that was written as a decimal, without an exponent."""
    places = 0
    while (amount * 10**places).denominator != 1:
        places += 1
    digits = str(int(amount * 10**places)).zfill(places + 1)
    return f"{digits[:-places]}.{digits[-places:]}" if places else digits


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> Time:
    match = _TEXT.fullmatch(text)
    if not match:
        raise TimeUnitError(f"{text!r} is not a length of time; {_HELP}.")
    amount = Fraction(match[1])
    unit = {"%": "%", "e": "epochs"}.get((match[2] or "steps")[0], "steps")
    if unit == "steps" and amount.denominator != 1:
        raise TimeUnitError(f"{text!r} is not a whole number of steps; {_HELP}.")
    if unit == "%" and amount > 100:
        raise TimeUnitError(f"{text!r} is longer than the run; a share is at most 100%.")
    return Time(amount, unit)


def parse(value: object) -> Time:
    """Read a length of time as a user writes it (see `TimeLike`)."""
    if isinstance(value, str):
        return _parse_text(value)
    if is_whole(value):
        if value < 0:
            raise TimeUnitError(f"{value} is negative; a length of time is 0 or more steps.")
        return Time(Fraction(value), "steps")
    if isinstance(value, float):
        raise TimeUnitError(
            f"{value!r} has no unit; write {_with_unit(value)}or a whole number of steps."
        )
    raise TimeUnitError(f"{value!r} is not a length of time; {_HELP}.")


def _as_steps(name: str, value: object) -> str:
    """Return how something that is no whole number is written as one, or an empty string."""
    if isinstance(value, float) and value.is_integer():
        return f" Write {name}={int(value)}."
    return f" Write {name}=len(loader)." if hasattr(value, "__len__") else ""


def _with_unit(amount: float) -> str:
    """Return the times that a number may mean, with a comma after each."""
    if not 0 <= amount < LONGEST_RUN:
        return ""
    digits = _decimal(Fraction(str(amount)))
    share = f"'{_decimal(Fraction(str(amount)) * 100)}%' of the run, " if amount <= 1 else ""
    return f"'{digits} epochs', {share}"


def run_of(
    steps: int | None = None,
    epochs: float | None = None,
    steps_per_epoch: int | None = None,
    accumulate: int = 1,
) -> Run:
    """Return the run that `build` and `preview` were told about.

    `steps` counts optimizer steps. `steps_per_epoch` counts the optimizer steps of an epoch;
    with `accumulate=n` it counts batches, n of which make one optimizer step (the last, shorter
    one of an epoch included).
    """
    for name, value in (("steps", steps), ("steps_per_epoch", steps_per_epoch)):
        if value is not None and not is_whole(value):
            raise TimeUnitError(
                f"{name}={value!r} is not a whole number of optimizer steps."
                f"{_as_steps(name, value)}"
            )
        if value is not None and value < 1:
            raise TimeUnitError(f"{name}={value} is out of range; expected 1 or more.")
        if value is not None and value > LONGEST_RUN:
            raise TimeUnitError(
                f"{name} is more than {LONGEST_RUN:,}, the longest run there can be."
            )
    if not is_whole(accumulate) or accumulate < 1:
        raise TimeUnitError(f"accumulate={accumulate!r} is not a whole number of batches >= 1.")
    if accumulate > 1 and steps_per_epoch is not None:
        steps_per_epoch = -(-steps_per_epoch // accumulate)
    if epochs is None:
        return Run(steps, steps_per_epoch)
    if not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        raise TimeUnitError(f"epochs={epochs!r} is out of range; expected a number above 0.")
    if steps is not None:
        raise TimeUnitError(
            f"steps={steps} and epochs={epochs:g} both give the length of the run; pass one."
        )
    if steps_per_epoch is None:
        raise TimeUnitError(
            f"epochs={epochs:g} needs steps_per_epoch= (optimizer steps in one epoch, "
            "usually len(loader)); or pass steps=."
        )
    if epochs > LONGEST_RUN or Fraction(str(epochs)) * steps_per_epoch > LONGEST_RUN:
        raise TimeUnitError(
            f"so many epochs of {steps_per_epoch:,} steps are more than {LONGEST_RUN:,} steps, the "
            "longest run there can be; give a smaller epochs=."
        )
    return Run(math.ceil(Fraction(str(epochs)) * steps_per_epoch), steps_per_epoch)

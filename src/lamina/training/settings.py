"""The settings of a run that are not the plan's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .._util.numbers import is_number
from ..errors import LaminaError, StateError, TimeUnitError, did_you_mean
from ..schedules import duration as time
from ..schedules.duration import TimeLike
from .reuse_settings import ReuseSettings, with_options
from .task import Task

PRECISIONS = ("no", "fp16", "bf16")
#: with another one of these a run would not go on as it began
EXACT = ("seed", "accumulate", "mixed_precision")
#: what may differ when a run goes on
FREE = ("epochs", "save_every", "keep", "fsdp", "reuse")


@dataclass(frozen=True)
class Settings:
    """Checked; `mixed_precision` is None for whatever `accelerate launch` was told.

    `fsdp` shards the model over the processes, if there are several. `reuse` is True, False, or a
    mapping of options as `ReuseSettings` has them.
    """

    epochs: float = 1
    seed: int = 0
    accumulate: int = 1
    mixed_precision: str | None = None
    save_every: TimeLike = "1 epochs"
    keep: int = 2
    fsdp: bool = False
    reuse: bool | Mapping[str, Any] = False

    @classmethod
    def of(cls, task: Task, **given: Any) -> Settings:
        """Return what was asked for, else the task's defaults, else those of the class."""
        own = {key: value for key, value in task.defaults.items() if key in _NAMES}
        return cls(**_joined(own, given))

    @classmethod
    def resumed(cls, saved: Mapping[str, Any], **given: Any) -> Settings:
        """Return those that the run has, but for what is asked for and may differ.

        Raises:
            StateError: if the run could not go on as it began.
        """
        asked = _asked(given)
        for name in EXACT:
            if name in asked and asked[name] != saved.get(name):
                raise StateError(
                    f"{name}={asked[name]!r} was given, but the run to resume has {name}="
                    f"{saved.get(name)!r}, and would not go on as it began. Leave it out, or begin "
                    "a new run."
                )
        known = {name: value for name, value in saved.items() if name in _NAMES}
        return cls(**_joined(known, asked))

    def __post_init__(self) -> None:
        if not is_number(self.epochs) or not 0 < self.epochs < math.inf:
            raise TimeUnitError(f"epochs={self.epochs!r}: expected a number above 0.")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise LaminaError(f"seed={self.seed!r}: expected a whole number from 0 to 2^32 - 1.")
        if not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise TimeUnitError(
                f"accumulate={self.accumulate!r}: expected a whole number of batches, at least 1."
            )
        if self.mixed_precision is not None and self.mixed_precision not in PRECISIONS:
            raise LaminaError(
                f"mixed_precision={self.mixed_precision!r}: expected one of "
                f"{', '.join(PRECISIONS)}.{did_you_mean(str(self.mixed_precision), PRECISIONS)}"
            )

        if time.parse(self.save_every).amount == 0:
            raise TimeUnitError(
                f"save_every={self.save_every!r}: expected a time above 0, such as '500 steps', "
                "'1 epochs' or '10%'."
            )
        if not isinstance(self.fsdp, bool):
            raise LaminaError(f"fsdp={self.fsdp!r}: expected True or False.")
        if not isinstance(self.keep, int) or self.keep < 1:
            raise LaminaError(f"keep={self.keep!r}: expected a whole number of at least 1.")
        ReuseSettings.of(self.reuse)


_NAMES = frozenset(asdict(Settings()))


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _joined(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those that were asked for in their place."""
    reuse = with_options(own.get("reuse"), given.get("reuse"))
    joined = {**own, **_asked(given)}
    return joined if reuse is None else {**joined, "reuse": reuse}

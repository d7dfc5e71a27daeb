"""The settings of a run that are not the plan's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import LaminaError, TimeUnitError, did_you_mean
from .task import Task

PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True)
class Settings:
    """Checked; `mixed_precision` is None for whatever `accelerate launch` was told."""

    epochs: float
    seed: int
    accumulate: int
    mixed_precision: str | None

    @classmethod
    def of(
        cls,
        task: Task,
        epochs: float | None = None,
        seed: int | None = None,
        accumulate: int | None = None,
        mixed_precision: str | None = None,
    ) -> Settings:
        """What was asked for, else the task's defaults, else one epoch with seed 0."""
        own = task.defaults
        given = cls(
            epochs if epochs is not None else own.get("epochs", 1),
            seed if seed is not None else own.get("seed", 0),
            accumulate if accumulate is not None else own.get("accumulate", 1),
            mixed_precision if mixed_precision is not None else own.get("mixed_precision"),
        )
        given.check()
        return given

    def check(self) -> None:
        """Raise for what cannot be meant."""
        if not _is_number(self.epochs) or not 0 < self.epochs < math.inf:
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

    def accelerator(self, cpu: bool) -> Any:
        """Accelerate's accelerator, with every seed set."""
        from accelerate import Accelerator
        from accelerate.utils import (
            DataLoaderConfiguration,
            GradientAccumulationPlugin,
            set_seed,
        )

        if cpu and self.mixed_precision == "fp16":  # Accelerate would quietly train in float32
            raise LaminaError(
                "mixed_precision='fp16' was given with cpu=True, but fp16 needs a GPU. Choose bf16 "
                "or no, or leave out --cpu."
            )
        try:
            accelerator = Accelerator(
                cpu=cpu,
                mixed_precision=self.mixed_precision,
                # As a plugin: a plain number would give way to the launcher's environment.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=self.accumulate),
                dataloader_config=DataLoaderConfiguration(
                    use_seedable_sampler=True, data_seed=self.seed
                ),
            )
        except ValueError as error:
            raise LaminaError(
                f"mixed_precision={self.mixed_precision!r}, cpu={cpu}: this device cannot train so "
                f"({error}). Choose another precision, or 'no'."
            ) from error
        set_seed(self.seed)
        return accelerator


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

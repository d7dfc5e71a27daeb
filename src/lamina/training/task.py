"""A task: what a user writes to be trained, behind checked calls.

A task is a module or a Python file that gives

    model() -> nn.Module
    data() -> {"train": DataLoader, "validation": DataLoader}
    loss(model, batch) -> the mean loss of a batch, a scalar tensor

and, if it likes,

    metrics(model, batch) -> {name: one float per example}; averaged exactly over all batches and
                             processes. If it has "loss", validation calls nothing else.
    baseline(data) -> {name: value}, figures from the same data to compare the result with
    PLAN      the default plan: TOML text or the path of a file
    DEFAULTS  {"epochs": ..., "batch_size": ..., "seed": ...}; with these, data() takes
              batch_size and seed as keywords
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import LaminaError, TaskError, did_you_mean
from ..plan.plan import Plan

NEEDED = ("model", "data", "loss")
DEFAULTS = ("epochs", "batch_size", "seed", "accumulate", "mixed_precision", "reuse")


class Data(NamedTuple):
    """The loaders of a task, and what its `data()` returned, for its `baseline`."""

    train: DataLoader[Any]
    validation: DataLoader[Any]
    raw: Any


@dataclass(frozen=True)
class Task:
    """A task module behind checked calls.

    Args:
        name: short, for messages and folders.
        module: what the user wrote.
        file: the whole path of the file that was named to load it; None for a module or an example
            task.
    """

    name: str
    module: ModuleType
    file: str | None = None

    def __post_init__(self) -> None:
        for key in NEEDED:
            if not callable(getattr(self.module, key, None)):
                mine = [name for name in vars(self.module) if not name.startswith("_")]
                raise TaskError(
                    f"{self.place}: the function {key!r} is missing; a task gives model(), data() "
                    f"and loss(model, batch).{did_you_mean(key, mine)}"
                )
        for key in ("metrics", "baseline"):
            if not callable(getattr(self.module, key, lambda: None)):
                raise TaskError(f"{self.place}: {key!r} is not a function.")
        if not isinstance(self.defaults, Mapping):
            raise TaskError(f"{self.place}: DEFAULTS is {self.defaults!r}; expected a dict.")
        for key in self.defaults:
            if key not in DEFAULTS:
                raise TaskError(
                    f"{self.place}: DEFAULTS has the unknown key {key!r}; expected some of "
                    f"{', '.join(DEFAULTS)}.{did_you_mean(str(key), DEFAULTS)}"
                )

    @property
    def place(self) -> str:
        """The file, for messages."""
        return getattr(self.module, "__file__", None) or self.name

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (self.module.__doc__ or "").strip().partition("\n")[0]

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The task's own choice of run settings."""
        defaults: Mapping[str, Any] = getattr(self.module, "DEFAULTS", {})
        return defaults

    @property
    def examples(self) -> str:
        """What the examples are called, such as "texts"."""
        return str(getattr(self.module, "EXAMPLES", "examples"))

    @property
    def has_metrics(self) -> bool:
        """Whether it measures more than the loss."""
        return hasattr(self.module, "metrics")

    def model(self) -> nn.Module:
        """Return a fresh model."""
        model = self._call("model")
        if not isinstance(model, nn.Module):
            raise self._wrong("model()", model, "a torch.nn.Module")
        return model

    def takes(self, keyword: str) -> bool:
        """Return whether its data() has a keyword."""
        return keyword in inspect.signature(self.module.data).parameters

    def data(self, seed: int) -> Data:
        """Return the loaders; pass `seed` and `batch_size` to a task that takes them."""
        given = {**self.defaults, "seed": seed}
        keywords = {k: given[k] for k in ("batch_size", "seed") if self.takes(k) and k in given}
        raw = self._call("data", **keywords)
        loaders = []
        for part in ("train", "validation"):
            loader = raw.get(part) if isinstance(raw, Mapping) else getattr(raw, part, None)
            if not isinstance(loader, DataLoader):
                raise self._wrong(f"data().{part}", loader, "a torch.utils.data.DataLoader")
            loaders.append(loader)
        return Data(loaders[0], loaders[1], raw)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the mean loss of a batch."""
        loss = self.module.loss(model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise self._wrong("loss(model, batch)", loss, "a tensor with one number")
        return loss.reshape(())

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        """Return one float per example, by name; empty if the task has no metrics."""
        if not self.has_metrics:
            return {}
        found = self.module.metrics(model, batch)
        if not isinstance(found, Mapping):
            raise self._wrong("metrics(model, batch)", found, "a dict of tensors")
        for key, value in found.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                what = f"metrics(model, batch)[{key!r}]"
                raise self._wrong(what, value, "a tensor with one number per example")
        return dict(found)

    def baseline(self, data: Data) -> dict[str, float]:
        """Return figures to compare the result with; empty if the task has none."""
        if not hasattr(self.module, "baseline"):
            return {}
        found = self._call("baseline", data.raw)
        if not isinstance(found, Mapping):
            raise self._wrong("baseline(data)", found, "a dict of numbers")
        return {str(key): float(value) for key, value in found.items()}

    def plan(self) -> Plan:
        """Return the task's own plan."""
        plan = getattr(self.module, "PLAN", None)
        if isinstance(plan, Plan):
            return plan
        if plan is None:
            raise TaskError(
                f"{self.place}: the task has no plan of its own (PLAN); give one after the "
                f"task, such as {self.file or self.name} plan.toml"
            )
        if not isinstance(plan, (str, os.PathLike)):
            raise self._wrong("PLAN", plan, "TOML text, the path of a file, or a lamina.Plan")
        text = os.fspath(plan)
        if "\n" in text or "=" in text:
            try:
                return Plan.from_toml(text)
            except LaminaError as error:
                raise type(error)(f"{self.place}, PLAN: {error}") from error
        return Plan.from_toml(Path(self.place).parent / text)

    def _call(self, function: str, *args: Any, **keywords: Any) -> Any:
        """Call a function of the task; what it raises is told with its place."""
        try:
            return getattr(self.module, function)(*args, **keywords)
        except LaminaError:
            raise
        except Exception as error:
            raise TaskError(
                f"{where(error, self.place)}: {function}() failed with "
                f"{in_one_line(error)}. Correct it, or install what it needs."
            ) from error

    def _wrong(self, what: str, given: object, expected: str) -> TaskError:
        shown = "nothing" if given is None else _described(given)
        return TaskError(f"{self.place}: {what} gives {shown}; expected {expected}.")


def where(error: BaseException, place: str) -> str:
    """Return the task's file and the line of it that was running."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}, line {error.lineno}"
    same = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.abspath(frame.filename) == os.path.abspath(place)
    ]
    return f"{place}, line {same[-1]}" if same else place


def in_one_line(error: BaseException) -> str:
    """Return an exception on one line."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    text = " ".join(text.split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"

"""What a checkpoint of a run holds, as a checked value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from torch import nn

from .._util.randomness import State
from .._util.text import listed
from ..errors import StateError
from ..state.schema import is_count, short
from .position import Position
from .records import Validation


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a whole step.

    Args:
        task: its name.
        plan: the plan as TOML, or else as Python shows it; to be read by people only.
        settings: those of `Settings`.
        data: what the data must be alike in: batches of an epoch, size of a batch, examples.
        processes: how many trained.
        clock: optimizer steps taken.
        skipped: steps that were not taken because of a gradient.
        since: the step from which on it followed this plan over this length.
        steps: the length of the run in optimizer steps.
        epoch: counted from 0.
        batches: those of the epoch that were used.
        validated: whether the model was measured after them.
        seconds: of training.
        recorded: bytes of `metrics.jsonl`.
        validation: the last one, as a dict.
        best: the best value so far of the metric that is watched, and its step.
        random: for each process its three random states (see `lamina.training.position`).
        scaler: that of fp16.
        versions: of what ran.
        model: `model.state_dict()`.
        optimizer: `optimizer.state_dict()`, which holds clock, overrides and feedback.
    """

    task: str
    plan: str
    settings: dict[str, Any]
    data: dict[str, Any]
    processes: int
    clock: int
    skipped: int
    since: int
    steps: int
    epoch: int
    batches: int
    validated: bool
    seconds: float
    recorded: int
    validation: dict[str, Any] | None
    best: dict[str, Any] | None
    random: list[dict[str, State]]
    scaler: dict[str, Any] | None
    versions: dict[str, str]
    model: dict[str, Any]
    optimizer: dict[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any], path: Path) -> Snapshot:
        """Check what a file held.

        Raises:
            StateError: if something is missing or not what it should be.
        """
        _check_fields(content, _KINDS, path, "")
        for name, kinds in (("validation", _VALIDATION), ("best", _BEST)):
            if content[name] is not None:
                _check_fields(content[name], kinds, path, f"{name}.")
        for states in content["random"]:
            if not isinstance(states, Mapping) or states.keys() != {"start", "before", "after"}:
                raise StateError(
                    f"{path}: the checkpoint is not one of a run: a random state is "
                    f"{short(states)}. Use one that `lamina run` wrote."
                )
        snapshot = cls(**{name: content[name] for name in _KINDS})
        groups = snapshot.optimizer.get("param_groups")
        if not groups or not all(isinstance(group, dict) for group in groups):
            raise StateError(f"{path}: the state of the optimizer has no groups. Use another.")
        if len(snapshot.random) != snapshot.processes:
            raise StateError(
                f"{path}: the checkpoint does not have the random states of the "
                f"{snapshot.processes} process(es) that trained; it was changed by hand. Use "
                "another."
            )
        return snapshot

    def position(self, process: int) -> Position:
        """Return where a process stands."""
        return Position(self.epoch, self.batches, self.validated, **self.random[process])

    @property
    def last(self) -> Validation | None:
        """The last validation."""
        found = self.validation
        return None if found is None else Validation(**{name: found[name] for name in _VALIDATION})


def _kinds(of: type) -> dict[str, Any]:
    """Return the type of every field of a class, `dict` for one such as `dict[str, float]`."""
    return {name: get_origin(hint) or hint for name, hint in get_type_hints(of).items()}


_KINDS: dict[str, Any] = {
    **_kinds(Snapshot),
    **dict.fromkeys(("validation", "best", "scaler"), (dict, type(None))),
}
_VALIDATION = _kinds(Validation)
_BEST: dict[str, Any] = {"metric": str, "value": float, "step": int}


def _check_fields(
    content: Mapping[str, Any], kinds: Mapping[str, Any], path: Path, within: str
) -> None:
    """Raise `StateError` for a value that is missing or of another kind, or no count."""
    for name, kind in kinds.items():
        value: Any = content.get(name)
        good = name in content and isinstance(value, kind)
        good &= kind is not int or is_count(value)
        good &= name != "seconds" or (isinstance(value, float) and math.isfinite(value))
        if not good:
            given = "nothing" if name not in content else short(value)
            raise StateError(
                f"{path}: the checkpoint is not one of a run: its {within + name!r} is {given}. "
                "Use one that `lamina run` wrote."
            )


def check_model(model: nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Raise `StateError` if a saved model is not this one, name by name; changes nothing."""
    live = model.state_dict()
    clauses = []
    if missing := [name for name in live if name not in saved]:
        clauses.append(f"the model has {listed(missing)}, which the checkpoint has not")
    if extra := [str(name) for name in saved if name not in live]:
        clauses.append(f"the checkpoint has {listed(extra)}, which the model has not")
    if other := [
        f"{name} ({_form(saved[name])} in the checkpoint, {_form(value)} in the model)"
        for name, value in live.items()
        if name in saved and _form(saved[name]) != _form(value)
    ]:
        clauses.append(f"these differ: {listed(other)}")
    if clauses:
        raise StateError(
            f"{path}: the checkpoint is of another model: {'; '.join(clauses)}. Resume with the "
            "task as it was when the run began. Nothing was changed."
        )


def _form(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__

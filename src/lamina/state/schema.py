"""The form of a saved state: read and checked before anything is made of it.

Beside torch's keys, every group of a plan's optimizer holds `format`, `optimizer`, `param_names`,
`param_shapes`, `clock`, `run`, `overrides` and `feedback`: torch.distributed.checkpoint keeps what
lies in the groups and drops other keys at the top. All of it is plain values.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .._util.numbers import is_number, is_whole
from ..errors import LaminaError, StateError, shortened
from ..files.plain import check_values
from ..model.parameters import clean_names
from ..optim.loading import check_form
from ..schedules.duration import LONGEST, LONGEST_RUN, Run

#: the version that this lamina writes, and the newest that it reads
FORMAT = 1
#: begins with the first update that has a momentum; the room that is made for it holds NaN, since
#: zeros would be a buffer, to which dampening applies where it would not to a first gradient
MOMENTUM = "momentum_buffer"

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """What a state holds of one parameter (None: nothing), and the group it was saved in."""

    values: Mapping[str, Any] | None
    group: Group
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Saved:
    """A saved state, checked for its form alone.

    `names` are clean, in the order of `entries`; None if the state has none. `clock` is None if
    the state has none, as torch's. `run` is the length of the run that was saved, `planned` the
    length that its schedules were settled for. `by_fqn`: names stand for the parameter numbers, as
    torch.distributed.checkpoint writes them.

    `loose` are entries that are no parameter's, and `rest` other keys at the top: some optimizers
    of other packages write these.
    """

    names: tuple[str, ...] | None
    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    clock: int | None
    run: Run | None
    planned: Run | None
    by_fqn: bool = False
    loose: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settled_for(self) -> Run | None:
        """The run whose length the saved schedules fitted; None if the state does not know it."""
        return self.planned or self.run


def run_record(run: Run) -> dict[str, int | None]:
    """Return a run as plain values."""
    return {"steps": run.steps, "steps_per_epoch": run.steps_per_epoch}


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever a damaged state brings about into a `StateError` that says what was read."""
    try:
        yield
    except (LaminaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        text = shortened((str(error).splitlines() or [""])[0])
        raise StateError(
            f"{what} cannot be read ({type(error).__name__}: {text}); nothing was loaded. The "
            "state was damaged, or changed by hand; use another one."
        ) from error


def is_count(value: Any) -> bool:
    """Return whether a value is a number of steps, updates or reports."""
    return type(value) is int and 0 <= value <= LONGEST


@reading("the saved state")
def read(saved: Any) -> Saved:
    """Check the form of a state; raises `StateError` with the name of what is wrong."""
    groups = _groups(saved)
    # Saved hyperparameters are only compared with those of the plan, whatever numbers they are.
    check_values(saved, "the saved state", numbers=False)
    for group in groups:
        _check_version(group.get("format", FORMAT))
    keys = [key for group in groups for key in group["params"]]
    _refuse_doubles("parameter number", keys)
    entries = saved["state"]
    if not isinstance(entries, Mapping):
        raise StateError(f"the saved 'state' is {short(entries)}; expected a dict by parameter.")
    known, by_fqn = set(keys), _by_fqn(keys)
    others = [key for key in entries if key not in known]
    if others and (by_fqn or not all(isinstance(key, str) for key in others)):
        raise stray(others[0], len(keys))
    names = _names(groups, keys)
    shapes = _shapes(groups)
    found = []
    rows = ((key, group) for group in groups for key in group["params"])
    for place, (key, group) in enumerate(rows):
        values = entries.get(key)
        if values is not None and not isinstance(values, Mapping):
            called = f"parameter {short(key)}" if names is None else short(names[place])
            raise StateError(f"the saved state of {called} is {short(values)}; expected a dict.")
        for name, value in (values or {}).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                called = f"parameter {short(key)}" if names is None else short(names[place])
                raise StateError(
                    f"the saved {name} of {called} is on the meta device, without data; nothing "
                    "was loaded."
                )
        if values and by_fqn:
            values = {name: value for name, value in values.items() if not _unread(name, value)}
        found.append(Entry(values, group, None if names is None else shapes.get(names[place])))
    return Saved(
        names,
        tuple(found),
        tuple(groups),
        _clock(groups),
        _run(groups, "run"),
        _run(groups, "planned"),
        by_fqn=by_fqn,
        loose={key: entries[key] for key in others},
        rest={key: saved[key] for key in saved if key not in ("state", "param_groups")},
    )


def stray(key: Any, count: int) -> StateError:
    """Return the error for an entry that belongs to none of so many parameters."""
    return StateError(
        f"the saved state has an entry {short(key)}, which is no parameter of its groups "
        f"({count} parameters); nothing was loaded."
    )


def number_of_steps(name: str, value: Any) -> int:
    """Return a saved number of updates, which may be an int, a float or a tensor."""
    number = value
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        number = value.item()
    if not is_number(number):
        raise StateError(f"the saved step of {name!r} is {short(value)}; expected a number.")
    if not 0 <= number <= LONGEST or number != int(number):
        raise StateError(
            f"the saved step of {name!r} is {short(number)}; expected a whole number of updates."
        )
    return int(number)


def _groups(saved: Any) -> list[Group]:
    check_form(saved)
    groups = saved["param_groups"]
    if isinstance(groups, (str, Mapping)) or not isinstance(groups, Sequence):
        raise StateError(f"the saved 'param_groups' is {short(groups)}; expected a list.")
    if not groups:
        raise StateError("the saved state has no parameter groups.")
    for place, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise StateError(
                f"the saved parameter group {place} is {short(group)}; expected a dict with a "
                "list 'params'."
            )
        for key in group["params"]:
            if isinstance(key, bool) or not isinstance(key, (int, str)):
                raise StateError(
                    f"the saved parameter group {place} lists {short(key)} as a parameter; "
                    "expected its number."
                )
    return list(groups)


def _check_version(version: Any) -> None:
    if not is_whole(version):
        raise StateError(f"the saved format is {short(version)}; expected a number.")
    if version > FORMAT:
        raise StateError(
            f"the state was saved in format {version}, but this lamina reads formats up to "
            f"{FORMAT}; upgrade lamina (pip install -U lamina)."
        )


def _names(groups: list[Group], keys: list[Any]) -> tuple[str, ...] | None:
    """Return the clean names of all parameters; torch's checkpoints have them in `params`."""
    if _by_fqn(keys):
        given: list[Any] = keys
    else:
        if all(group.get("param_names") is None for group in groups):
            return None
        given = []
        for group in groups:
            names = _texts(group.get("param_names"))
            if len(names) != len(group["params"]):
                raise StateError(
                    f"a saved group has {len(names)} names for {len(group['params'])} parameters; "
                    "expected one for each, in all groups or in none."
                )
            given += names
    _refuse_doubles("the parameter", given)
    cleaned = clean_names(given)
    return tuple(cleaned[name] for name in given)


def _by_fqn(keys: list[Any]) -> bool:
    return bool(keys) and all(isinstance(key, str) for key in keys)


def _unread(key: str, value: Any) -> bool:
    """Return whether a value was not in the checkpoint: {}, or room left as it was."""
    if key == MOMENTUM and isinstance(value, torch.Tensor):
        return bool(value.isnan().all())
    return isinstance(value, Mapping) and not value


def _texts(names: Any) -> Sequence[str]:
    if names is None:
        return ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise StateError(f"the saved 'param_names' is {short(names)}; expected a list of texts.")
    return names


def _shapes(groups: list[Group]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters by clean name, as far as the groups tell."""
    found: dict[str, tuple[int, ...]] = {}
    for group in groups:
        names, shapes = _texts(group.get("param_names")), group.get("param_shapes")
        rows = () if shapes is None else shapes
        if not isinstance(rows, (list, tuple)) or not all(map(_is_shape, rows)):
            raise StateError(
                f"the saved 'param_shapes' is {short(shapes)}; expected a list of whole numbers "
                "for each parameter."
            )
        if len(names) == len(rows):  # else torch.distributed.checkpoint made the groups anew
            cleaned = clean_names(names)
            found.update((cleaned[name], tuple(row)) for name, row in zip(names, rows, strict=True))
    return found


def _is_shape(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and all(map(is_count, row))


def _refuse_doubles(what: str, given: list[Any]) -> None:
    if len(set(given)) != len(given):
        double = next(key for key in given if given.count(key) > 1)
        raise StateError(f"the saved state lists {what} {short(double)} twice; nothing was loaded.")


def _clock(groups: list[Group]) -> int | None:
    clocks = [group["clock"] for group in groups if "clock" in group]
    for clock in clocks:
        if not is_count(clock):
            raise StateError(f"the saved clock is {short(clock)}; expected a number of steps.")
    if len(set(clocks)) > 1:
        raise StateError(f"the saved groups have different clocks: {sorted(set(clocks))}.")
    return clocks[0] if clocks else None


def _run(groups: list[Group], key: str) -> Run | None:
    """Return the length of a run; None if the state does not know it."""
    record = next((group[key] for group in groups if group.get(key) is not None), None)
    if record is None:
        return None
    fits = isinstance(record, Mapping) and set(record) == {"steps", "steps_per_epoch"}
    lengths = list(record.values()) if fits else []
    if not fits or not all(n is None or (is_count(n) and 0 < n <= LONGEST_RUN) for n in lengths):
        raise StateError(
            f"the saved {key} is {short(record)}; expected its steps and steps_per_epoch."
        )
    return Run(record["steps"], record["steps_per_epoch"])


def short(value: Any) -> str:
    """Return a value in few letters, whatever it is."""
    try:
        # Of nested values only what is shown is looked at: written out, some would never end.
        text = (
            f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else reprlib.repr(value)
        )
    except (ValueError, RecursionError):  # thousands of digits, or of brackets
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."

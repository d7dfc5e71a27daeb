"""Freezing and thawing by hand, for those who want only this; and the table of what trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PatternError, PlanError, did_you_mean
from .eval_lock import lock_eval, unlock_eval
from .finding import stray_findings
from .parameters import (
    Owned,
    collect,
    frozen_by_plan,
    mark_frozen,
    needs,
    observe,
    set_requires_grad,
)
from .patterns import PatternLike, compile_pattern, shown
from .reducers import free_gradients, has_zero_gradients
from .suggestions import nothing_matched
from .ties import refuse_wrapped

#: a pattern, or a list of exact names of parameters or modules
Selection = PatternLike | Iterable[str]


def freeze(model: nn.Module, match: Selection = "*", *, hold: bool = True) -> tuple[str, ...]:
    """Stop parameters from training, now and by hand.

    Turns `requires_grad` off and drops left-over gradients, which an optimizer would still apply.
    A plan built later takes these parameters for frozen unless a rule says otherwise.

    Args:
        model: changed in place; freeze before wrapping it in DistributedDataParallel.
        match: a pattern such as `"cnn.*"`, or a list of exact names of parameters or modules.
        hold: keep modules that are wholly frozen in eval mode, through later `model.train()`: the
            statistics of BatchNorm and dropout rest with the weights.

    Returns:
        The names that are frozen now and trained before.

    Raises:
        PatternError: for a pattern that matches nothing or an unknown name; nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> freeze(model, "1.*")
        ('1.weight', '1.bias')
    """
    owned, chosen = _choose(model, match, "freeze")
    changed = tuple(item.info.name for item in chosen if item.tensor.requires_grad)
    set_requires_grad((item.info.name, item.tensor, False) for item in chosen)
    for item in chosen:
        item.tensor.grad = None
        mark_frozen(item.places, "call")  # by hand from now on, whatever a plan did
    if hold:
        touched = {item.info.name for item in chosen}
        frozen = {item.info.name for item in owned if not item.tensor.requires_grad}
        for module, need in needs(model, owned):
            if need & touched and need <= frozen:
                lock_eval(module, model).by_hand = True
    return changed


def thaw(model: nn.Module, match: Selection = "*") -> tuple[str, ...]:
    """Let parameters train again, and let go of modules that `freeze` held in eval mode.

    What a plan froze is thawed too, but a plan still in force goes on dropping its gradients: give
    its rule `thaw=` instead, or call `optimizer.release()` first.

    Args:
        model: changed in place; thaw before wrapping it in DistributedDataParallel.
        match: a pattern such as `"cnn.*"`, or a list of exact names of parameters or modules.

    Returns:
        The names that train now and were frozen before.

    Raises:
        PatternError: for a pattern that matches nothing or an unknown name; nothing was changed.
        PlanError: for parameters of a dtype without gradients. A pattern that selects others too
            leaves them out.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> _ = freeze(model)
        >>> thaw(model, ["1.bias"])
        ('1.bias',)
    """
    owned, chosen = _choose(model, match, "thaw")
    chosen = _trainable(chosen, by_pattern=isinstance(match, str) or callable(match))
    changed = tuple(item.info.name for item in chosen if not _trains(item))
    set_requires_grad((item.info.name, item.tensor, True) for item in chosen)
    for item in chosen:
        free_gradients(item.tensor)
        mark_frozen(item.places, None)
    touched = {item.info.name for item in chosen}
    for module, need in needs(model, owned):
        if need & touched:
            unlock_eval(module, model)
    return changed


@dataclass(frozen=True)
class Row:
    """One parameter: its names (several if it is tied), and why it does not train (else empty)."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    numel: int
    trainable: bool
    why: str


@dataclass(frozen=True)
class Trainable:
    """What trains in a model, as `rows`; prints as a table. `notes` are warnings."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def numel(self) -> tuple[int, int]:
        """How many numbers train, and how many there are."""
        trains = sum(row.numel for row in self.rows if row.trainable)
        return trains, sum(row.numel for row in self.rows)

    def __str__(self) -> str:
        cells = [("parameter", "shape", "trains", "why")]
        for row in self.rows:
            tied = f" (= {', '.join(row.names[1:])})" if len(row.names) > 1 else ""
            shape = " x ".join(map(str, row.shape)) or "scalar"
            cells.append((row.name + tied, shape, "yes" if row.trainable else "no", row.why))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        trains, total = self.numel
        share = f" ({trains / total:.1%})" if total else ""
        return "\n".join([*lines, f"{trains:,} of {total:,} numbers train{share}", *self.notes])


def trainable(model: nn.Module) -> Trainable:
    """Return which parameters train, and why the others do not: frozen by a plan, or by hand.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        >>> _ = freeze(model, "0.weight")
        >>> print(trainable(model))
        parameter  shape  trains  why
        0.weight   2 x 3  no      frozen by hand
        0.bias     2      yes
        1.weight   1 x 2  yes
        1.bias     1      yes
        5 of 11 numbers train (45.5%)
    """
    owned = collect(model)
    rows = []
    for item in owned:
        info = item.info
        rows.append(Row(info.name, info.names, info.shape, info.numel, _trains(item), _why(item)))
    notes = tuple(map(str, stray_findings(observe(model, owned))))
    return Trainable(tuple(rows), notes)


def _trainable(chosen: list[Owned], by_pattern: bool) -> list[Owned]:
    """Leave out parameters of integer, bool and quantized dtypes, which have no gradients."""
    can = [item for item in chosen if item.info.differentiable]
    if can and (by_pattern or len(can) == len(chosen)):
        return can
    item = next(item for item in chosen if not item.info.differentiable)
    raise PlanError(
        f"thaw: {item.info.name!r} has dtype {item.info.dtype}, which has no gradients; convert it "
        "to a floating-point dtype first, or leave it out. Nothing was changed."
    )


def _trains(item: Owned) -> bool:
    return item.tensor.requires_grad and not has_zero_gradients(item.tensor)


def _why(item: Owned) -> str:
    if _trains(item):
        return ""
    by_plan = item.tensor.requires_grad or frozen_by_plan(item.tensor, item.places)
    if not item.info.differentiable:
        return f"{item.info.dtype} has no gradients"
    return "frozen by a plan" if by_plan else "frozen by hand"


def _choose(
    model: nn.Module, match: Selection, action: str
) -> tuple[tuple[Owned, ...], list[Owned]]:
    owned = collect(model)
    refuse_wrapped(model, action)
    _refuse_objects(model, match, action)
    if isinstance(match, str) or callable(match):
        pattern = compile_pattern(match)
        chosen = [item for item in owned if pattern.matches(item.info)]
        if not chosen:
            said = nothing_matched(match, [item.info for item in owned])
            raise PatternError(f"{action}: {match!r} {said}")
        return owned, chosen
    return owned, _exactly(owned, list(match), action)


def _refuse_objects(model: nn.Module, match: Any, action: str) -> None:
    """Raise `PatternError` for what is not a selection, with the name of a module or parameter."""
    listed = isinstance(match, (list, tuple, set, frozenset))
    for item in match if listed else [match]:
        if isinstance(item, str) or (not listed and _is_selection(item)):
            continue
        everything = [*model.named_modules(), *model.named_parameters()]
        name = next((name for name, each in everything if each is item), None)
        if name is None:
            fix = "."
        elif name:
            fix = f"; this one is {name!r} in the model."
        else:
            fix = "; for the whole model, write '*'."
        raise PatternError(
            f"{action} was given {'a list with ' if listed else ''}{shown(item)}; expected a "
            f"pattern such as 'cnn.*', or a list of exact names of parameters or modules{fix}"
        )


def _is_selection(item: Any) -> bool:
    if isinstance(item, (nn.Module, torch.Tensor, type)):  # some of them can be called
        return False
    return callable(item) or isinstance(item, Iterable)


def _exactly(owned: Sequence[Owned], wanted: list[str], action: str) -> list[Owned]:
    known: dict[str, list[Owned]] = {}
    for item in owned:
        for name in item.info.names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                known.setdefault(".".join(parts[:end]), []).append(item)
    for name in wanted:
        if name not in known:
            raise PatternError(
                f"{action}: there is no parameter or module {name!r} (a list holds exact names; "
                f"write a pattern as a plain string).{did_you_mean(str(name), known)}"
            )
    ids = {id(item.tensor) for name in wanted for item in known[name]}
    return [item for item in owned if id(item.tensor) in ids]

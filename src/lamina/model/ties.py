"""Tied parameters: several names of a model that are one and the same `nn.Parameter`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from .._util.tensors import is_dtensor, relation
from ..errors import PlanError, did_you_mean
from .parameters import Owned, collect, overlap_fix, overlaps

log = logging.getLogger("lamina")
Place = tuple[nn.Module, str]
#: wrappers that have taken hold of the parameters, so that they cannot be exchanged any more
_WRAPPED = ("DistributedDataParallel", "FullyShardedDataParallel")


class Tie(tuple[str, ...]):
    """The names of one tie; compares as a plain tuple of names.

    `kind` says how they are tied: `"parameter"` (one Parameter in several places), `"module"` (one
    module in several places), or two Parameters over the same memory, which is an error in a plan:
    `"view"` or `"transposed"`.
    """

    kind: str

    def __new__(cls, names: Iterable[str], kind: str = "parameter") -> Tie:
        """Return a tie of these names."""
        tie = super().__new__(cls, tuple(names))
        tie.kind = kind
        return tie

    def __repr__(self) -> str:
        return f"<{self.kind}: {' = '.join(self)}>"


def tie(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Make parameters one: each name on the left becomes the Parameter on the right.

    Whatever is already tied to a name on the left moves with it. Tie before building an optimizer
    and before wrapping the model for several processes; `optimizer.check(model)` reports a tie
    that came later.

    Args:
        model: changed in place.
        pairs: names of parameters, such as `{"decoder.weight": "encoder.weight"}`.

    Raises:
        PlanError: for an unknown name, different shapes, dtypes or devices, views of one memory in
            different layouts, or a circle; nothing was changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tie(model, {"1.weight": "0.weight"})
        >>> model[1].weight is model[0].weight
        True
    """
    _refuse_taken(model, "tie")
    if not isinstance(pairs, Mapping):
        raise PlanError(
            f"tie was given {pairs!r}; expected a dict of names of parameters, such as "
            '{"decoder.weight": "encoder.weight"}.'
        )
    found = by_name(collect(model))
    goes: dict[int, Owned] = {}  # by identity of a Parameter: what it is to become
    for name, to in pairs.items():
        source, target = _find(found, name, model), _find(found, to, model)
        if goes.setdefault(id(source.tensor), target).tensor is not target.tensor:
            raise PlanError(
                f"tie: {' = '.join(source.info.names)} is to become both {to!r} and "
                f"{goes[id(source.tensor)].info.name!r}; tie those two first."
            )
    moves = [(source, _end_of(goes, source)) for source in (found[name] for name in pairs)]
    for source, target in moves:
        _check_alike(source, target)
    for source, target in moves:
        for module, attribute in source.places:
            setattr(module, attribute, target.tensor)


def untie(model: nn.Module, name: str) -> None:
    """Give a name its own Parameter again, a copy with the same values and without gradient.

    The other names of the tie stay tied to each other. Untie before building an optimizer.

    Args:
        model: changed in place.
        name: one name of a tied parameter.

    Raises:
        PlanError: for an unknown name, or one that is not tied; nothing was changed.
    """
    _refuse_taken(model, "untie")
    found = by_name(collect(model))
    owned = _find(found, name, model)
    module, attribute = owned.places[owned.info.names.index(name)]
    if len(owned.info.names) == 1:
        known = [text for item in ties(model) for text in item]
        raise PlanError(
            f"untie: {name!r} is not tied to anything.{did_you_mean(name, known)} "
            f"Tied are: {'; '.join(' = '.join(item) for item in ties(model)) or 'none'}."
        )
    if sum((module, attribute) == place for place in owned.places) > 1:
        raise PlanError(
            f"untie: {' = '.join(owned.info.names)} belong to one module used in several places, "
            "not only to one Parameter. Put copy.deepcopy(module) in one of the places."
        )
    setattr(module, attribute, _own_copy(owned.tensor))


def ties(model: nn.Module) -> tuple[Tie, ...]:
    """Return all ties of a model, each with all its names and its `kind`.

    Two Parameters that share elements in memory are listed too, as `"view"` or `"transposed"`; a
    plan refuses them, because each would be updated.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tie(model, {"1.weight": "0.weight"})
        >>> ties(model)
        (<parameter: 0.weight = 1.weight>,)
    """
    found = collect(model)
    same = [
        Tie(item.info.names, "module" if len(_distinct(item.places)) == 1 else "parameter")
        for item in found
        if len(item.info.names) > 1
    ]
    shared = [
        Tie((one.info.name, other.info.name), _kind(one.tensor, other.tensor))
        for one, other in overlaps(found)
    ]
    return (*same, *shared)


class TieWatch:
    """The ties of a model as an optimizer found them; `warn` logs those that broke since."""

    def __init__(self, model: nn.Module, owned: Iterable[Owned]) -> None:
        self._model = model
        self._ties = [item.info.names for item in owned if len(item.info.names) > 1]

    def warn(self) -> None:
        """Log every tie that broke, with the call that ties it again."""
        live = by_name(collect(self._model)) if self._ties else {}
        for names in self._ties:
            parts = broken(names, live)
            if len(parts) > 1:
                log.warning(
                    "the tie %s is broken: only one of its parts trains. Call %s and build the "
                    "optimizer again.",
                    " = ".join(names),
                    tie_again(parts),
                )


def by_name(found: Iterable[Owned]) -> dict[str, Owned]:
    """Return parameters by each of their names."""
    return {name: item for item in found for name in item.info.names}


def broken(names: Iterable[str], live: Mapping[str, Owned]) -> list[tuple[str, ...]]:
    """Return the names of a tie by what they are now: more than one part if the tie broke.

    A name that is no longer in the model is in no part.
    """
    parts: dict[int, list[str]] = {}
    for name in names:
        if name in live:
            parts.setdefault(id(live[name].tensor), []).append(name)
    return [tuple(part) for part in parts.values()]


def tie_again(parts: Sequence[Sequence[str]]) -> str:
    """Return the call that ties what broke."""
    first, *others = parts
    pairs = {name: first[0] for part in others for name in part}
    return f"lamina.tie(model, {pairs!r})"


def refuse_wrapped(model: nn.Module, action: str) -> None:
    """Raise for a model whose wrapper has taken hold of its parameters."""
    for module in model.modules():
        if type(module).__name__ in _WRAPPED:
            raise PlanError(
                f"{action}: the model is already wrapped in {type(module).__name__}, which took "
                f"hold of its parameters and would not notice. Call lamina.{action} before "
                "wrapping it."
            )


def _refuse_taken(model: nn.Module, action: str) -> None:
    if isinstance(model, nn.Module):
        refuse_wrapped(model, action)
        sharded = [name for name, p in model.named_parameters() if is_dtensor(p)]
        if sharded:
            raise PlanError(
                f"{action}: {sharded[0]!r} is already sharded over processes (DTensor). Call "
                f"lamina.{action} before sharding the model."
            )


def _find(found: Mapping[str, Owned], name: str, model: nn.Module) -> Owned:
    if not isinstance(name, str):
        raise PlanError(f"{name!r} was given for the name of a parameter; expected a text.")
    if name in found:
        return found[name]
    inside = [known for known in found if known.startswith(f"{name}.")]
    if inside:
        raise PlanError(
            f"{name!r} is a module; name its parameters, such as {inside[0]!r} "
            f"(it has {len(inside)})."
        )
    raise PlanError(
        f"there is no parameter {name!r} in the {type(model).__name__}, which has {len(found)}."
        f"{did_you_mean(name, found)}"
    )


def _end_of(goes: Mapping[int, Owned], start: Owned) -> Owned:
    """Follow what a Parameter is to become to its end."""
    seen = [start]
    while (target := goes.get(id(seen[-1].tensor))) and target.tensor is not seen[-1].tensor:
        if any(target.tensor is other.tensor for other in seen):
            circle = " -> ".join(repr(item.info.name) for item in (*seen, target))
            raise PlanError(f"tie: {circle} is a circle; name one parameter that stays.")
        seen.append(target)
    return seen[-1]


def _check_alike(source: Owned, target: Owned) -> None:
    one, other = source.tensor, target.tensor
    if one.ndim > 1 and tuple(reversed(one.shape)) == tuple(other.shape) != tuple(one.shape):
        fix = f"One is the other transposed: keep one, and compute with `{target.info.name}.T`."
    else:
        fix = "Tied parameters are one tensor, so make them alike first."
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine != theirs:
            raise PlanError(
                f"tie: {source.info.name!r} has {what} {_plain(mine)}, but {target.info.name!r} "
                f"has {_plain(theirs)}; nothing was tied. {fix}"
            )
    if one is not other and relation(one, other) not in ("apart", "same"):
        raise PlanError(
            f"tie: {source.info.name!r} and {target.info.name!r} lie over the same memory in "
            "different ways, so that tying them would give one of them other numbers; nothing was "
            f"tied. {overlap_fix(target, source)}"
        )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def _distinct(places: Iterable[Place]) -> set[tuple[int, str]]:
    return {(id(module), attribute) for module, attribute in places}


def _kind(one: torch.Tensor, other: torch.Tensor) -> str:
    return "transposed" if relation(one, other) == "transposed" else "view"


def _own_copy(tensor: nn.Parameter) -> nn.Parameter:
    with torch.no_grad():
        own = copy.deepcopy(tensor)
    own.grad = None
    return own

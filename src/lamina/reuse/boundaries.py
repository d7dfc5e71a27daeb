"""Which calls of a pass can be left out while some parameters are frozen, and what must be kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .lineage import IMPURE, Call, Lineage


@dataclass(frozen=True)
class Stage:
    """What a set of frozen parameters allows.

    `skipped` are the outermost calls that need not run, by key; `needed` are those of them whose
    outputs something reads that does run. `handed_on` are calls that return an input as it is
    (dropout in eval mode), with the place of that input.
    """

    skipped: Mapping[str, Call]
    needed: frozenset[str]
    handed_on: Mapping[str, int]


def stage_of(lineage: Lineage, trained: int, opaque: Iterable[str] = ()) -> Stage:
    """Return what can be left out of a pass.

    Args:
        lineage: what was seen of the pass.
        trained: the bits of parameters that train, and of what else may change.
        opaque: paths of modules that always run.
    """
    excluded = set(opaque)
    skipped: dict[str, Call] = {}
    for call in lineage.calls.values():  # in the order in which they began: outer ones first
        if call.parent is None or (call.parent.within(skipped) is not None):
            continue
        if call.path not in excluded and can_skip(call, trained | lineage.changed):
            skipped[call.key] = call
    needed: set[str] = set()
    for call, producer, storage in lineage.consumed:
        source = producer.within(skipped)
        if source is None:
            continue
        reader = call.within(skipped)
        if reader is source:
            continue
        if storage not in source.outputs:
            # Something inside is read from outside, and is no output: only a real call leaves it.
            source.blocked = "leaves tensors behind that are read elsewhere"
            return stage_of(lineage, trained, excluded)
        if reader is None:
            needed.add(source.key)
    handed_on = {
        call.key: place
        for call in lineage.calls.values()
        if not call.blocked and len(call.alias_of) == 1 and not call.inside
        for place in call.alias_of
        if place is not None
    }
    return Stage(skipped, frozenset(needed), handed_on)


def can_skip(call: Call, trained: int) -> bool:
    """Return whether a call gives the same outputs whenever it gets the same examples."""
    if call.blocked or not call.outputs or 0 in call.outputs:
        return False
    # One that hands an input on has no output of its own to keep; see `Stage.handed_on`.
    if any(place is not None for place in call.alias_of):
        return False
    return not (call.mask | call.inside) & (trained | IMPURE)

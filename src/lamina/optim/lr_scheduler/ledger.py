"""Every learning rate that the schedulers of one optimizer write goes through its ledger.

The ledger remembers for each group what was written last, so that an edit by hand, a restored
state and a group added later are told apart from the schedulers' own writes. It also keeps the
learning rate without the factors that may be zero or rise again (`Multiplier`): such a factor is
replaced, never divided out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

log = logging.getLogger("lamina")

Rate = float | Tensor
Group = dict[str, Any]


def own(lr: Rate) -> Rate:
    """Return a copy of a learning rate that shares no memory with it."""
    return lr.clone() if isinstance(lr, Tensor) else lr


def rounded(lr: Rate, value: float) -> float:
    """Return a value as precisely as a group whose learning rate is `lr` can hold it."""
    return float(torch.tensor(value, dtype=lr.dtype)) if isinstance(lr, Tensor) else value


def put(group: Group, lr: Rate) -> None:
    """Set the learning rate of a group, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].fill_(float(lr))
    else:
        # A NumPy number would make checkpoints unloadable with weights_only=True.
        group["lr"] = float(lr) if isinstance(lr, np.generic) else lr


@dataclass(eq=False)
class Multiplier:
    """A factor of one scheduler on the learning rate of every group.

    `share` of the way from `floor` to the base of the group: with floor 0 it is the factor itself.
    """

    floor: float = 0.0
    share: float = 1.0
    #: the scheduler's own `base_lrs`; another scheduler may have set another `initial_lr` since
    bases: Sequence[Rate] = ()
    #: whether the ledger counts it; a scheduler that is not its turn in a sequence is out
    counts: bool = False
    #: whether its scheduler belongs to the set that steps now; else it may never step again
    current: bool = True
    #: whether its scheduler's next step overwrites an edit by hand, as in torch
    overwrites: bool = True
    #: whether its scheduler was restored, so that restored groups contain the factor
    restored: bool = False

    def base(self, record: Record) -> float:
        """Return the initial learning rate of a group."""
        known = record.index < len(self.bases)
        return float(self.bases[record.index]) if known else record.base

    def factor(self, record: Record) -> float:
        """Return the factor for a group."""
        base = self.base(record) if self.floor else 0.0
        if base == 0:
            return self.share
        return (self.floor + (base - self.floor) * self.share) / base


@dataclass(eq=False)
class Record:
    """What is known of one group."""

    index: int
    group: Group
    #: what the group held after the last write
    written: float
    #: the same without the multipliers
    plain: float
    #: the initial learning rate
    base: float
    #: `plain` before the schedulers that step now were made
    start: float
    #: the learning rate of a restored group, before a scheduler was made for it
    found: float | None = None
    #: for a group added later: its learning rate as a share of that of a group which was there
    scale: float | None = None
    #: whether it was added later with an `initial_lr` of its own
    brought: bool = False
    #: multipliers that an edit by hand has ended for this group
    ended: list[Multiplier] = field(default_factory=list)


@dataclass(eq=False)
class Ledger:
    """What the schedulers of one optimizer have written into its groups."""

    records: list[Record] = field(default_factory=list)
    multipliers: list[Multiplier] = field(default_factory=list)
    #: how many schedulers were made
    schedulers: int = 0
    #: whether one of the schedulers that step now has stepped
    stepped: bool = False

    # --- schedulers that are made --------------------------------------------------------------

    def begin(self, groups: Sequence[Group], *, rebase: bool, beside: bool = False) -> None:
        """Take in a scheduler that is being made.

        Args:
            groups: the groups of the optimizer.
            rebase: make a learning rate that was edited by hand the initial one.
            beside: a scheduler that writes past the ledger was made, and has not stepped yet.
        """
        new = self._take_in(groups)
        for record in new if beside else ():
            record.start = record.base
        if rebase:
            self._rebase()
        self.read(groups)
        self.schedulers += 1
        if self.stepped:  # a second scheduler on the same optimizer, not a part of a chain
            self.stepped = False
            for multiplier in self.multipliers:
                multiplier.current = False
            for record in self.records:
                record.start = record.plain

    def _rebase(self) -> None:
        """Let a group that was edited by hand begin from its new learning rate."""
        for record in filter(self._edited, self.records):
            record.group["initial_lr"] = own(record.group["lr"])
            record.written = record.plain = record.start = float(record.group["lr"])
            record.ended = list(self.multipliers)

    def based(self) -> None:
        """Take over the initial learning rates, which a scheduler that is made may set."""
        for record in self.records:
            key = "initial_lr" if "initial_lr" in record.group else "lr"
            record.base = float(record.group[key])

    def _take_in(self, groups: Sequence[Group]) -> list[Record]:
        """Open records for groups that are there before any scheduler, or were restored."""
        new = []
        first = not self.records
        there = groups if first else groups[: len(self.records)]  # `read` takes in the later ones
        for index, group in enumerate(there):
            if first or self.records[index].group is not group:
                lr = float(group["lr"])
                found = lr if "initial_lr" in group else None
                record = Record(index, group, lr, lr, float(group.get("initial_lr", lr)), lr, found)
                self.records[index : index + 1] = [record]
                new.append(record)
        return new

    # --- what others did to the groups ---------------------------------------------------------

    def read(self, groups: Sequence[Group]) -> None:
        """Take in what happened to the groups since the last write."""
        if not self.records:
            self._take_in(groups)
        if len(groups) > len(self.records):
            self._admit(groups)
        for record, group in zip(self.records, groups, strict=False):
            if record.group is not group:
                self._restored(record, group)
            elif self._edited(record):
                self._accept(record)

    @staticmethod
    def _edited(record: Record) -> bool:
        return float(record.group["lr"]) != record.written

    def _accept(self, record: Record) -> None:
        """Take over an edit by hand, unless a scheduler will overwrite it."""
        record.written = float(record.group["lr"])
        if any(m.counts and m.current and m.overwrites for m in self.multipliers):
            return
        record.plain = record.written
        record.ended = list(self.multipliers)

    def _restored(self, record: Record, group: Group) -> None:
        """Go on with a group that came from a saved state of the optimizer."""
        record.group, record.written = group, float(group["lr"])
        record.base = float(group.get("initial_lr", record.base))
        if all(each.restored for each in self.multipliers if each.counts):
            self._explain(record)

    def _explain(self, record: Record) -> None:
        """Find the learning rate without multipliers that gives what was written."""
        factor = self._factor(record)
        if factor == 0:
            return  # what a factor of 0 hides is in the state of its scheduler
        whole = rounded(record.group["lr"], record.base * factor) == record.written
        record.plain = record.base if whole else record.written / factor

    def _admit(self, groups: Sequence[Group]) -> None:
        """Take in groups added later: their learning rate is their value now.

        Unless a group brings an `initial_lr`: then it is where the curve has it.
        """
        like = next((r for r in self.records if r.written > 0 and r.base > 0), None)
        for group in groups[len(self.records) :]:
            lr = float(group["lr"])
            record = Record(len(self.records), group, lr, lr, lr, lr)
            if "initial_lr" in group:
                record.base = float(group["initial_lr"])
                record.brought = True
                record.scale = record.base / like.base if like else None
                record.plain = record.base * (like.plain / like.base if like else 1.0)
            else:
                record.scale = lr / like.written if like else None
                record.base = lr if like is None else like.base * lr / like.written
                group["initial_lr"] = as_held(group["lr"], record.base)
                factor = self._factor(record)
                record.plain = lr / factor if factor else lr
            self.records.append(record)

    # --- multipliers ---------------------------------------------------------------------------

    def _factor(self, record: Record) -> float:
        counting = (m for m in self.multipliers if m.counts and m not in record.ended)
        return math.prod(multiplier.factor(record) for multiplier in counting)

    def multiply(self, multiplier: Multiplier, share: float, bases: Sequence[Rate]) -> None:
        """Set the share of a multiplier, which counts from now on.

        Args:
            multiplier: the one.
            share: its new share.
            bases: the initial learning rates that its scheduler knows.
        """
        self.join(multiplier)
        multiplier.share, multiplier.bases = share, list(bases)
        multiplier.counts = multiplier.current = True
        for record in self.records:
            record.ended = [each for each in record.ended if each is not multiplier]

    def join(self, multiplier: Multiplier) -> None:
        """Know a multiplier, also one of a scheduler that was given another optimizer."""
        if multiplier not in self.multipliers:
            self.multipliers.append(multiplier)

    def begin_again(self, own_part: Multiplier, *, within: bool) -> None:
        """Begin again from the initial learning rates, for a scheduler with a multiplier.

        Args:
            own_part: the multiplier of that scheduler.
            within: keep what schedulers that are made together with it did so far.
        """
        for multiplier in self.multipliers:
            multiplier.counts = multiplier.counts and multiplier.current
        for record in self.records:
            kept = record.plain / record.start if within and record.start else 1.0
            record.plain = own_part.base(record) * kept

    def leave(self, multiplier: Multiplier) -> None:
        """Let a multiplier count no longer; the learning rates stay as they are."""
        if multiplier.counts:
            for record in self.records:
                if multiplier not in record.ended:
                    record.plain *= multiplier.factor(record)
            multiplier.counts = False

    def overwrite(self) -> None:
        """Prepare for a scheduler that is made and does not go on from what was there before."""
        self.settle()
        for record in self.records:
            record.start = record.base

    def settle(self) -> None:
        """Let the multipliers of schedulers that were there before be part of what is there."""
        for multiplier in self.multipliers:
            if not multiplier.current:
                self.leave(multiplier)

    # --- writing -------------------------------------------------------------------------------

    def without_multipliers(self, act: Callable[[], Any]) -> Any:
        """Call what reads or writes the groups while they hold no multiplier's factor."""
        if not any(multiplier.counts for multiplier in self.multipliers):
            return act()
        before = [float(record.group["lr"]) for record in self.records]
        for record in self.records:
            put(record.group, record.plain)
        try:
            return act()
        finally:
            for record, lr in zip(self.records, before, strict=True):
                put(record.group, lr)

    def write(self, scheduler: Any, values: Sequence[Rate], *, made: bool = False) -> None:
        """Write the learning rates of all groups, given without multipliers.

        Args:
            scheduler: the one that writes; it is given its `_last_lr`.
            values: one for each group.
            made: the scheduler is being made, so this is no step.
        """
        for record, value in zip(self.records, values, strict=True):
            record.plain = float(value)
            factor = self._factor(record)
            put(record.group, value if factor == 1.0 else record.plain * factor)
            self._note(scheduler, record)
        if not made:
            self._went_on()
        scheduler._last_lr = [own(record.group["lr"]) for record in self.records]

    def rescale(self, scheduler: Any, values: Sequence[Rate]) -> None:
        """Write the learning rates of all groups, given with the multipliers."""
        for record, value in zip(self.records, values, strict=True):
            if record.written != 0 and float(value) != record.written:
                record.plain *= float(value) / record.written
            put(record.group, value)
            self._note(scheduler, record)
        self._went_on()
        scheduler._last_lr = [own(record.group["lr"]) for record in self.records]

    def resume(self, scheduler: Any, saved: Sequence[Rate]) -> None:
        """Give the groups their learning rates at the moment a scheduler was saved.

        A group that holds a restored or edited learning rate keeps it; one that was overwritten
        when the scheduler was made gets it back.
        """
        groups = scheduler.optimizer.param_groups
        for record, group, lr in zip(self.records, groups, saved, strict=False):
            if group is record.group and not self._edited(record):
                put(group, lr if record.found is None else record.found)
                self._note(scheduler, record)
                self._explain(record)

    def _note(self, scheduler: Any, record: Record) -> None:
        before, record.written = record.written, float(record.group["lr"])
        if getattr(scheduler, "_verbose", False) and before != record.written:
            report(scheduler, record.index, record.group)

    def _went_on(self) -> None:
        self.stepped = True
        for record in self.records:
            record.found = None
        for multiplier in self.multipliers:
            multiplier.restored = False


#: the ledger of each optimizer that has a scheduler of lamina
_LEDGERS: WeakKeyDictionary[Optimizer, Ledger] = WeakKeyDictionary()


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside of wrappers such as Accelerate's, which share its groups."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer) and inner is not optimizer:
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer


def ledger_of(optimizer: Optimizer, copied: Ledger | None = None) -> Ledger:
    """Return the ledger of an optimizer.

    Args:
        optimizer: any optimizer.
        copied: the ledger that a copied or unpickled scheduler brings along.
    """
    inner = innermost(optimizer)
    ledger = _LEDGERS.get(inner)
    if ledger is None:
        # A scheduler that was given another optimizer still has the ledger of the first one.
        taken = copied is None or any(copied is each for each in _LEDGERS.values())
        ledger = _LEDGERS[inner] = Ledger() if copied is None or taken else copied
    return ledger


def report(scheduler: Any, index: int, group: Group) -> None:
    """Log one line for a changed learning rate."""
    log.info(
        "%s: group %d (%s): lr %.6g",
        type(scheduler).__name__,
        index,
        group.get("name", "unnamed"),
        float(group["lr"]),
    )


def as_held(lr: Rate, value: float) -> Rate:
    """Return a value as a tensor if `lr` is one."""
    return torch.full_like(lr, value) if isinstance(lr, Tensor) else value

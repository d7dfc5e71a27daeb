"""What is seen of one optimizer, step by step."""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Iterator

import torch

from .._util.tensors import is_dtensor
from ..optimizer.optimizer import Optimizer as PlanOptimizer
from ..record import Record
from .counts import GroupSeen, ParamSeen
from .layers import Layers
from .measure import Entry, Measured, StepMeasure, is_zero
from .names import Models

#: measurements that are read together
_BATCH = 8
#: group names of a record are those of an optimizer with at most so many groups at every step
_FEW_GROUPS = 16
_HALF = (torch.bfloat16, torch.float16)
_KEPT_RATIOS = 1000
#: how many gradients are watched for being zeroed
_SENTINELS = 4
#: how parts of an optimizer's state are called that hold what 16-bit weights lose
_COMPENSATION = ("kahan", "compens", "master", "shift", "residual", "error")


def is_sampled(step: int) -> bool:
    """Return whether a step is looked at closely: all at first, then ever fewer."""
    if step < 20:
        return True
    if step < 1000:
        return step % 10 == 0
    return step % 50 == 0


class StepWatch:
    """Follows an optimizer.

    Args:
        optimizer: the optimizer; it is not kept alive.
        label: its name in messages.
        prefix: what its groups' names begin with in the record.
        models: the names of parameters.
        record: what the values go into.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        label: str,
        prefix: str,
        models: Models,
        record: Record,
    ) -> None:
        self.ref = weakref.ref(optimizer, lambda _: self._release())
        self.label, self.prefix = label, prefix
        self.kind = type(optimizer).__name__
        self.is_plan = isinstance(optimizer, PlanOptimizer)
        self.has_memory = _remembers(optimizer)
        self.first_param = _weak_first(optimizer)
        #: steps taken, and those that a GradScaler skipped
        self.steps = self.skipped = 0
        self.groups: list[GroupSeen] = []
        self.params: dict[str, ParamSeen] = {}
        #: whether models are looked at before its steps
        self.looks = True
        self.no_closure = False
        #: how often in a row it was built anew after a few steps
        self.rebuilds = 0
        #: steps that found no gradients, since these were zeroed after backward
        self.zeroed_first = 0
        #: steps whose gradients were added to the next ones, of those that could tell
        self.accumulated = self.could_accumulate = 0
        #: parameters that another optimizer had just updated by the same gradients
        self.doubled: dict[str, int] = {}
        #: whether a schedule rises by design, as a warmup or a restart does
        self.may_rise = False
        #: the factor of the last clipping before a step, and the ids of what was clipped
        self.clip: tuple[torch.Tensor, set[int]] | None = None
        #: the numbers of its last events, counted over all events of the run
        self.stepped_at = self.zeroed_at = 0
        self.nonfinite: dict[str, tuple[int, list[str]]] = {}
        self.half: list[float] = []
        self.half_names: dict[str, float] = {}
        self._models, self._record, self._layers = models, record, Layers()
        self._rows: list[Entry] = []
        self._by_name: dict[str, Entry] = {}
        self._sentinels: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._shape: tuple[int, ...] = ()
        self._waiting: dict[str, torch.Tensor] = {}
        self._measure: StepMeasure | None = None
        self._frozen: list[tuple[ParamSeen, torch.Tensor, torch.Tensor]] = []
        self._pending: list[tuple[int, StepMeasure, list[float]]] = []

    # --- before and after a step ---------------------------------------------------------------

    @property
    def is_sampled(self) -> bool:
        """Return whether the step that comes, or is being taken, is looked at closely."""
        return is_sampled(self.steps)

    def before(self, optimizer: torch.optim.Optimizer) -> None:
        """See the gradients and values of a step that is about to be taken."""
        self._follow_groups(optimizer)
        self._note_lr(optimizer)
        self._note_receipts(counts=True)
        self._measure, self._frozen = None, []
        if not self.is_sampled or _is_capturing():
            return
        for row in self._rows:
            self.params[row.name].trains = row.param.requires_grad
        if not self.is_plan:
            self._note_frozen()
        if getattr(optimizer, "grad_scale", None) is None:  # a fused one gets scaled gradients
            self._measure = StepMeasure([row for row in self._rows if row.param.requires_grad])

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """See what the step did."""
        self._note_receipts(counts=False)  # LBFGS and others compute gradients in the step
        lrs = [group.lr if group.lr is not None else math.nan for group in self.groups]
        if self._measure is not None:
            self._measure.complete()
            self._pending.append((self.steps, self._measure, lrs))
            self._record_settings(optimizer)
        elif len(lrs) <= _FEW_GROUPS or self.is_sampled:
            for group, lr in zip(self.groups, lrs, strict=True):
                self._record.add(self.steps, self.prefix + group.label, lr=lr)
        for seen, param, before in self._frozen:
            seen.frozen_moved |= not torch.equal(param.detach(), before)
        self._measure, self._frozen = None, []
        self.steps += 1
        if len(self._pending) >= _BATCH:
            self.flush()

    def has_gradients(self) -> bool:
        """Return whether any of its parameters has a gradient other than 0."""
        grads = [row.param.grad for row in self._rows if row.param.grad is not None]
        return not all(is_zero(grad) for grad in grads)

    def shared_with(self, other: StepWatch) -> list[str]:
        """Return the parameters with a gradient that another optimizer holds too."""
        theirs = {id(row.param) for row in other._rows}
        return [r.name for r in self._rows if id(r.param) in theirs and r.param.grad is not None]

    # --- gradients that nobody zeroes ----------------------------------------------------------

    def await_zero(self) -> None:
        """Remember some gradients of the step just taken, to see whether they are zeroed."""
        self._sentinels = []
        if not self.is_sampled:
            return
        small = sorted(self._rows, key=lambda row: row.param.numel())
        for row in small:
            grad = row.param.grad
            if grad is not None and not is_zero(grad):
                self._sentinels.append((row.param, grad))
            if len(self._sentinels) >= _SENTINELS:
                return

    def look_for_zero(self, values: bool = True) -> None:
        """Forget the gradients that are waited for if one of them was replaced or is 0."""
        for param, grad in self._sentinels:
            if param.grad is not grad or (values and is_zero(grad)):
                self._sentinels = []
                return

    def count_accumulated(self) -> None:
        """Count whether the gradients of the last step are still there, with others added."""
        self.look_for_zero(values=False)
        self.could_accumulate += 1
        self.accumulated += bool(self._sentinels)
        self._sentinels = []

    def _record_settings(self, optimizer: torch.optim.Optimizer) -> None:
        """Record weight decay and the factor of clipping, which are settled when a step is over."""
        factor, clipped = self.clip if self.clip is not None else (None, set[int]())
        self.clip = None
        for group, settings in zip(self.groups, optimizer.param_groups, strict=True):
            decay = settings.get("weight_decay")
            was_clipped = any(id(param) in clipped for param in settings["params"][:1])
            self._record.add(
                self.steps,
                self.prefix + group.label,
                weight_decay=float(decay) if isinstance(decay, (int, float)) else None,
                clip_factor=factor if was_clipped else None,
            )

    def flush(self) -> None:
        """Read the measurements that wait."""
        pending, self._pending = self._pending, []
        for step, measure, lrs in pending:
            self._digest(step, measure.read(), lrs)

    # --- details -------------------------------------------------------------------------------

    def _follow_groups(self, optimizer: torch.optim.Optimizer) -> None:
        groups = optimizer.param_groups
        shape = tuple(len(group["params"]) for group in groups)
        # Parameters may be exchanged within a group; a close look notices.
        if shape == self._shape and not self.is_sampled:
            return
        rows = []
        for number, group in enumerate(groups):
            for place, param in enumerate(group["params"]):
                rows.append((number, place, param))
        if [id(param) for _, _, param in rows] == [id(row.param) for row in self._rows]:
            return
        self._models.learn([param for _, _, param in rows])
        self._shape = shape
        self._rows = [
            Entry(self._name_of(param, number, place), number, param)
            for number, place, param in rows
        ]
        self._by_name = {row.name: row for row in self._rows}
        labels = [str(group.get("name", f"group {i}")) for i, group in enumerate(groups)]
        self.groups += [GroupSeen(label) for label in labels[len(self.groups) :]]
        del self.groups[len(labels) :]
        for row in self._rows:
            label = self.prefix + self.groups[row.group].label
            first = ParamSeen(tuple(row.param.shape), label)
            seen = self.params.setdefault(row.name, first)
            if not seen.received:
                self._waiting[row.name] = row.param

    def _name_of(self, param: torch.Tensor, group: int, place: int) -> str:
        return self._models.name(param) or f"{self.label} group {group} parameter {place}"

    def _note_lr(self, optimizer: torch.optim.Optimizer) -> None:
        for seen, group in zip(self.groups, optimizer.param_groups, strict=True):
            lr = group.get("lr")
            if isinstance(lr, torch.Tensor) and (lr.is_cpu or self.is_sampled):
                lr = float(lr)
            if isinstance(lr, (int, float)):
                seen.note(self.steps, float(lr))

    def _note_receipts(self, counts: bool) -> None:
        for name in list(self._waiting):
            param = self._waiting[name]
            if param.grad is not None:
                self.params[name].received = True
                del self._waiting[name]
            elif param.requires_grad and counts:
                self.params[name].waited += 1

    def _note_frozen(self) -> None:
        for row in self._rows:
            param = row.param
            if param.requires_grad or param.grad is None or is_dtensor(param):
                continue
            seen = self.params[row.name]
            seen.stale += not is_zero(param.grad)
            self._frozen.append((seen, param, param.detach().clone()))

    def _digest(self, step: int, rows: list[Measured], lrs: list[float]) -> None:
        for row in rows:
            seen = self.params[row.name]
            seen.measured += 1
            seen.largest_grad = max(seen.largest_grad, row.grad)  # NaN is counted below
            if 0 <= row.group < len(lrs) and lrs[row.group] != 0:
                seen.asked += row.asked
                seen.moved |= row.still < row.asked
        self._note_nonfinite(step, rows)
        self._note_half(rows, lrs)
        self._record.metrics(step, **self._layers.ratios(rows, self.params))
        by_group = dict(_by_group(rows))
        for number, (group, lr) in enumerate(zip(self.groups, lrs, strict=False)):
            own = by_group.get(number, [])  # none where no gradient came
            numbers = _norms(own) if own else {}
            self._record.add(step, self.prefix + group.label, lr=lr, **numbers)
            wide = _norms([row for row in own if self.params[row.name].is_matrix])
            if wide["weight_norm"] > 0 and lr > 0 and len(group.ratios) < _KEPT_RATIOS:
                group.ratios.append(wide["update_norm"] / wide["weight_norm"])

    def _release(self) -> None:
        """Read what waits and let go of all tensors: the optimizer is gone."""
        with contextlib.suppress(Exception):  # the script may be ending
            self.flush()
        self._rows, self._by_name, self._waiting, self._sentinels = [], {}, {}, []
        self._measure, self._frozen = None, []

    def _note_nonfinite(self, step: int, rows: list[Measured]) -> None:
        grads = [row.name for row in rows if not math.isfinite(row.grad)]
        weights = [row.name for row in rows if not math.isfinite(row.weight)]
        # One leads to the other: what came first is told, of one step the weights.
        if weights and not self.nonfinite:
            self.nonfinite["weight"] = (step, weights)
        if grads and not self.nonfinite:
            self.nonfinite["gradient"] = (step, grads)

    def _note_half(self, rows: list[Measured], lrs: list[float]) -> None:
        asked = still = 0
        optimizer = self.ref()
        for row in rows:
            entry = self._by_name.get(row.name)
            if entry is None or entry.param.dtype not in _HALF or not lrs[row.group] > 0:
                continue
            if optimizer is None or _is_compensated(optimizer, entry.param):
                continue
            asked += row.asked
            still += row.still
            if row.asked:
                self.half_names[row.name] = row.still / row.asked
        if asked:
            self.half.append(still / asked)


def _by_group(rows: list[Measured]) -> Iterator[tuple[int, list[Measured]]]:
    for number, own in itertools.groupby(rows, key=lambda row: row.group):
        yield number, list(own)


def _norms(rows: list[Measured]) -> dict[str, float]:
    """Return the norms over some parameters together, and the ratio of update to weight."""
    norms = {
        "grad_norm": math.hypot(*(row.grad for row in rows)),
        "weight_norm": math.hypot(*(row.weight for row in rows)),
        "update_norm": math.hypot(*(row.update for row in rows)),
    }
    if norms["weight_norm"]:
        norms["ratio"] = norms["update_norm"] / norms["weight_norm"]
    return norms


def _weak_first(optimizer: torch.optim.Optimizer) -> weakref.ref[torch.Tensor] | None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            return weakref.ref(param)
    return None


def _remembers(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer loses something when it is made anew: plain SGD does not."""
    if type(optimizer).__name__ == "SGD":
        return any(group.get("momentum", 0) for group in optimizer.param_groups)
    return True


def _is_compensated(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> bool:
    """Return whether its 16-bit weights lose nothing: the state holds it, or chance decides.

    Under lamina's stochastic rounding most weights rest in a step, and the average moves.
    """
    groups = [group for group in optimizer.param_groups if group.get("rounding") == "stochastic"]
    if any(param is each for group in groups for each in group["params"]):
        return True
    state = optimizer.state.get(param, {})
    return any(word in str(key).lower() for key in state for word in _COMPENSATION)


def _is_capturing() -> bool:
    """Return whether a CUDA graph is being recorded, in which nothing may be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()

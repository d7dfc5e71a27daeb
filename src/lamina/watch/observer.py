"""Take in what the taps tell, and keep what findings need of it."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .._util.tensors import is_dtensor
from ..model.finding import Finding
from ..record import Record
from .conclude import conclude
from .gradients import ClipWatch, Scalers, ScalerWatch
from .lengths import all_of
from .looks import ModelLooks, is_look
from .measure import is_zero
from .names import Models
from .schedules import ScheduleWatch, watch_scheduler
from .sightings import Sightings
from .static import listed_twice, scheduler_findings
from .steps import StepWatch

#: optimizers that are followed; of a script that makes thousands, the first
_MOST_OPTIMIZERS = 200
#: optimizers at a time before whose steps models are looked at, which takes milliseconds
_LOOKING = 8
#: schedules that rise by design, of torch and lamina
_RISING = {
    *("OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "ConstantLR", "LinearLR"),
    *("WarmupLR", "LinearWarmupLR"),
}
_LOSSES = 32
#: findings of one code that are told: a script may have hundreds of optimizers, all used alike
_MOST_OF_A_CODE = 5


class Observer:
    """Everything that was seen of a script.

    Args:
        models: models that are known; others are found by their parameters.
        optimizers: if there are any, all others are left alone.
        record: what values go into.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        record: Record,
    ) -> None:
        self.seen = Sightings(Models(models), record)
        self._looks = ModelLooks(self.seen)
        self._only = weakref.WeakSet(optimizers) if optimizers else None
        self._known: weakref.WeakKeyDictionary[Any, StepWatch] = weakref.WeakKeyDictionary()
        #: optimizers that are not followed; what they hold is not left out
        self._others: weakref.WeakSet[Any] = weakref.WeakSet()
        self._schedule_of: weakref.WeakKeyDictionary[Any, ScheduleWatch] = (
            weakref.WeakKeyDictionary()
        )
        self._scaler_state = Scalers()
        self._passes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._counts: list[list[int]] = []
        self._stepping: StepWatch | None = None
        self._serial = self._backward_at = 0
        #: called after every step, such as to save what was seen so far
        self.after_step: Callable[[], None] | None = None
        self._attempt: tuple[StepWatch, int] | None = None
        self._losses: list[tuple[int, torch.Tensor]] = []

    # --- what is built -------------------------------------------------------------------------

    def built(self, optimizer: torch.optim.Optimizer) -> StepWatch | None:
        """Meet an optimizer."""
        if optimizer in self._known:
            return self._known[optimizer]
        is_meant = self._only is None or optimizer in self._only
        if not is_meant or len(self.seen.watches) >= _MOST_OPTIMIZERS:
            self._others.add(optimizer)
            return None
        kind = type(optimizer).__name__
        number = len(self.seen.watches) + 1
        several = number > 1
        label = f"{kind} {number}" if several else kind
        watch = StepWatch(
            optimizer, label, f"{label}/" if several else "", self.seen.models, self.seen.record
        )
        alive = sum(each.ref() is not None for each in self.seen.watches)
        watch.looks = alive < _LOOKING
        self._count_rebuilds(watch, optimizer)
        self.seen.watches.append(watch)
        self._known[optimizer] = watch
        self.seen.models.learn(
            [param for group in optimizer.param_groups for param in group["params"]]
        )
        return watch

    def _count_rebuilds(self, watch: StepWatch, optimizer: torch.optim.Optimizer) -> None:
        first = watch.first_param() if watch.first_param is not None else None
        for earlier in reversed(self.seen.watches):
            same = earlier.first_param is not None and earlier.first_param() is first
            if first is not None and same and earlier.kind == watch.kind and earlier.has_memory:
                if 1 <= earlier.steps <= 10:
                    watch.rebuilds = earlier.rebuilds + 1
                return

    def group_refused(self, args: Any, kwargs: Any, error: Exception) -> None:
        """See a group that torch refused since its parameters are in another one."""
        if "more than one parameter group" not in str(error):
            return
        optimizer, group = args[0], args[1] if len(args) > 1 else kwargs["param_group"]
        held = {id(param) for each in optimizer.param_groups for param in each["params"]}
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        params = [each[1] if isinstance(each, tuple) else each for each in params]
        twice = [param for param in params if id(param) in held]
        self.seen.models.learn(twice)
        names = [self.seen.models.name(param) or "a parameter" for param in twice]
        self.seen.find(listed_twice(names, "is listed in two groups of the optimizer"))

    def scheduler_built(self, scheduler: Any, lr_before: Sequence[Any] = ()) -> None:
        """Meet a scheduler."""
        watch = self._watch_of(getattr(scheduler, "optimizer", None))
        if watch is None or scheduler in self._schedule_of:
            return
        parts = all_of(scheduler)
        for part in parts[1:]:  # what it is composed of is stepped by it
            if part in self._schedule_of:
                self.seen.schedules.remove(self._schedule_of.pop(part))
        self._schedule_of[scheduler] = watch_scheduler(scheduler, watch)
        self.seen.schedules.append(self._schedule_of[scheduler])
        watch.may_rise |= any(type(part).__name__ in _RISING for part in parts)
        for finding in scheduler_findings(scheduler, lr_before):
            self.seen.find(finding)

    def _watch_of(self, optimizer: Any) -> StepWatch | None:
        """Return what follows an optimizer, or the one inside a trainer's wrapper of it."""
        for _ in range(5):
            if not isinstance(optimizer, torch.optim.Optimizer):
                return None
            if optimizer in self._known:
                return self._known[optimizer]
            inner = vars(optimizer).get("optimizer") or vars(optimizer).get("_optimizer")
            if inner is None:
                return self.built(optimizer)
            optimizer = inner
        return None

    # --- what a step consists of ---------------------------------------------------------------

    def step_began(self, optimizer: torch.optim.Optimizer, closure: Any) -> None:
        """See `optimizer.step` being called; its closure, if it has one, comes next."""
        if self._is_nested():
            return
        watch = self.built(optimizer)
        self._stepping = watch
        if watch is not None:
            lbfgs = isinstance(optimizer, torch.optim.LBFGS)
            watch.no_closure |= lbfgs and not callable(closure)

    def gradients_ready(self, optimizer: torch.optim.Optimizer) -> None:
        """See the gradients of a step, before the weights change."""
        watch = self._stepping
        if watch is None or watch.ref() is not optimizer or watch.no_closure:
            return
        self._serial += 1
        watch.before(optimizer)
        if watch.is_sampled:
            self._compare_events(watch)
            self._looks.look_at_statistics()
        if watch.looks and is_look(watch.steps):
            self._looks.look(watch, optimizer, [*self._known, *self._others])

    def step_ended(self, optimizer: torch.optim.Optimizer) -> None:
        """See what a step did."""
        watch = self._stepping
        if watch is None or watch.ref() is not optimizer:
            return
        self._stepping = None
        watch.after(optimizer)
        self._serial += 1
        watch.stepped_at = self._serial
        watch.await_zero()
        if self.after_step is not None:
            self.after_step()

    def _is_nested(self) -> bool:
        """Return whether an optimizer steps inside the step of another, as those in wrappers do."""
        outer = None if self._stepping is None else self._stepping.ref()
        if outer is None:
            return False
        # The outer step may also have failed, and its end was not told.
        frame = sys._getframe(1)
        depth = 0
        while frame is not None:
            if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is outer:
                depth += 1
            frame = frame.f_back  # type: ignore[assignment]
        return depth > 0

    def _compare_events(self, watch: StepWatch) -> None:
        """Compare the order of backward, zeroing and steps with what it should be."""
        backward_since = self._backward_at > watch.stepped_at
        if watch.zeroed_at > self._backward_at > watch.stepped_at and not watch.has_gradients():
            watch.zeroed_first += 1
        if watch.steps and backward_since:
            watch.count_accumulated()
        for other in self.seen.watches:
            if other is watch or other.ref() is None or not other.steps:
                continue
            # It stepped by the gradients that are about to be used again.
            if other.stepped_at > self._backward_at > watch.stepped_at:
                for name in watch.shared_with(other):
                    watch.doubled[name] = watch.doubled.get(name, 0) + 1

    def backward(self, root: Any) -> None:
        """See that gradients are about to be computed."""
        for watch in self.seen.watches:
            watch.look_for_zero()
        self._serial += 1
        self._backward_at = self._serial
        one = isinstance(root, torch.Tensor) and root.numel() == 1 and root.is_floating_point()
        if one and self.seen.watches and not self._scaler_state.is_scaling and not is_dtensor(root):
            step = max(watch.steps for watch in self.seen.watches)
            self._losses.append((step, root.detach().reshape(())))
            if len(self._losses) >= _LOSSES:
                self._read_losses()

    def _read_losses(self) -> None:
        losses, self._losses = self._losses, []
        steps: dict[int, float] = {}
        for step, loss in losses:
            value = float(loss)
            steps[step] = value
            if value != value and self.seen.loss_nonfinite is None:
                self.seen.loss_nonfinite = step
        for step, value in steps.items():
            self.seen.record.metrics(step, loss=value)

    def optimizer_zeroed(self, optimizer: torch.optim.Optimizer) -> None:
        """See gradients being zeroed through an optimizer."""
        self._serial += 1
        watch = self._watch_of(optimizer)
        if watch is not None:
            watch.zeroed_at = self._serial
        for each in self.seen.watches:
            each.look_for_zero()

    def module_zeroed(self, module: nn.Module) -> None:
        """See gradients being zeroed through a model."""
        self._serial += 1
        for each in self.seen.watches:
            first = each.first_param() if each.first_param is not None else None
            if first is not None and first.grad is None:
                each.zeroed_at = self._serial
            each.look_for_zero()

    def scheduler_stepped(self, scheduler: Any) -> None:
        """Count a call of a scheduler's `step`."""
        if scheduler not in self._schedule_of:
            self.scheduler_built(scheduler)
        if scheduler in self._schedule_of:
            self._schedule_of[scheduler].stepped(scheduler)

    def clipped(self, args: Any, kwargs: Any) -> None:
        """See a call of torch's clipping by norm."""
        given = dict(zip(("parameters", "max_norm", "total_norm"), args, strict=False)) | kwargs
        params, limit = given["parameters"], float(given["max_norm"])
        if isinstance(params, torch.Tensor):
            params = [params]
        if not isinstance(params, (list, tuple)) or not params or limit == float("inf"):
            return
        self.seen.models.learn(params[:1])
        first = self.seen.models.name(params[0]) or "the parameters"
        key = f"{first} and {len(params) - 1} more" if len(params) > 1 else first
        watch = self.seen.clips.setdefault(key, ClipWatch(key))
        watch.note(given["total_norm"], limit)
        for param in params:
            if not param.requires_grad and param.grad is not None and not is_zero(param.grad):
                name = self.seen.models.name(param) or "a parameter"
                watch.frozen[name] = watch.frozen.get(name, 0) + 1
        owner = self._holder_of(params[0])
        if owner is None:
            return
        watch.scaled += self._scaler_state.has_scaled(owner)
        steps, norm = self._known[owner], given["total_norm"]
        if steps.is_sampled and isinstance(norm, torch.Tensor) and not is_dtensor(norm):
            factor = (limit / (norm.detach() + 1e-6)).clamp(max=1.0)  # as torch computes it
            steps.clip = factor, {id(param) for param in params}

    def _holder_of(self, param: torch.Tensor) -> torch.optim.Optimizer | None:
        optimizers: list[torch.optim.Optimizer] = list(self._known)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                if any(each is param for each in group["params"]):
                    return optimizer
        return None

    def epoch_began(self, loader: Any) -> None:
        """Count a pass over a DataLoader."""
        if loader not in self._passes:
            self._counts.append([0])
            self._passes[loader] = len(self._counts) - 1
        self._counts[self._passes[loader]][0] += 1

    def loss_scaled(self, scaler: Any) -> None:
        """See a loss being scaled by a GradScaler."""
        self._scaler_state.scaled(scaler)

    def scaler_steps(self, optimizer: Any) -> None:
        """See a GradScaler about to step, or to skip."""
        watch = self._watch_of(optimizer)
        self._attempt = None if watch is None else (watch, watch.steps)

    def scaler_stepped(self, optimizer: Any) -> None:
        """See whether it skipped."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        watch, before = attempt
        skipped = watch.steps == before
        watch.skipped += skipped
        self.seen.scalers.setdefault(watch.label, ScalerWatch(watch.label)).note(skipped)

    def scaler_updated(self, scaler: Any) -> None:
        """See the end of a step with a GradScaler."""
        self._scaler_state.updated(scaler)

    # --- the end -------------------------------------------------------------------------------

    def findings(self) -> tuple[Finding, ...]:
        """Return all findings so far; problems before advice."""
        for watch in self.seen.watches:
            watch.flush()
        self._read_losses()
        passes = [count[0] for count in self._counts]
        concluded = conclude(self.seen, passes)
        found: dict[Finding, None] = {}
        count: dict[str, int] = {}
        for finding in (*self.seen.found, *concluded):
            count[finding.code] = count.get(finding.code, 0) + (finding not in found)
            if count[finding.code] <= _MOST_OF_A_CODE:
                found[finding] = None
        return tuple(sorted(found, key=lambda finding: finding.severity == "advice"))

"""The step of a plan: which groups train, what their gradients go through, and what comes next."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, itemgetter
from typing import Any

import torch

from .. import kernels
from .._util.sharding import is_distributed, is_sharded
from ..algorithms.base import Batch
from ..algorithms.lbfgs import WHOLE_VECTOR, lbfgs_step
from ..algorithms.rounding import tell_followed
from ..errors import NonFiniteError, OwnershipError
from ..gradients.nonfinite import DeferredChecks, check_finite
from ..gradients.operations import first_norms, operate
from ..guests.guests import Guests
from ..kernels.capture import refuse_captured_plan
from ..model.parameters import ParamInfo
from ..model.ties import TieWatch
from ..optim.engine import Closure, Engine
from ..optim.updates import Group, KernelUpdates, Updates
from ..record.recorder import Recorders
from ..resolve.resolved import Resolved
from ..resolve.timeline import NO_FEEDBACK, Feedback, FixedStep, Values, values_at
from ..runtime.agreement import Agreement
from ..runtime.audit import Audit
from ..runtime.claims import Claim
from ..runtime.exchange import Exchange
from ..runtime.freezing import Freezer
from ..runtime.gradient_tracker import GradientTracker
from ..runtime.monitor import Monitor, Sample
from ..runtime.ownership import refuse_foreign_writes
from .contradictions import Contradictions
from .pending_step import PendingStep, may_stay_on_device
from .run_state import RunState

log = logging.getLogger("lamina")


class PlanSteps(Engine):
    """An `Engine` that takes the steps of a resolved plan.

    A step collects the groups that train, runs the gradient operations, updates, and publishes the
    values of the next step. `Optimizer` makes the parts and adds what a user calls.
    """

    # The parts of the optimizer. Each owns its data and changes it in place: wrappers of trainers
    # share these objects, and would keep what a method assigned to the optimizer for themselves.
    _kernel_updates: KernelUpdates
    _resolved: Resolved
    _searches_whole_vector: bool
    _infos: dict[str, ParamInfo]
    _run_state: RunState
    _claim: Claim
    _freezer: Freezer
    _exchange: Exchange
    _guests: Guests
    _audit: Audit
    _ties: TieWatch
    _gradient_tracker: GradientTracker
    _monitor: Monitor
    _agreement: Agreement
    _contradictions: Contradictions
    _recorders: Recorders

    @property
    def clock(self) -> int:
        """How many steps were taken; the step that comes next, counted from 0."""
        if self._run_state.pending is not None:
            self.synchronize()
        return int(self.param_groups[0]["clock"])

    # --- the step ------------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Wait until it is known whether the last step was taken.

        On an accelerator a step decides about NaN and infinite gradients on the device. The host
        learns of it at the begin of the next step, or when something asks for it: `clock`,
        `skipped`, `applied`, `state_dict()` and whatever else depends on it call this. After a loop
        that reads none of them, call it by hand. On the CPU there is nothing to wait for.

        Raises:
            NonFiniteError: under `nonfinite="raise"`, if a gradient was not finite. Weights, state
                and clock are those before that step.

        Example:
            >>> import torch, lamina as lm
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = lm.Plan(lm.SGD, lr=0.1).build(model)
            >>> model(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> optimizer.synchronize()
        """
        pending = self._run_state.pending
        if pending is not None and self._conclude(pending):
            pending.deliver_numbers()

    def _step(self, closure: Closure | None) -> Any:
        try:
            if self._searches_whole_vector:
                return self._search(closure)
            return super()._step(closure)  # evaluates the closure, then calls `_update`
        finally:
            self._freezer.put_back()

    def _update(self) -> None:
        """Take a step; nothing is changed before all that may refuse it has been asked."""
        self.synchronize()
        batches = self._collect_trained()
        if self._recorders.on:
            self._recorders.collected(batches)
        pending = self._defer(batches)
        try:
            self._operate(batches, pending)
        except NonFiniteError as error:
            self._skip(error)
            return
        if self._recorders.on:
            self._recorders.begin(self.clock, batches)
        self._apply(batches, pending)
        written_by_guest = ""
        if self._guests.present:
            written_by_guest = self._guests.own_writes(self._run_state.published)
        self._advance(pending)
        for batch in batches:
            batch.forget_gradients()
        tell_followed(batches)
        if written_by_guest:
            raise OwnershipError(f"{written_by_guest} The step was taken.")

    def _collect_trained(self) -> list[Batch]:
        """Return a batch for each group that trains in this step; all others lose their gradients.

        Where fewer gradients came than in the last step, wrappers may have exchanged parameters.
        """
        batches = self._collect(self._begin())
        count = _count(batches)
        if count < self._exchange.gradients and is_distributed():
            self._settle_wrapping()
            batches = self._collect(self._begin())
            count = _count(batches)
        self._exchange.gradients = count
        if count != self._freezer.with_gradient:
            self._freezer.with_gradient = count
            self._contradictions.check_flags(self.param_groups)
        if count < self._freezer.trained:
            self._contradictions.check_places(self.param_groups, self.clock)
        if not batches:
            self._monitor.without_gradient(self.clock, self._freezer.active)
        return batches

    def _begin(self) -> list[Group]:
        """Return the groups that train in this step, after dropping the gradients of the others."""
        run = self._run_state
        if not run.guard.is_intact(self.param_groups):
            refuse_foreign_writes(run.published, self.param_groups, self.clock)
        if self._audit.on:
            self._audit.check(self.param_groups, self._freezer.active, self.clock, self.clock)
        if not self._freezer.flags.settled:
            self._settle_wrapping()
        if self._claim.lost_steps:
            self._contradictions.report_rebuilt(loaded=run.last_load is not None)
        self._drop_frozen_gradients()
        return [*compress(self.param_groups, self._freezer.active)]

    def _drop_frozen_gradients(self) -> None:
        for cell, names in self._freezer.drop(self.param_groups):
            self._contradictions.report_flags(cell, names, on=True)

    def _defer(self, batches: Sequence[Batch]) -> PendingStep | None:
        """Return the step as one that an accelerator decides on; None where the host has to.

        Guests and audits cannot wait, and parts of FSDP1 are judged together by all processes.
        """
        for batch in batches:
            batch.found_inf = None
        if self._guests.present or self._audit.on or self._exchange.shards is not None:
            return None
        if not may_stay_on_device(batches):
            return None
        refuse_captured_plan(batches[0].params[0].device)
        run = self._run_state
        return PendingStep(self.clock, DeferredChecks(), run.norms, run.applied)

    def _operate(self, batches: Sequence[Batch], pending: PendingStep | None) -> None:
        """Check that gradients are finite, and run the gradient operations of every scope.

        Where a step is pending, the device checks it, and the batches receive its flag.
        """
        every = self._resolved.plan.nonfinite_check == "all"
        shards = self._exchange.shards
        members, without_scope = self._by_scope(batches)
        known = self._recorders.norms if self._recorders.on else None
        checks = pending.checks if pending is not None else None
        if checks is not None and every:
            checks.look_at(without_scope, [g for batch in without_scope for g in batch.grads])
        elif every and (without_scope or shards is not None):
            check_finite(without_scope, self.clock, shards, known)
        run = self._run_state
        norms: dict[str, torch.Tensor] = {}
        first = first_norms(members, run.operations) if is_distributed() else {}
        for scope, its in members.items():
            parts = self._exchange.shards_by_scope.get(scope)
            given = (self._infos, self.clock, every, parts, first.get(scope), known, checks)
            norm = operate(its, run.operations[scope], *given)
            if norm is not None:
                norms[self._resolved.scopes[scope].name] = norm
        run.norms = norms
        if pending is not None:
            pending.decide(batches)
        if norms and self._monitor.clip.open:
            if pending is not None:
                pending.request([*norms.values()], self._monitor.measured)
            else:
                self._monitor.measured([float(norm) for norm in norms.values()])

    def _by_scope(self, batches: Sequence[Batch]) -> tuple[dict[int, list[Batch]], list[Batch]]:
        """Return the batches of each scope, and those of none."""
        members = self._sharded_scopes() if self._exchange.shards is not None else {}
        if not self._resolved.scopes:
            return members, [*batches]
        without_scope: list[Batch] = []
        for batch in batches:
            scope = self._resolved.scope_of[batch.hyper["name"]]
            its = without_scope if scope is None else members.setdefault(scope, [])
            its.append(batch)
        return members, without_scope

    def _sharded_scopes(self) -> dict[int, list[Batch]]:
        """Return the scopes in whose norms every process takes part, with a gradient or not."""
        rows = zip(self.param_groups, self._freezer.active, strict=True)
        scopes = dict.fromkeys(self._resolved.scope_of[g["name"]] for g, now in rows if now)
        spread = self._exchange.shards_by_scope
        return {scope: [] for scope in scopes if scope is not None and scope in spread}

    def _apply(self, batches: Sequence[Batch], pending: PendingStep | None) -> None:
        """Update the weights. Kernels may refuse a gradient, and so may guests: both come first."""
        own = batches
        if self._guests.present:
            own = [batch for batch in batches if batch.hyper["name"] not in self._guests]
        assigned = kernels.assign(own)
        if self._guests.present:
            self._guests.step(batches)
        sample = self._monitor.sample(own, self.clock) if self._monitor.samples else None
        kernels.carry_out(assigned)
        if sample is not None:
            self._compare(sample, pending)
        if pending is not None:
            pending.begun = self._begun(own)
        self._store_new_state(own)

    def _compare(self, sample: Sample, pending: PendingStep | None) -> None:
        compare = partial(self._monitor.compare, sample, self.clock, sample.batch.hyper["lr"])
        counts = sample.counts()
        if pending is not None:
            pending.request(counts, compare)
        else:
            compare([float(count) for count in counts])

    def _begun(self, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, str]]:
        """Return the entries of the state that begin with this step."""
        return [
            (param, key)
            for batch in batches
            if batch.has_new_state
            for key, column in batch.columns.items()
            for param, tensor in zip(batch.params, column, strict=True)
            if tensor is not None and key not in self.state[param]
        ]

    def _advance(self, pending: PendingStep | None = None) -> None:
        """Count the step, publish the values of the next one, and open or close windows.

        What opens or closes after a step that was not taken could not be undone, and nothing may
        come after the last step: there the host waits for the flag of this very step.
        """
        was = self._freezer.active
        run = self._run_state
        step = self.clock
        values = run.fixed or values_at(self._resolved, step + 1, self._feedback)
        if pending is not None and pending.has_result:
            pending.send()
            last = step + 1 == self._resolved.run.steps
            if (last or self._active_in(values) != was) and not self._conclude(pending):
                return
        is_open = pending is not None and pending.is_open
        run.applied = run.published
        self._publish(step + 1, run.published, values)
        if self._recorders.on:
            self._recorders.end(step, run.applied, run.norms, held=is_open)
            if self._freezer.active != was and self.clock != self._resolved.run.steps:
                self._recorders.windows(self.clock, was, self._freezer.active, run.applied)
        if self._freezer.active != was:  # a step is taken in training mode: so is what thaws now
            rows = zip(self.param_groups, was, self._freezer.active, strict=True)
            self._guests.set_mode("train", [g["name"] for g, old, now in rows if now and not old])
            self._contradictions.check_flags(self.param_groups)
        if self.clock >= self._monitor.next_look:
            seen = self.param_groups[0]["feedback"]
            self._monitor.after_step(self.clock, self._run_state.skipped, seen)
        if pending is not None and is_open:
            pending.published = True
            run.pending = pending
        elif pending is not None:
            pending.deliver_numbers()

    def _conclude(self, pending: PendingStep) -> bool:
        """Read whether a step was taken, and undo on the host what was done as if it had been.

        Raises:
            NonFiniteError: if it was not, and the plan says `nonfinite="raise"`.
        """
        run = self._run_state
        run.pending = None
        taken = pending.was_taken()
        if not taken:
            self._roll_back(pending)
        self._recorders.release(taken)
        if not taken:
            self._skip(pending.checks.error(pending.step))
        return taken

    def _roll_back(self, pending: PendingStep) -> None:
        """Bring the host back to before a step that the device has not taken."""
        run = self._run_state
        run.norms = pending.norms
        for param, key in pending.begun:
            self.state[param].pop(key, None)
        if pending.begun:
            self._kept_batches.clear()
        if not pending.published:
            return
        run.applied = pending.applied
        foreign = [
            (group, {k: group[k] for k, value in hyper.items() if group.get(k, value) is not value})
            for group, hyper in zip(self.param_groups, run.published.values(), strict=True)
        ]
        self._publish(pending.step)
        for group, written in foreign:  # by somebody else: the next step tells of it
            group.update(written)

    def _skip(self, error: NonFiniteError) -> None:
        if self._resolved.plan.nonfinite == "raise":
            raise error
        self._run_state.skipped += 1
        log.warning("step %d skipped: %s", self.clock, error)
        self._recorders.event(self.clock, "skipped", f"step {self.clock} was skipped: {error}")

    def _search(self, closure: Closure | None) -> Any:
        """Take a step of L-BFGS, which evaluates the closure itself, several times.

        It is given all groups, so that it knows parameters by their place among all, and leaves
        out what has no gradient.
        """
        groups = self._begin()
        self._contradictions.check_flags(self.param_groups)
        if self._recorders.on:
            self._recorders.begin_search(self.clock, groups)

        def evaluate() -> Any:
            self._freezer.put_back()
            loss = closure() if closure is not None else None
            self._drop_frozen_gradients()
            for group in self.param_groups:
                for param in group["params"]:
                    if not param.requires_grad:
                        self._freezer.set_aside(param)
            self._gradient_tracker.note(self.param_groups)
            return loss

        state = self.state[self.param_groups[0]["params"][0]]  # holds it all, as in torch
        try:
            loss = lbfgs_step(evaluate if callable(closure) else closure, self.param_groups, state)
        except NonFiniteError as error:
            self._skip(error)
            return None
        self._advance()
        return loss

    def _updates_for(self, group: Group) -> Updates:
        if self._guests.present and group["name"] in self._guests:
            return self._guests
        return self._kernel_updates

    def _kernel_of(self, group: Group) -> str:
        return WHOLE_VECTOR if self._searches_whole_vector else super()._kernel_of(group)

    def _new_batch(
        self, group: Group, params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch:
        if self._updates_for(group) is self._guests:  # which need not keep state that tells
            self._gradient_tracker.note([group])
        return super()._new_batch(group, params, grads)

    def _is_due(self, param: torch.Tensor) -> bool:
        # Frozen by hand since the build: left alone, as what the plan itself did not freeze.
        self._freezer.set_aside(param)
        return False

    # --- values --------------------------------------------------------------------------------

    @property
    def _feedback(self) -> Feedback:
        changed = {g["name"]: g["overrides"] for g in self.param_groups if g["overrides"]}
        seen = self.param_groups[0]["feedback"]
        return Feedback(changed, seen) if changed or seen else NO_FEEDBACK

    def _active_in(self, values: Values) -> list[bool]:
        """Return which groups train in the step of these values."""
        active = [True] * len(self._resolved.cells)
        for index in self._resolved.moving:
            active[index] = values.active(index)
        return active

    def _publish(
        self,
        clock: int,
        before: Mapping[str, dict[str, Any]] | None = None,
        values: Values | None = None,
    ) -> None:
        """Write the values of a step into the groups, and open or close windows.

        Args:
            clock: the number of the step.
            before: what the groups hold now, which cells whose values never change keep.
            values: the values of the step, if they are worked out already.
        """
        resolved = self._resolved
        if self._audit.on:
            self._audit.check(self.param_groups, self._freezer.active, self.clock, clock)
        run = self._run_state
        if values is None:
            values = run.fixed or values_at(resolved, clock, self._feedback)
        published = dict(before or ())
        changing: Sequence[int] = range(len(resolved.cells))
        if before and not run.fixed and not any(map(itemgetter("overrides"), self.param_groups)):
            changing = resolved.moving
        for index in changing:
            hyper = published[resolved.cells[index].name] = values.hyper(index)
            self.param_groups[index].update(hyper)
        for group in self.param_groups:
            group["clock"] = clock
        was = self._freezer.active
        self._freezer.follow(self.param_groups, self._active_in(values), clock)
        self._drop_states(was)
        if self._audit.on:
            self._audit.begin(self.param_groups, self._freezer.active)
        if changing:
            run.guard.publish(published, changing)
        run.published = published
        run.operations = list(map(values.operations, range(len(resolved.scopes))))

    def _fix_values(self, step: int, factors: Mapping[int, float]) -> None:
        """Take every step from now on with the values of one, the lr of some groups times a factor.

        For range tests, on a copy that nobody goes on with: the clock counts on.
        """
        fixed = FixedStep(self._resolved, step, self._feedback, factors)
        self._run_state.fixed = fixed
        self._publish(self.clock)

    def _drop_states(self, before: Sequence[bool | None]) -> None:
        """Release the state of what froze now, or was loaded frozen, where the plan says so."""
        if all(self._freezer.active):
            return
        rows = zip(
            self._resolved.cells, self.param_groups, before, self._freezer.active, strict=True
        )
        for cell, group, was, now in rows:
            if now or cell.frozen_state == "keep":
                continue
            # Loaded state may come from a plan that keeps it.
            if was or any(len(self.state.get(param, ())) > 1 for param in group["params"]):
                self._kept_batches.pop(id(group), None)  # it holds the tensors too
                for param in group["params"]:
                    # A new dict: a state dict that was taken before holds the old one.
                    self.state[param] = self._updates_for(group).initial_state(group, param)

    # --- wrappers that exchange parameters -----------------------------------------------------

    def _follow_model(self) -> bool:
        """Adopt the parameters that FSDP2 has put into the model, with the state of the old ones.

        Whatever reads or changes state comes here first, so that a pending step is concluded too.

        Returns:
            Whether there were any.
        """
        self.synchronize()
        adopted = self._exchange.adopt(self.param_groups)
        self._follow_exchanged()
        return adopted

    def _settle_wrapping(self) -> None:
        """Take the model as wrappers have left it, in the first step and where gradients miss."""
        adopted = is_distributed() and self._follow_model()
        if is_distributed():
            self._agreement.check()
            self._exchange.settle(self.param_groups)
        # Where gradients miss for another reason, as in models that choose a part of themselves,
        # the search for wrappers would cost more than the step.
        if adopted or not self._freezer.flags.settled or self._is_sharded():
            self._freezer.settle(self.param_groups, self.clock)

    def _settle_before_forward(self) -> None:
        """Settle before the first forward: in its step, a trainer clips before ours begins.

        What a reducer of DDP holds has its gradients at zero from the build on; FSDP has made
        other parameters, and computes gradients of what has the flag.
        """
        self._follow_model()
        if self._is_sharded():
            self._settle_wrapping()
            self._exchange.show_flags(self.param_groups)

    def _is_sharded(self) -> bool:
        return any(is_sharded(param) for group in self.param_groups for param in group["params"])


_params = attrgetter("params")


def _count(batches: Sequence[Batch]) -> int:
    """Return how many parameters are updated."""
    return sum(map(len, map(_params, batches)))

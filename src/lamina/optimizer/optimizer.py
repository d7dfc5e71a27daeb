"""The optimizer that carries out a plan: a real `torch.optim.Optimizer` with a clock."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .. import kernels
from .._util.notices import warn
from .._util.sharding import is_distributed, is_sharded
from .._util.text import listed
from ..algorithms.base import Batch
from ..algorithms.lbfgs import WHOLE_VECTOR, lbfgs_step
from ..algorithms.registry import is_whole_vector, optimizer_name
from ..algorithms.rounding import tell_followed
from ..errors import NonFiniteError, OwnershipError, PlanError
from ..gradients.nonfinite import DeferredChecks, check_finite
from ..gradients.operations import first_norms, operate
from ..guests.guests import GUEST, Guests
from ..kernels.capture import refuse_captured_plan
from ..model.finding import Finding
from ..model.parameters import Owned, ParamInfo, observe, walk
from ..model.ties import TieWatch
from ..optim.engine import Closure, Engine
from ..optim.updates import Group, KernelUpdates, Updates
from ..plan.history import extended
from ..plan.plan import Plan
from ..record.record import Record
from ..record.recorder import Recorder, Recorders
from ..resolve.explain import Explanation, explain
from ..resolve.resolve import resolve_owned
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback, FixedStep, Values, values_at
from ..runtime.agreement import Agreement
from ..runtime.audit import Audit
from ..runtime.claims import Claim
from ..runtime.exchange import BeforeForward, Exchange
from ..runtime.freezing import Freezer
from ..runtime.gradient_tracker import GradientTracker
from ..runtime.monitor import Monitor, Sample
from ..runtime.overrides import check_chosen, select_groups
from ..runtime.ownership import refuse_foreign_writes
from ..runtime.reports import begin_all, changes, check_report, from_rank_zero, observe_all
from ..schedules.duration import Run
from ..state.extend import resume_from
from ..state.io import add_plan_state, room_for_loading, torch_form
from ..state.load import Loaded, prepare
from ..state.report import LoadReport
from ..state.schema import FORMAT, run_record
from .checks import examine
from .contradictions import Contradictions
from .pending_step import PendingStep, may_stay_on_device
from .run_state import RunState
from .scheduler_view import SchedulerView

log = logging.getLogger("lamina")


class Optimizer(Engine):
    """Carries out a plan on a model; made by `Plan.build`.

    `param_groups` are plain dicts whose values are those of the next step (lr is 0.0 while a
    group is frozen); `applied` holds the values of the step just done, by group name; `norms` the
    gradient norm of each clip scope in that step; `skipped` counts steps not taken because of a
    non-finite gradient.
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

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        run: Run,
        audit: bool = False,
        resume: dict[str, Any] | None = None,
        extend: str | None = None,
        renamed: Mapping[str, str | None] | None = None,
        strict: bool = False,
    ) -> None:
        if strict and resume is None:
            raise PlanError("strict=True is for a saved state; give it with resume=state.")
        owned = walk(model)
        resolve_for = partial(resolve_owned, plan, owned, seen=observe(model, owned))
        resumed = resume_from(resolve_for, run, resume, extend, renamed)
        resolved = resumed.resolved if resumed else resolve_for(run)
        self._agreement = Agreement(resolved, resumed.clock if resumed else 0)
        self._agreement.check()
        by_name = {item.info.name: item for item in owned}
        self._resolved = resolved
        self._infos = {item.info.name: item.info for item in owned}
        self._searches_whole_vector = is_whole_vector(resolved.cells[0].optimizer)
        self._run_state = RunState()
        self._audit = Audit(model, on=audit)
        self._ties = TieWatch(model, owned)
        self._gradient_tracker = GradientTracker()
        self._monitor = Monitor(resolved, self._run_state.notices, model)
        self._recorders = Recorders()
        self._exchange = Exchange(model, resolved, owned)
        super().__init__([_group(cell, by_name, resolved) for cell in resolved.cells], {})
        algorithms = {cell.name: cell.algorithm or GUEST for cell in resolved.cells}
        self._kernel_updates = KernelUpdates(None, algorithms)
        self._claim = Claim(resolved, self.param_groups)
        self._freezer = Freezer(model, resolved.cells, owned, self._claim)
        self._exchange.settle(self.param_groups, at_build=True)
        self._guests = Guests(resolved.cells, self.param_groups, self.state)
        self._contradictions = Contradictions(
            resolved,
            self._freezer,
            self._claim,
            self._exchange,
            self._run_state.notices,
        )
        for group in self.param_groups:  # so that nothing needs a step to have state
            for param in group["params"]:
                self.state[param].update(self._updates_for(group).initial_state(group, param))
        with self._freezer.undone_on_error(owned):
            self._claim.enter(resumed=resume is not None)
            if resume is None:
                self._publish(0)
            else:  # which may fail, so it comes before anything is set on the model
                self._restore(resume, strict, renamed)
        if self._freezer.keeps_for_wrapping(self.param_groups, self.clock):
            BeforeForward(model, self._settle_before_forward)

    # --- what a user reads ---------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan this optimizer carries out."""
        return self._resolved.plan

    @property
    def resolved(self) -> Resolved:
        """What the plan means for this model."""
        return self._resolved

    @property
    def clock(self) -> int:
        """How many steps were taken; the step that comes next, counted from 0."""
        if self._run_state.pending is not None:
            self.synchronize()
        return int(self.param_groups[0]["clock"])

    @property
    def active(self) -> dict[str, bool]:
        """Whether each group trains in the next step, by name."""
        names = (group["name"] for group in self.param_groups)
        return dict(zip(names, map(bool, self._freezer.active), strict=True))

    @property
    def applied(self) -> dict[str, dict[str, Any]]:
        """The hyperparameters of every group in the step just done, by name; empty before it."""
        self.synchronize()
        return {name: dict(hyper) for name, hyper in self._run_state.applied.items()}

    @property
    def norms(self) -> dict[str, torch.Tensor]:
        """The gradient norm of each clip scope in the step just done, by the rule's name.

        On an accelerator nothing is waited for: until it is known whether the step was taken, they
        are its norms in either case.
        """
        return dict(self._run_state.norms)

    @property
    def skipped(self) -> int:
        """How many steps were not taken because a gradient was not finite."""
        self.synchronize()
        return self._run_state.skipped

    @property
    def should_stop(self) -> bool:
        """Whether early stopping has asked to stop."""
        return any(seen.get("stop") for seen in self.param_groups[0]["feedback"].values())

    @property
    def last_load(self) -> LoadReport | None:
        """What the last load kept, restarted or dropped; None before the first."""
        return self._run_state.last_load

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is legal in the plan but suspicious."""
        return self._resolved.findings

    def explain(self, name: str, step: int | None = None) -> Explanation:
        """Return the chain of rules behind every number of a parameter.

        Args:
            name: the name of a parameter (any of its names, if it is tied).
            step: counted from 0; the next step by default.
        """
        return explain(self._resolved, name, self.clock if step is None else step, self._feedback)

    def check(self, model: nn.Module, *, after: int = 10) -> tuple[Finding, ...]:
        """Find what came apart since build: parameters replaced, ties broken, gradients missing.

        Args:
            model: the model that the optimizer was built for, as it is now.
            after: how many steps a parameter may train without ever receiving a gradient.

        Returns:
            A finding for each thing that is not as it was, or that cannot be meant.
        """
        self._follow_model()
        known = (self.param_groups, self.state, model, after, self.last_load)
        found = examine(self._resolved, self._freezer, *known, self._gradient_tracker)
        return (*found, *self._monitor.found.values())

    def announce(self) -> None:
        """Give each finding as a `LaminaWarning`, once; `Plan.build` does it."""
        self._monitor.announce(self.findings)

    def scheduler_view(self) -> LRScheduler:
        """Return a read-only scheduler for trainers that insist on one; its `step` does nothing."""
        return SchedulerView(self)

    def recorder(
        self,
        *writers: Any,
        every: int | None = None,
        updates: bool = True,
        record: Record | None = None,
    ) -> Recorder:
        """Record what each group does in every step from now on, until the recorder is closed.

        Values are read from an accelerator later, many at once, so that no step waits for it. Call
        it on every process; the first one writes.

        Args:
            *writers: where to write: the path of a file of JSON lines, a `SummaryWriter`, or any
                logger with `log(values, step)` or `log_metrics(values, step)`.
            every: gradients, weights and updates are measured in each step whose number it divides;
                by default about a thousand times over the run (every 10th step if its length is
                unknown).
            updates: whether to measure updates, for which the weights that train are copied in a
                measured step.
            record: the record to add to; a new one by default.

        Returns:
            The recorder: `.record` holds the curves, `.metrics(loss=...)` adds your own.

        Raises:
            PlanError: for a writer that cannot be used.

        Example:
            >>> import torch, lamina as lm
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = lm.Plan(lm.SGD, lr=0.1).build(model)
            >>> with optimizer.recorder(every=1) as recorder:
            ...     loss = model(torch.ones(1, 2)).sum()
            ...     loss.backward()
            ...     optimizer.step()
            ...     recorder.metrics(loss=loss)
            >>> recorder.record.series("default", "lr")
            (array([0]), array([0.1]))
        """
        if every is None:
            steps = self._resolved.run.steps
            every = 10 if steps is None else max(1, steps // 1000)
        recorder = self._recorders.add(writers, every, updates, record, self.synchronize)
        for finding in self.findings:
            recorder.record.finding(finding)
        return recorder

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
        count = sum(len(batch.params) for batch in batches)
        if count < self._exchange.gradients and is_distributed():
            self._settle_wrapping()
            batches = self._collect(self._begin())
            count = sum(len(batch.params) for batch in batches)
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
        published = self._run_state.published
        for group in self.param_groups:
            hyper = published[group["name"]]
            if not all(map(is_, map(group.get, hyper), hyper.values())):
                refuse_foreign_writes(published, self.param_groups, self.clock)
        if self._audit.on:
            self._audit.check(self.param_groups, self._freezer.active, self.clock, self.clock)
        if not self._freezer.flags.settled:
            self._settle_wrapping()
        if self._claim.lost_steps:
            self._contradictions.report_rebuilt(loaded=self.last_load is not None)
        self._drop_frozen_gradients()
        pairs = zip(self.param_groups, self._freezer.active, strict=True)
        return [group for group, active in pairs if active]

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
        every = self.plan.nonfinite_check == "all"
        shards = self._exchange.shards
        members = self._sharded_scopes() if shards is not None else {}
        without_scope: list[Batch] = []
        if not self._resolved.scopes:
            without_scope = [*batches]
        for batch in batches if self._resolved.scopes else ():
            scope = self._resolved.scope_of[batch.hyper["name"]]
            if scope is None:
                without_scope.append(batch)
            else:
                members.setdefault(scope, []).append(batch)
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
            self._monitor.after_step(self.clock, self.skipped, seen)
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
        if self.plan.nonfinite == "raise":
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
        return Feedback(changed, self.param_groups[0]["feedback"])

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
        changing: Iterable[int] = range(len(resolved.cells))
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
        run.published = published
        run.operations = [values.operations(scope) for scope in range(len(resolved.scopes))]

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

    def override(self, *, rule: str | None = None, **hyper: float | None) -> None:
        """Replace what the plan gives for hyperparameters, from the next step on.

        As a last rule would: the schedule still multiplies lr. Saved with the state and logged.

        Args:
            rule: the name of a group, or a pattern that covers whole groups; all by default.
            **hyper: numbers; None takes an override back.

        Raises:
            PlanError: for an unknown group or hyperparameter; nothing was changed.
        """
        self._follow_model()
        chosen = select_groups(self._resolved, rule)
        check_chosen(self._resolved, chosen, hyper, self.clock)
        for index in chosen:
            group = self.param_groups[index]
            before = group["overrides"][-1][1] if group["overrides"] else {}
            kept = {k: v for k, v in {**before, **hyper}.items() if v is not None}
            group["overrides"] = extended(group["overrides"], self.clock, kept)
            log.info("step %d: override of %r: %s", self.clock, group["name"], hyper)
        names = tuple(self.param_groups[index]["name"] for index in chosen)
        self._recorders.event(self.clock, "override", f"override: {hyper}", names)
        self._publish(self.clock)

    def report(self, **metrics: float) -> None:
        """Feed metrics to plateaus, early stopping and thaws that wait for one.

        Call it on every process; the numbers of rank 0 count. Values change for the next step,
        windows at the end of the next step; `should_stop` says when to stop.

        Args:
            **metrics: names as in the plan, and numbers, such as `val_loss=0.31`.

        Raises:
            PlanError: for a NaN, or if the plan watches none of these; nothing was changed.
        """
        self._follow_model()
        numbers = check_report(self._resolved, from_rank_zero(metrics))
        seen = self.param_groups[0]["feedback"]
        new = observe_all(self._resolved, seen, numbers, self.clock)
        for group in self.param_groups:  # a new dict: saved states must not move with it
            group["feedback"] = new
        for line in changes(seen, new):
            log.info("step %d: %s", self.clock, line)
            self._recorders.event(self.clock, "feedback", line)
        self._recorders.metrics(self.clock, numbers)
        self._publish(self.clock)
        self._monitor.reported(self.clock)

    def train(self) -> None:
        """Put guests that have modes (schedule-free optimizers) into training mode.

        What the plan froze stays as it is.
        """
        self._guests.set_mode("train", [name for name, trains in self.active.items() if trains])

    def eval(self) -> None:
        """Put guests that have modes (schedule-free optimizers) into evaluation mode.

        What the plan froze stays as it is.
        """
        self._guests.set_mode("eval", [name for name, trains in self.active.items() if trains])

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

    def release(self) -> None:
        """Undo what the plan set on the model: `requires_grad` and module modes as before."""
        self._follow_model()
        self._freezer.release(self.param_groups)

    # --- state out and in ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's shape, with what a plan needs to continue in the groups.

        Tensors and plain values only; the tensors are the live ones, not copies.
        """
        self._follow_model()
        return add_plan_state(super().state_dict(), self.param_groups, self._guests)

    def torch_state_dict(self) -> dict[str, Any]:
        """Return the state in the form that torch's optimizer of the same name loads.

        Without what only a plan reads, and without entries for parameters that were never updated,
        whose state torch allocates itself. torch matches by position: build its optimizer over
        `[{"params": group["params"]} for group in optimizer.param_groups]`.

        Raises:
            StateError: if the plan uses several optimizers; torch's can be only one.
        """
        return torch_form(self.state_dict(), self._resolved, self._guests)

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        strict: bool = False,
        renamed: Mapping[str, str | None] | None = None,
    ) -> None:
        """Restore the state of a saved optimizer, by parameter name and shape.

        The plan's values stay; clock, overrides, feedback and every parameter's state are loaded.
        `last_load` says what was kept, new, restarted or dropped, and which values differ. A state
        without names (torch's) is matched by position, if number and shapes agree.

        Args:
            state_dict: from `state_dict()`, of torch's optimizer of the same name too.
            strict: whether state that is missing, of another optimizer or left over is an error;
                hyperparameters are the plan's and only reported.
            renamed: from the saved name of a parameter or module to its name now, such as
                `{"old.encoder": "encoder"}`; None leaves it out: `{"head.weight": None}`.

        Raises:
            StateError: if it does not fit; nothing was changed.
        """
        jumps = self._restore(state_dict, strict, renamed).jumps
        if jumps:
            log.warning(
                "the state's schedules fit a run of another length, and the plan's are used: "
                "%s. To choose how the run goes on, build with resume=state and extend='hold' or "
                "'stretch'.",
                listed(jumps),
            )

    def _restore(
        self, state_dict: Any, strict: bool, renamed: Mapping[str, str | None] | None
    ) -> LoadReport:
        self._follow_model()
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)  # what a hook changes is not the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        live = (self._resolved, self.param_groups, self._guests)
        loaded = prepare(*live, state_dict, strict, renamed)
        self._ties.warn()
        if loaded.warning:  # before anything is changed: warnings may be errors
            warn(loaded.warning)
        self._put(loaded)
        if loaded.lost:
            log.warning(
                "the state holds what fits no group or rule of the plan any more, and it is lost: "
                "%s. Call override again where it is still meant.",
                listed(loaded.lost),
            )
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)
        return loaded.report

    def _put(self, loaded: Loaded) -> None:
        """Exchange the state; nothing in here can fail."""
        self.state.update(loaded.state)
        self._kept_batches.clear()  # kept batches hold the old tensors
        for group in self.param_groups:
            group["overrides"] = loaded.feedback.overrides.get(group["name"], [])
            group["feedback"] = loaded.feedback.seen
        self._guests.put(self.param_groups, loaded.groups, loaded.guests)
        self._audit.forget()
        self._gradient_tracker.begin(loaded.clock)
        self._monitor.loaded()
        self._publish(loaded.clock)
        self._run_state.last_load = loaded.report

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Make room for a state that torch.distributed.checkpoint loads in place.

        It loads what is there already, and only for parameters with `requires_grad`. Inside, all
        that the plan ever trains has both; at the end what was not loaded is as it was.

        Example:
            with optimizer.receiving():
                state = get_optimizer_state_dict(model, optimizer)
                torch.distributed.checkpoint.load(state, checkpoint_id=path)
                set_optimizer_state_dict(model, optimizer, state)
        """
        self._follow_model()
        active = list(self._freezer.active)
        live = (self._resolved, self.param_groups, self.state, self._kernel_updates)
        with room_for_loading(*live) as flags:
            try:
                yield
            finally:
                for place, param, flag in flags:
                    if self._freezer.active[place] == active[place]:  # else the load has set it
                        param.requires_grad_(flag)

    def _described(self, group: Group, place: int) -> ParamInfo:
        return self._infos[group["param_names"][place]]

    def _restart(self, chosen: Sequence[tuple[Group, torch.Tensor, int]]) -> None:
        self.synchronize()
        if self._searches_whole_vector:  # one memory over all parameters, which lies with the first
            chosen = [(g, p, i) for g in self.param_groups for i, p in enumerate(g["params"])]
        super()._restart(chosen)
        for group, param, place in chosen:
            name = group["param_names"][place]
            group["param_shapes"][place] = list(param.shape)
            self._infos[name] = replace(self._infos[name], shape=tuple(param.shape))

    # --- torch's interface ---------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise `PlanError`: a plan already covers every parameter of the model."""
        if len(self.param_groups) == len(self._resolved.cells):
            raise PlanError(
                "add_param_group: a plan covers every parameter from the start, frozen ones too. "
                "To train a part later, give its rule thaw=; for parameters added to the model "
                "since, build a new optimizer from the plan and load this one's state_dict()."
            )
        # The plan has named every parameter once, in groups that lack nothing. torch would compare
        # each group with all groups before it, which for hundreds of them takes half of the build.
        self.param_groups.append(param_group)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters that the plan speaks of.

        Those that the model's owner froze before the plan (`requires_grad=False`), and that no rule
        mentions, may belong to another optimizer.

        Args:
            set_to_none: whether to set them to None instead of 0.
        """
        # Nothing else is set aside here: a step gives all back before it calls a closure.
        for cell, group in zip(self._resolved.cells, self.param_groups, strict=True):
            for param in group["params"] if cell.by_model else ():
                self._freezer.set_aside(param)
        super().zero_grad(set_to_none)
        self._freezer.put_back()

    def __getstate__(self) -> dict[str, Any]:
        self.synchronize()
        own = (*Engine.__annotations__, *Optimizer.__annotations__)
        parts = {name: self.__dict__[name] for name in own if name in self.__dict__}
        return {**super().__getstate__(), **parts}


def _group(cell: Cell, by_name: Mapping[str, Owned], resolved: Resolved) -> dict[str, Any]:
    """Return a parameter group without its values; what it holds beside torch's keys is saved."""
    return {
        "params": [by_name[info.name].tensor for info in cell.parameters],
        "param_names": [info.name for info in cell.parameters],
        "param_shapes": [list(info.shape) for info in cell.parameters],
        "name": cell.name,
        "optimizer": optimizer_name(cell.optimizer),
        "format": FORMAT,
        "run": run_record(resolved.run),
        "planned": run_record(resolved.planned or resolved.run),
        "clock": 0,
        "overrides": [],
        "feedback": begin_all(resolved),
    }

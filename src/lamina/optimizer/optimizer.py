"""The optimizer that carries out a plan: a real `torch.optim.Optimizer` with a clock."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .. import kernels
from .._util.notices import Notices
from .._util.sharding import is_distributed, is_sharded
from ..algorithms.base import Algorithm, Batch
from ..algorithms.lbfgs import lbfgs_step
from ..algorithms.registry import is_whole_vector, optimizer_name
from ..errors import NonFiniteError, OwnershipError, PlanError
from ..gradients.apply import check_finite, operate
from ..guests.guests import GUEST, Guests
from ..model.finding import Finding
from ..model.parameters import Owned, ParamInfo, frozen_by_call, observe, walk
from ..model.ties import Watched
from ..optim.engine import Closure
from ..optim.run_state import RunState
from ..plan.plan import Plan
from ..resolve.explain import Explanation, explain
from ..resolve.findings import rebuilt, turned_off, turned_on
from ..resolve.resolve import resolve_owned
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import values_at
from ..runtime.audit import Audit
from ..runtime.claims import Claim
from ..runtime.exchange import BeforeForward, Exchange
from ..runtime.freezing import Freezer
from ..runtime.gradient_tracker import GradientTracker
from ..runtime.monitor import Monitor
from ..runtime.ownership import refuse_foreign_writes
from ..runtime.reports import begin_all
from ..schedules.duration import Run
from ..state import FORMAT, LoadReport, resume_from, run_record
from .checks import examine, untrained
from .restoring import Restorable
from .scheduler_view import SchedulerView

log = logging.getLogger("lamina")
#: what an optimizer under a plan has beside torch's attributes
_OWN = (
    *("_resolved", "_complete", "_freezer", "_algorithms", "_scope_of", "_infos", "_guests"),
    *("_whole_vector", "_audit", "_ties", "_received", "_run_state", "_exchange", "_monitor"),
    "_claim",
)


class Optimizer(Restorable):
    """Carries out a plan on a model; made by `Plan.build`.

    `param_groups` are plain dicts whose values are those of the next step (lr is 0.0 while a
    group is frozen); `applied` holds the values of the step just done, by group name; `norms` the
    gradient norm of each clip scope in that step; `skipped` counts steps not taken because of a
    non-finite gradient.
    """

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
        settle = partial(resolve_owned, plan, owned, seen=observe(model, owned))
        resumed = resume_from(settle, run, resume, extend, renamed)
        resolved = resumed.resolved if resumed else settle(run)
        by_name = {item.info.name: item for item in owned}
        self._resolved = resolved
        self._complete = False
        self._run_state = RunState()
        self._audit = Audit(model, on=audit)
        self._ties = Watched(model, owned)
        self._received = GradientTracker()
        self._monitor = Monitor(resolved, self._notices, model)
        self._exchange = Exchange(model, resolved, owned)
        self._scope_of = {cell.name: cell.scope for cell in resolved.cells}
        self._infos = {item.info.name: item.info for item in owned}
        self._whole_vector = is_whole_vector(resolved.cells[0].optimizer)
        self._algorithms = {cell.name: cell.algorithm or GUEST for cell in resolved.cells}
        super().__init__([_group(cell, by_name, resolved) for cell in resolved.cells], {})
        self._complete = True
        self._claim = Claim(resolved, self.param_groups)
        self._freezer = Freezer(model, resolved.cells, owned, self._claim)
        self._exchange.settle(self.param_groups, at_build=True)
        self._guests = Guests(resolved.cells, self.param_groups, self.state)
        for group in self.param_groups:  # so that nothing needs a step to have state
            for param in group["params"]:
                self.state[param].update(self._initial_state(group, param))
        with self._freezer.undone_on_error(owned):
            self._claim.enter(resumed=resume is not None)
            if resume is None:
                self._publish(0)
            else:  # which may fail, so it comes before anything is set on the model
                self._restore(resume, strict, renamed)
        if self._freezer.keeps_for_wrapping(self.param_groups, self.clock):
            BeforeForward(model, self._settle_shards)

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
    def applied(self) -> dict[str, dict[str, Any]]:
        """The hyperparameters of every group in the step just done, by name; empty before it."""
        return {name: dict(hyper) for name, hyper in self._run_state.applied.items()}

    @property
    def norms(self) -> dict[str, torch.Tensor]:
        """The gradient norm of each clip scope in the step just done, by the rule's name."""
        return dict(self._run_state.norms)

    @property
    def skipped(self) -> int:
        """How many steps were not taken because a gradient was not finite."""
        return self._run_state.skipped

    @property
    def last_load(self) -> LoadReport | None:
        """What the last load kept, restarted or dropped; None before the first."""
        return self._run_state.last_load

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What is legal in the plan but suspicious."""
        return self._resolved.findings

    def explain(self, name: str, step: int | None = None) -> Explanation:
        """The chain of rules behind every number of a parameter.

        Args:
            name: the name of a parameter (any of its names, if it is tied).
            step: counted from 0; the next step by default.
        """
        return explain(self._resolved, name, self.clock if step is None else step, self._feedback)

    def check(self, model: nn.Module, *, after: int = 10) -> tuple[Finding, ...]:
        """What came apart since build: parameters exchanged, ties broken, gradients missing.

        Args:
            model: the model that the optimizer was built for, as it is now.
            after: how many steps a parameter may train without ever receiving a gradient.

        Returns:
            A finding for each thing that is not as it was, or that cannot be meant.
        """
        self._follow_model()
        known = (self.param_groups, self.state, model, after, self.last_load, self._received)
        return (*examine(self._resolved, self._freezer, *known), *self._monitor.found.values())

    def announce(self) -> None:
        """Give each finding as a `LaminaWarning`, once; `Plan.build` does it."""
        self._monitor.announce(self.findings)

    def scheduler_view(self) -> LRScheduler:
        """A read-only scheduler, for trainers that insist on one; its `step` does nothing."""
        return SchedulerView(self)

    @property
    def _notices(self) -> Notices:
        return self._run_state.notices

    # --- the step ------------------------------------------------------------------------------

    def algorithm_for(self, group: dict[str, Any]) -> Algorithm:
        """The algorithm of a group."""
        return self._algorithms[group["name"]]

    def _step(self, closure: Closure | None) -> Any:
        try:
            return self._step_all(closure) if self._whole_vector else super()._step(closure)
        finally:
            self._freezer.put_back()

    def _step_all(self, closure: Closure | None) -> Any:
        # A method over all parameters at once evaluates the loss itself, several times. It is given
        # all groups, so that it knows parameters by their place among all, and leaves out what has
        # no gradient.
        self._begin()
        self._look_at_flags()

        def evaluate() -> Any:
            self._freezer.put_back()
            loss = closure() if closure is not None else None
            self._drop_frozen()
            for group in self.param_groups:
                for param in group["params"]:
                    if not param.requires_grad:
                        self._freezer.set_aside(param)
            self._received.note(self.param_groups)
            return loss

        state = self.state[self.param_groups[0]["params"][0]]  # holds it all, as in torch
        try:
            loss = lbfgs_step(evaluate if callable(closure) else closure, self.param_groups, state)
        except NonFiniteError as error:
            self._skip(error)
            return None
        self._advance()
        return loss

    def _begin(self) -> list[dict[str, Any]]:
        """The groups that train in this step; the others are left without gradients."""
        refuse_foreign_writes(self._run_state.published, self.param_groups, self.clock)
        self._audit.check(self.param_groups, self._freezer.active, self.clock, self.clock)
        if not self._freezer.flags.settled:
            self._settle_wrapping()
        if self._claim.lost_steps:
            self._tell_rebuilt()
        self._drop_frozen()
        pairs = zip(self.param_groups, self._freezer.active, strict=True)
        return [group for group, active in pairs if active]

    def _settle_wrapping(self) -> None:
        """Take the model as wrappers have left it, in the first step and where gradients miss."""
        adopted = is_distributed() and self._follow_model()
        if is_distributed():
            self._exchange.settle(self.param_groups)
        # Where gradients miss for another reason, as in models that choose a part of themselves,
        # the search for wrappers would cost more than the step.
        if adopted or not self._freezer.flags.settled or self._is_sharded():
            self._freezer.settle(self.param_groups, self.clock)

    def _is_sharded(self) -> bool:
        return any(is_sharded(param) for group in self.param_groups for param in group["params"])

    def _settle_shards(self) -> None:
        """Do so before the first forward: in its step, a trainer clips before ours begins.

        What a reducer of DDP holds has its gradients at zero from the build on; FSDP has made
        other parameters, and computes gradients of what has the flag.
        """
        self._follow_model()
        if self._is_sharded():
            self._settle_wrapping()
            self._exchange.show_flags(self.param_groups)

    def _drop_frozen(self) -> None:
        for cell, names in self._freezer.drop(self.param_groups):
            self._tell_flags(cell, names, on=True)

    def _tell_rebuilt(self) -> None:
        if self.last_load is None:
            self._notices.tell(rebuilt(self._claim.lost_steps), key="rebuilt")
        self._claim.lost_steps = 0

    def _look_at_flags(self) -> None:
        """Warn of `requires_grad` that contradicts the plan."""
        for cell, names, params in self._freezer.turned(self.param_groups):
            if params[0].requires_grad:
                self._tell_flags(cell, names, on=True)
            elif not all(map(frozen_by_call, params)):  # who calls lamina.freeze knows
                self._tell_flags(cell, names, on=False)

    def _tell_flags(self, cell: Cell, names: Sequence[str], on: bool) -> None:
        finding = turned_on(names, cell.by_model) if on else turned_off(names)
        self._notices.tell(finding, key=f"{finding.code} {cell.name}")

    def _count_gradients(self, batches: Sequence[Batch]) -> None:
        """Look at the flags when another number of parameters than before has a gradient."""
        count = sum(len(batch.params) for batch in batches)
        if count != self._freezer.with_gradient:
            self._freezer.with_gradient = count
            self._look_at_flags()
        pairs = zip(self.param_groups, self._freezer.active, strict=True)
        if count < sum(len(group["params"]) for group, active in pairs if active):
            self._look_at_places()

    def _look_at_places(self) -> None:
        """Warn of parameters that were replaced since the build: the old ones have no gradient."""
        if not self._monitor.search.is_due(self.clock) or self._is_sharded():
            return
        elsewhere = self._claim.trained_elsewhere()
        model = self._exchange.model
        for finding in untrained(self._resolved, self.param_groups, model, elsewhere):
            self._notices.tell(finding)

    def _advance(self) -> None:
        was = self._freezer.active
        run = self._run_state
        run.applied = run.published
        self._publish(self.clock + 1, run.published)
        if self._freezer.active != was:  # a step is taken in training mode: so is what thaws now
            rows = zip(self.param_groups, was, self._freezer.active, strict=True)
            self._guests.set_mode("train", [g["name"] for g, old, now in rows if now and not old])
            self._look_at_flags()
        self._monitor.after_step(self.clock, self.skipped, self.param_groups[0]["feedback"])

    def _skip(self, error: NonFiniteError) -> None:
        if self.plan.nonfinite == "raise":
            raise error
        self._run_state.skipped += 1
        log.warning("step %d skipped: %s", self.clock, error)

    def _batch(
        self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]
    ) -> Batch:
        if group["name"] not in self._guests:
            return super()._batch(group, params, grads)
        self._received.note([group])
        batch = self._guests.batch(group, params, grads, self._names(group, params))
        self._kept_batches.by_group[id(group)] = kernels.Kept(batch, ())
        return batch

    def _entries(
        self, group: dict[str, Any], params: Iterable[torch.Tensor]
    ) -> list[dict[str, Any]]:
        if group["name"] not in self._guests:
            return super()._entries(group, params)
        return [{} for _ in params]  # what a guest keeps is its own

    def _plainly_fit(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        entries: list[dict[str, Any]],
    ) -> bool:
        if group["name"] in self._guests and self._guests.any_outgrown(group):
            return False
        return super()._plainly_fit(group, params, grads, entries)

    def _wrong_with_state(
        self, group: dict[str, Any], param: torch.Tensor, entry: dict[str, Any]
    ) -> list[str]:
        if group["name"] not in self._guests:
            return super()._wrong_with_state(group, param, entry)
        return self._guests.outgrown(group, param, self.state[param])

    def _update(self) -> None:
        batches = self._collect(self._begin())
        if self._exchange.misses(sum(len(batch.params) for batch in batches)):
            self._settle_wrapping()
            batches = self._collect(self._begin())
        self._count_gradients(batches)
        if not batches:
            self._monitor.without_gradient(self.clock, self._freezer.active)
        try:
            self._operate(batches)
        except NonFiniteError as error:
            self._skip(error)
            return
        own = [batch for batch in batches if batch.hyper["name"] not in self._guests]
        work = kernels.assign(own)  # which may refuse a gradient, as guests may: both come first
        self._guests.step(batches)
        sample = self._monitor.sample(own, self.clock)
        kernels.carry_out(work)
        if sample is not None:
            self._monitor.compare(sample, self.clock)
        self._store_new_state(own)
        wrote = self._guests.own_writes(self._run_state.published)
        self._advance()
        if wrote:
            raise OwnershipError(f"{wrote} The step was taken.")

    def _operate(self, batches: Sequence[Batch]) -> None:
        """Run the gradient operations of every scope, and look at the gradients of no scope."""
        every = self.plan.nonfinite_check == "all"
        members = self._shared_scopes()
        without: list[Batch] = []
        for batch in batches:
            scope = self._scope_of[batch.hyper["name"]]
            if scope is None:
                without.append(batch)
            else:
                members.setdefault(scope, []).append(batch)
        if every and (without or self._exchange.shards is not None):
            check_finite(without, self.clock, self._exchange.shards)
        run = self._run_state
        norms: dict[str, torch.Tensor] = {}
        for scope, its in members.items():
            shards = self._exchange.shards_of(scope)
            norm = operate(its, run.operations[scope], self._infos, self.clock, every, shards)
            if norm is not None:
                norms[self._resolved.scopes[scope].name] = norm
        run.norms = norms
        if norms:
            self._monitor.measured(norms)

    def _shared_scopes(self) -> dict[int, list[Batch]]:
        """The scopes in whose norms every process takes part, if it has a gradient or not."""
        training = (
            g["name"] for g, now in zip(self.param_groups, self._freezer.active, strict=True) if now
        )
        scopes = dict.fromkeys(self._scope_of[name] for name in training)
        return {s: [] for s in scopes if s is not None and self._exchange.shards_of(s)}

    # --- a parameter that changed under it -----------------------------------------------------

    def _described(self, group: dict[str, Any], place: int) -> ParamInfo:
        return self._infos[group["param_names"][place]]

    def _restart(self, chosen: Sequence[tuple[dict[str, Any], torch.Tensor, int]]) -> None:
        if self._whole_vector:  # one memory over all parameters, which lies with the first
            chosen = [(g, p, i) for g in self.param_groups for i, p in enumerate(g["params"])]
        begun = [
            self._guests.begin_anew(group, param)
            if group["name"] in self._guests
            else self._initial_state(group, param)
            for group, param, _ in chosen
        ]
        for (group, param, place), entry in zip(chosen, begun, strict=True):
            name = group["param_names"][place]
            self._kept_batches.by_group.pop(id(group), None)
            self.state[param] = entry
            group["param_shapes"][place] = list(param.shape)
            self._infos[name] = replace(self._infos[name], shape=tuple(param.shape))

    # --- values --------------------------------------------------------------------------------

    def _publish(self, clock: int, before: Mapping[str, dict[str, Any]] | None = None) -> None:
        """Write the values of step `clock` into the groups, and open or close windows.

        `before`: what the groups hold now, which steady cells keep.
        """
        resolved = self._resolved
        self._audit.check(self.param_groups, self._freezer.active, self.clock, clock)
        values = values_at(resolved, clock, self._feedback)
        published: dict[str, dict[str, Any]] = {}
        for index, (cell, group) in enumerate(zip(resolved.cells, self.param_groups, strict=True)):
            hyper = before.get(cell.name) if before else None
            if hyper is None or not cell.steady or group["overrides"]:
                hyper = values.hyper(index)
                group.update(hyper)
            published[cell.name] = hyper
            group["clock"] = clock
        was = self._freezer.active
        active = [*map(values.active, range(len(resolved.cells)))]
        self._freezer.follow(self.param_groups, active, clock)
        self._drop_states(was)
        self._audit.begin(self.param_groups, self._freezer.active)
        run = self._run_state
        run.published = published
        run.operations = [values.operations(scope) for scope in range(len(resolved.scopes))]

    def release(self) -> None:
        """Undo what the plan set on the model: `requires_grad` and module modes as before."""
        self._follow_model()
        self._freezer.release(self.param_groups)

    # --- torch's interface ---------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused under a plan, which already covers every parameter of the model."""
        if self._complete:
            raise PlanError(
                "add_param_group: a plan covers every parameter from the start, frozen ones too. "
                "To train a part later, give its rule thaw=; for parameters added to the model "
                "since, build a new optimizer from the plan and load this one's state_dict()."
            )
        super().add_param_group(param_group)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters that the plan speaks of.

        Those that the model's owner froze before the plan (`requires_grad=False`), and that no rule
        mentions, may belong to another optimizer.

        Args:
            set_to_none: whether to set them to None instead of 0.
        """
        rows = zip(self._resolved.cells, self.param_groups, strict=True)
        own = [group for cell, group in rows if not cell.by_model]
        if len(own) == len(self.param_groups):
            super().zero_grad(set_to_none)
            return
        for param in (param for group in own for param in group["params"]):
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                param.grad = param.grad.detach().zero_()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in _OWN}}


def _group(cell: Cell, by_name: Mapping[str, Owned], resolved: Resolved) -> dict[str, Any]:
    """A parameter group without its values; what it holds beside torch's keys is saved with it."""
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

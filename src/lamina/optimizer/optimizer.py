"""The optimizer that carries out a plan: a real `torch.optim.Optimizer` with a clock."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .._util.notices import warn
from .._util.text import listed
from ..algorithms.registry import is_whole_vector, optimizer_name
from ..errors import PlanError
from ..guests.guests import GUEST, Guests
from ..model.finding import Finding
from ..model.parameters import Owned, ParamInfo, observe, walk
from ..model.ties import TieWatch
from ..optim.engine import Engine
from ..optim.updates import Group, KernelUpdates
from ..plan.history import extended
from ..plan.plan import Plan
from ..record.record import Record
from ..record.recorder import Recorder, Recorders
from ..resolve.explain import Explanation, explain
from ..resolve.resolve import resolve_owned
from ..resolve.resolved import Cell, Resolved
from ..runtime.agreement import Agreement
from ..runtime.audit import Audit
from ..runtime.claims import Claim
from ..runtime.exchange import BeforeForward, Exchange
from ..runtime.freezing import Freezer
from ..runtime.gradient_tracker import GradientTracker
from ..runtime.monitor import Monitor
from ..runtime.overrides import check_chosen, select_groups
from ..runtime.reports import begin_all, changes, check_report, from_rank_zero, observe_all
from ..schedules.duration import Run
from ..state.extend import resume_from
from ..state.io import add_plan_state, room_for_loading, torch_form
from ..state.load import Loaded, prepare
from ..state.report import LoadReport
from ..state.schema import FORMAT, run_record
from .checks import examine
from .contradictions import Contradictions
from .run_state import RunState
from .scheduler_view import SchedulerView
from .steps import PlanSteps

log = logging.getLogger("lamina")


class Optimizer(PlanSteps):
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
        own = (*Engine.__annotations__, *PlanSteps.__annotations__)
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

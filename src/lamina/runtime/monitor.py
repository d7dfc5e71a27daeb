"""What goes wrong over many steps: a run of another length, no gradients, no metrics, lost updates.

Nothing here is read or computed at an ordinary step: what can be known is settled when the
optimizer is built, and the step compares its number with that of the next thing to look at.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from .._util.notices import Notices, is_first_process
from .._util.sharding import is_distributed
from .._util.tensors import is_dtensor
from ..algorithms.base import HALF, Batch
from ..algorithms.rounding import rounding_of
from ..model.finding import Finding
from ..plan.reactions import Reaction
from ..resolve.resolved import Resolved
from ..resolve.timeline import values_at
from ..schedules.duration import parse

#: the steps in which the weights are looked at
_SAMPLED = (1, 10, 100, 300, 1000, 3000)
#: how many numbers of a tensor are looked at
_NUMBERS = 4096
#: in how many steps norms are looked at, and how many must stop at the same number
_CLIP_STEPS, _CLIP_HITS = 200, 5


class Monitor:
    """Notices what goes wrong in a run and says each thing once.

    `found` holds what was noticed, for `Optimizer.check`, on every process; warnings are given on
    rank 0 alone. It is no part of the state: a run that goes on looks again.
    """

    def __init__(self, resolved: Resolved, notices: Notices, model: nn.Module) -> None:
        self.found: dict[str, Finding] = {}
        self._resolved = resolved
        self._notices = notices
        self._without_gradient: int | None = None  # the last step that had none
        self._had_report = False
        self._epoch = FirstEpoch(resolved.run.steps_per_epoch)
        self._trainer = LightningTrainer(model)
        self.clip = ClippedElsewhere()
        #: whether weights are compared before and after some steps
        self.samples = _rounds_to_nearest(resolved)
        #: the step in which `_look` has something to do
        self._due: float = 0
        #: the step from which `after_step` has something to do; an ordinary step compares numbers
        self.next_look: float = 0

    def announce(self, findings: Sequence[Finding]) -> None:
        """Give the findings of a plan as warnings, each once."""
        for finding in findings:
            self._warn(finding, str(finding))

    def _tell(self, code: str, what: str, fix: str, about: str = "") -> None:
        """Remember a finding about the run (or a part of it), and give it as a warning."""
        key = f"{code} {about}"
        finding = self.found.setdefault(key, Finding(code, what, fix))
        self._warn(finding, key)

    def _warn(self, finding: Finding, key: str) -> None:
        if is_first_process():
            self._notices.tell(finding, key=key)

    # --- the length of the run, and metrics ----------------------------------------------------

    def after_step(self, clock: int, skipped: int, seen: Mapping[str, Mapping[str, Any]]) -> None:
        """Look at what is due.

        Args:
            clock: how many steps were taken.
            skipped: how many were left out because of a gradient that was not finite.
            seen: what the reactions have seen.
        """
        self._compare_with(self._trainer.steps())
        if self._epoch.open and (length := self._epoch.after_step(clock, skipped)):
            self._compare(length)
        if clock >= self._due:
            self._look(clock, seen)
        self.next_look = 0 if self._epoch.open else self._due

    def _look(self, clock: int, seen: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell of a run beyond its end, and of metrics that were never reported."""
        steps = self._resolved.run.steps
        moments = [math.inf if steps is None else steps + 1]
        if steps is not None and clock > steps:
            self._tell(
                "beyond-the-end",
                f"the run goes on beyond the {steps} steps it was planned for; schedules hold "
                "their last values from here on, and nothing thaws or freezes any more.",
                "Pass build() the length that the run really has: steps=, or epochs= and "
                "steps_per_epoch= in optimizer steps. To lengthen a run, build with "
                "resume=optimizer.state_dict() and extend='hold' or 'stretch'.",
            )
        for key, reaction in self._resolved.reactions:
            moments.append(self._deadline(reaction))
            if clock >= moments[-1] and seen[key]["best"] is None:
                self._tell(
                    "metric-never-reported",
                    f"{reaction!r} ({key}) has never received {reaction.metric!r} in {clock} "
                    "steps, so that it does nothing.",
                    f"After each validation call optimizer.report({reaction.metric}=...), on "
                    "every process.",
                    about=key,
                )
        self._due = min((each for each in moments if each > clock), default=math.inf)

    def loaded(self) -> None:
        """Forget what was counted: the clock is that of a loaded state."""
        self._epoch.forget()
        self.next_look = 0

    def _deadline(self, reaction: Reaction) -> float:
        """Return the step by which the metric of a reaction should have come.

        That is the end of its patience and one epoch more for the first report (a quarter of a run
        whose epochs are unknown); where patience counts reports, one an epoch is usual. At the
        latest it is the end of the run. A run of one epoch may report after its last step.
        """
        run, settled = self._resolved.run, self._resolved.settled_for
        epoch, patience = run.steps_per_epoch, reaction.patience
        last = math.inf if run.steps is None else float(run.steps)
        if epoch is not None and last <= epoch:
            last += 1
        if not isinstance(patience, int):
            waits = math.ceil(parse(patience).in_steps(settled))
            grace = epoch or (3 * waits if run.steps is None else max(waits, run.steps // 4))
            return min(last, waits + grace + 1)
        return last if epoch is None else min(last, (patience + 1) * epoch + 1)

    def reported(self, clock: int) -> None:
        """Compare the step of the first report with the planned length of an epoch.

        Each of N processes has an N-th of the batches: the commonest reason for a wrong length.
        """
        epoch, processes = self._resolved.run.steps_per_epoch, count_processes()
        first, self._had_report = not self._had_report, True
        if first and epoch is not None and processes > 1:
            share = math.ceil(epoch / processes)
            if abs(clock - share) <= 1:
                self._compare(clock)

    def _compare_with(self, steps: int | None) -> None:
        """Tell if a trainer takes another number of steps than the run was planned for."""
        planned = self._resolved.run.steps
        if planned is not None and steps is not None and not _alike(steps, planned):
            self._tell(
                "another-length",
                f"the trainer takes {steps} optimizer steps, but {planned} were planned, so that "
                f"schedules and windows take {_ratio(planned, steps)} as they should.",
                "Build in configure_optimizers with steps=self.trainer.estimated_stepping_batches, "
                "which counts processes and accumulated batches.",
            )

    def _compare(self, length: int) -> None:
        """Tell if an epoch had another length than planned; a few steps may have been left out."""
        planned = self._resolved.run.steps_per_epoch
        if planned is None or _alike(length, planned):
            return
        count = count_processes()
        why = f" Each of the {count} processes has its share of the batches." if count > 1 else ""
        self._tell(
            "another-length",
            f"an epoch had {length} optimizer steps, but {planned} were planned, so that schedules "
            f"and windows take {_ratio(planned, length)} as they should.{why}",
            f"Build with steps_per_epoch={length}, the length of the loader that is iterated over "
            "(len(loader) after accelerator.prepare; the batches divided by the accumulated ones).",
        )

    # --- gradients -----------------------------------------------------------------------------

    def without_gradient(self, clock: int, active: Sequence[bool | None]) -> None:
        """Note a step in which no parameter had a gradient, and tell of two in a row.

        A single one may be a batch that a trainer leaves out.
        """
        if any(active):
            if self._without_gradient == clock - 1:
                self._tell(
                    "step-without-gradient",
                    f"no parameter had a gradient in the steps {clock - 1} and {clock}; nothing "
                    "was updated.",
                    "Call loss.backward() before optimizer.step(), and optimizer.zero_grad() after "
                    "it. If both are done, the loss depends on nothing that trains (a detach, "
                    "torch.no_grad, another copy of the model).",
                )
            self._without_gradient = clock

    def measured(self, norms: list[float]) -> None:
        """Look at the norms of all scopes in a step, in their order."""
        limit = self.clip.after_step(norms)
        if limit is not None:
            self._tell(
                "clipped-elsewhere",
                f"the norm of the gradients stops at {limit:g} before the plan clips them: "
                "something else has clipped them already, so that the plan's limits and norms are "
                "not those of the loss.",
                "Clip in one place: remove clip_grad_norm_ from the loop, or the trainer's option "
                "(Lightning's gradient_clip_val, Transformers' max_grad_norm=0), or clip_norm= "
                "from the plan.",
            )

    # --- weights of 16 bits --------------------------------------------------------------------

    def sample(self, batches: Sequence[Batch], clock: int) -> Sample | None:
        """Return numbers of a 16-bit parameter before the update, at a few steps of the run."""
        if clock not in _SAMPLED:
            return None
        found = [
            (param.numel(), batch, index)
            for batch in batches
            for index, param in enumerate(batch.params)
            if param.dtype in HALF and rounding_of(param, batch.hyper) is None
            if _is_plain(param) and _is_plain(batch.grads[index])
        ]
        if not found:
            return None
        _, batch, index = max(found, key=lambda each: each[0])
        return Sample(batch, index)

    def compare(self, sample: Sample, clock: int, lr: float, counts: list[float]) -> None:
        """Tell if most of the sampled numbers with a gradient are what they were.

        Args:
            sample: what was sampled.
            clock: the number of the step.
            lr: the learning rate in it.
            counts: the numbers of `sample.counts()`.
        """
        unchanged, moving = counts
        share = unchanged / max(1.0, moving)
        if lr and share > 0.5 and lr >= 0.5 * self._peak(sample.batch.hyper["name"]):
            name = sample.batch.name_of(sample.index)
            kind = str(sample.param.dtype).removeprefix("torch.")
            self.samples = False
            self._tell(
                "updates-round-away",
                f"{share:.0%} of the numbers of {name} ({kind}) that have a gradient did not "
                f"change in step {clock} (lr {lr:.3g}): the update is less than half the distance "
                f"to the next {kind}.",
                "Give the plan rounding='stochastic', 'kahan' or 'master', which keep small "
                "updates; or keep the parameters in float32 (model.float()) and compute in 16 bits "
                "with torch.autocast; or raise lr.",
            )

    def _peak(self, name: str) -> float:
        """Return about the largest lr of a group in the run."""
        index = next(i for i, cell in enumerate(self._resolved.cells) if cell.name == name)
        steps = np.unique(np.linspace(0, (self._resolved.run.steps or 1000) - 1, 500).round())
        return float(np.max(values_at(self._resolved, steps).lr(index)))


class LightningTrainer:
    """The trainer of a LightningModule, which knows the length of its run once that has begun."""

    def __init__(self, model: nn.Module) -> None:
        self._module = weakref.ref(model) if hasattr(model, "_trainer") else None

    def steps(self) -> int | None:
        """Return the optimizer steps of the whole run, if they are known; ask once."""
        if self._module is None:
            return None
        module, self._module = self._module(), None
        try:
            trainer: Any = module._trainer  # type: ignore[union-attr]
            kinds = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ())]
            if "GradientAccumulationScheduler" in kinds:  # Lightning's estimate leaves it out
                return None
            steps = float(trainer.estimated_stepping_batches)
        except Exception:  # there is no trainer, or it cannot tell
            return None
        return int(steps) if 0 < steps < math.inf else None

    def __getstate__(self) -> dict[str, Any]:
        return {"_module": None}  # a copy has another model


class FirstEpoch:
    """Counts the steps of an epoch, where Accelerate (or what is built on it) knows its end.

    Of a run that goes on somewhere it is the first whole epoch.
    """

    def __init__(self, planned: int | None) -> None:
        self.open = planned is not None
        self._planned = planned or 0
        self._begin: int | None = None
        self._inside = False

    def forget(self) -> None:
        """Begin anew, with the next whole epoch."""
        self._begin, self._inside = None, False

    def after_step(self, clock: int, skipped: int) -> int | None:
        """Return the length of the epoch once it has ended; it is looked at no more then."""
        if self._begin is None and clock == 1:
            self._begin = 0
        states = sys.modules.get("accelerate.state")
        if states is None or not states.GradientState._shared_state:  # no Accelerator was made
            self.open = False
        elif not (state := states.GradientState()).end_of_dataloader:
            self._inside = True
        elif not self._inside and _steps_of(state) > 1:
            pass  # the end of another loader, which somebody left there and which is still shown
        elif self._begin is not None:
            self.open = False
            return self._length(clock + skipped - self._begin, state)
        else:
            self._begin = clock + skipped
        return None

    def _length(self, taken: int, state: Any) -> int | None:
        """Return the steps taken, unless the loader has enough batches for those that were planned.

        Then a GradScaler has left out the missing ones, or batches are accumulated by hand.
        """
        enough = _steps_of(state) >= self._planned
        return None if taken < self._planned and enough else taken


def _steps_of(state: Any) -> int:
    """Return the steps in an epoch of the loader that Accelerate goes through; 0 if unknown."""
    try:
        batches = len(state.active_dataloader)
    except TypeError:  # over an IterableDataset, also where the loader has a `__len__`
        batches = 0
    steps: int = math.ceil(batches / state.num_steps)
    return steps


class ClippedElsewhere:
    """Recognises gradients that something clipped before: their norm stops at a round number.

    Clipping by norm divides by the norm and a little more, so that clipped norms differ from the
    limit and from each other in the last digits only, and none is above it. Norms that are equal to
    the last bit are those of a gradient that is constant.
    """

    #: relative distance from a round number: what 32 bits, and sums of many 16-bit numbers, leave
    near: ClassVar[float] = 1e-4

    def __init__(self) -> None:
        self._steps = 0
        self._largest: dict[int, float] = {}
        self._hits: dict[tuple[int, float], list[float]] = {}

    @property
    def open(self) -> bool:
        """Return whether norms are still looked at: clipping shows early, where norms are large."""
        return self._steps < _CLIP_STEPS

    def after_step(self, norms: list[float]) -> float | None:
        """Take the norms of all scopes in a step; return the limit if they were clipped to one."""
        self._steps += 1
        together = [math.hypot(*norms)] if len(norms) > 1 else []
        for place, norm in enumerate([*norms, *together]):
            self._largest[place] = max(norm, self._largest.get(place, 0.0))
            limit = float(f"{norm:.1e}") if norm else math.inf
            if abs(norm - limit) > self.near * limit:
                continue
            hits = self._hits.setdefault((place, limit), [])
            hits.append(norm)
            over = self._largest[place] > limit * (1 + 10 * self.near)
            if len(hits) >= _CLIP_HITS and len(set(hits)) > 1 and not over:
                self._steps = _CLIP_STEPS
                return limit
        return None


class Sample:
    """Some numbers of a parameter before an update, and where their gradient is not zero."""

    def __init__(self, batch: Batch, index: int) -> None:
        self.batch, self.index, self.param = batch, index, batch.params[index]
        self._before = self._some(self.param).clone()
        self._moves = self._some(batch.grads[index]) != 0

    @staticmethod
    def _some(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.detach().reshape(-1)
        return flat[:: max(1, flat.numel() // _NUMBERS)]

    def counts(self) -> list[torch.Tensor]:
        """Return how many numbers with a gradient are what they were, and how many have one."""
        same = (self._some(self.param) == self._before) & self._moves
        return [same.sum(), self._moves.sum()]


def count_processes() -> int:
    """Return how many processes train together."""
    return int(torch.distributed.get_world_size()) if is_distributed() else 1


def _rounds_to_nearest(resolved: Resolved) -> bool:
    """Return whether a rule of lamina's trains weights that are rounded to the nearest.

    They may get 16 bits after the build. Guests may keep the lost digits elsewhere.
    """
    return any(
        cell.algorithm is not None
        and cell.windows
        and cell.constants.get("rounding") in (None, "nearest")
        for cell in resolved.cells
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return not tensor.is_sparse and not is_dtensor(tensor)


def _alike(length: int, planned: int) -> bool:
    """Return whether a length is the planned one but for a few steps that were left out."""
    return abs(length - planned) <= max(1, planned // 10)


def _ratio(planned: int, length: int) -> str:
    return f"{planned / length:.3g} times as long"

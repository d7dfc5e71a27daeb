"""Records an optimizer under a plan while it steps: what was applied, and how far weights moved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._util.notices import is_first_process, warn
from .._util.numbers import is_number
from .._util.sharding import is_flattened
from .._util.tensors import is_dtensor
from .._util.text import agree
from ..algorithms.base import Batch
from ..errors import PlanError
from ..gradients.norms import each_norm, total
from .record import Record, RecordEvent
from .rows import Row, Rows
from .writers import Writer, writer_of

Tensors = Sequence[torch.Tensor]
#: what of the hyperparameters is recorded, as far as a group has it
_APPLIED = ("lr", "weight_decay")


class Recorder:
    """Records what an optimizer applies; made by `Optimizer.recorder`, ended by `close` or `with`.

    Of each group and step: `lr`, `weight_decay` and `clip`, the factor on its gradients. Of each
    `every`-th step too: `grad_norm` (before clipping), `weight_norm`, `update_norm` and their
    `ratio`. The norm of each clip scope is the metric `norm/<rule>`.
    """

    def __init__(
        self,
        writers: Sequence[Any],
        every: int,
        updates: bool,
        record: Record | None,
        detach: Callable[[Recorder], None],
        synchronize: Callable[[], None],
    ) -> None:
        if type(every) is not int or every < 1:
            raise PlanError(f"recorder was given every={every!r}; expected a whole number from 1.")
        self.every = every
        self._updates = updates
        self._record = Record() if record is None else record
        self._rows = Rows(self._emit)
        self._detach = detach
        self._synchronize = synchronize
        self._held: _Held | None = None
        #: the last row that was complete
        self.last: Row | None = None
        self._measuring: _Measuring | None = None
        self._step = 0
        self._told_of_parts = False
        # Norms of sharded tensors need every process; what comes of them one process writes.
        self._writers = [writer_of(given) for given in writers] if is_first_process() else []

    # --- for users -----------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """The record so far; reading it waits for numbers that are still on an accelerator."""
        self._synchronize()
        self._rows.flush()
        return self._record

    def metrics(self, **values: float | torch.Tensor) -> None:
        """Record numbers of the run as a whole for the last step, such as the loss.

        Args:
            **values: names, and numbers or scalar tensors, which are read later.
        """
        self._add(self._step, {}, values)

    def flush(self) -> None:
        """Read all numbers and write them out, which waits for an accelerator."""
        self._synchronize()
        self._rows.flush()

    def close(self) -> None:
        """Write out everything and record no more; a logger that was given stays open."""
        try:
            self._synchronize()
        finally:
            self._detach(self)
            self._rows.flush()
            for writer in self._writers:
                writer.close()
            self._writers.clear()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for the optimizer ---------------------------------------------------------------------

    def begin(
        self,
        step: int,
        params: Mapping[str, Tensors],
        grads: Mapping[str, Tensors],
        norms: Mapping[str, Tensors],
    ) -> None:
        """Note the weights before a step, if it is one of those that are measured.

        Args:
            step: its number.
            params: the parameters that train, by group.
            grads: their gradients before the gradient operations.
            norms: the norm of each of these, of the groups of which they are known.
        """
        self._measuring = None
        if step % self.every:
            return
        if any(is_flattened(param) for its in params.values() for param in its):
            self._tell_of_parts(step)
            return
        self._measuring = _Measuring(params, grads, norms, self._updates)

    def end(
        self,
        step: int,
        applied: Mapping[str, Mapping[str, Any]],
        scales: Mapping[str, torch.Tensor],
        norms: Mapping[str, torch.Tensor],
        held: bool = False,
    ) -> None:
        """Record a step that was taken.

        Args:
            step: its number.
            applied: the hyperparameters of every group.
            scales: the factor on the gradients, of the groups that have one.
            norms: the gradient norm of each clip scope.
            held: only an accelerator knows yet whether it was taken; `release` follows.
        """
        self._held = _Held(self._step) if held else None
        self._step = step
        rows: dict[str, dict[str, Any]] = {}
        for group, hyper in applied.items():
            rows[group] = {key: hyper[key] for key in _APPLIED if is_number(hyper.get(key))}
            if group in scales:
                rows[group]["clip"] = scales[group]
        if self._measuring is not None:
            for group, values in self._measuring.after().items():
                rows.setdefault(group, {}).update(values)
            self._measuring = None
        self._add(step, rows, {f"norm/{scope}": norm for scope, norm in norms.items()})

    def release(self, taken: bool) -> None:
        """Record what was held back; of a step that was not taken, only metrics given since."""
        held, self._held = self._held, None
        if held is None:
            return
        if not taken:  # as if it had never begun: metrics belong to the last step that was taken
            self._step = held.step_before
            held.rows = [(held.step_before, groups, its) for _, groups, its in held.rows[1:]]
        for row in held.rows:
            self._rows.add(*row)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics that were reported to the plan."""
        self._rows.add(step, {}, values)

    def event(self, event: RecordEvent) -> None:
        """Record an event."""
        self._rows.flush()  # in the order in which things happened
        self._record.event(event.step, event.kind, event.text, event.groups)
        for writer in tuple(self._writers):
            self._guarded(writer, writer.event, event)

    def _add(self, step: int, groups: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        if self._held is None:
            self._rows.add(step, groups, metrics)
        else:
            self._held.rows.append((step, groups, metrics))

    # --- parts ---------------------------------------------------------------------------------

    def _emit(self, row: Row) -> None:
        for values in row.groups.values():
            weight = values.get("weight_norm")
            if weight and "update_norm" in values:
                values["ratio"] = values["update_norm"] / weight
        for group, values in row.groups.items():
            self._record.add(row.step, group, **values)
        self._record.metrics(row.step, **row.metrics)
        self.last = row
        for writer in tuple(self._writers):
            self._guarded(writer, writer.write, row)

    def _guarded(self, writer: Writer, write: Callable[[Any], None], what: Any) -> None:
        """Let no logger that fails end a training run: it is told of and left out."""
        try:
            write(what)
        except Exception as error:
            self._writers.remove(writer)
            warn(
                f"the recorder writes no more to {type(writer).__name__}, which failed: "
                f"{type(error).__name__}: {error}. The training goes on."
            )

    def _tell_of_parts(self, step: int) -> None:
        if not self._told_of_parts:
            self._told_of_parts = True
            text = "FSDP1 gives each process a part of each tensor: no norms by group are measured"
            self.event(RecordEvent(step, "not-measured", text))


@dataclass(eq=False)
class _Held:
    """Rows of a step that may not have been taken; the first one is the step's own."""

    step_before: int
    rows: list[tuple[int, Mapping[str, Any], Mapping[str, Any]]] = field(default_factory=list)


class _Measuring:
    """The norms of one step: of gradients before it, of weights and their change after it."""

    def __init__(
        self,
        params: Mapping[str, Tensors],
        grads: Mapping[str, Tensors],
        norms: Mapping[str, Tensors],
        updates: bool,
    ) -> None:
        self._params = {name: list(its) for name, its in params.items()}
        self._grads = {
            name: norms[name] if name in norms else each_norm(its) for name, its in grads.items()
        }
        self._before: dict[str, list[torch.Tensor]] = {}
        if updates:
            self._before = {
                name: [param.detach().clone() for param in params]
                for name, params in self._params.items()
            }

    def after(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return the norms of each group as scalar tensors; nothing is read."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, params in self._params.items():
            its = found[name] = {}
            if self._grads.get(name):
                its["grad_norm"] = total(self._grads[name], 2.0)
            weights = [param.detach() for param in params]
            its["weight_norm"] = total(each_norm(weights), 2.0)
            if name in self._before:
                moved = _difference(weights, self._before[name])
                its["update_norm"] = total(each_norm(moved), 2.0)
        return found


def _difference(after: list[torch.Tensor], before: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return how far each tensor moved; the memory of `before` is used for it where it can be."""
    if any(map(is_dtensor, after)):
        return [new - old for new, old in zip(after, before, strict=True)]
    torch._foreach_sub_(before, after)  # of the other sign, which no norm sees
    return before


class Recorders:
    """The recorders of one optimizer; a copy of the optimizer has none."""

    def __init__(self) -> None:
        self._each: list[Recorder] = []
        #: whether there is anything to record for: an attribute, as every step asks
        self.on = False
        #: the norms of single gradients, by group, that were computed anyway in this step
        self.norms: dict[str, Tensors] = {}
        self._params: dict[str, Tensors] = {}
        self._grads: dict[str, Tensors] = {}
        self._scales: dict[str, torch.Tensor] = {}

    def add(
        self,
        writers: Sequence[Any],
        every: int,
        updates: bool,
        record: Record | None,
        synchronize: Callable[[], None],
    ) -> Recorder:
        """Return a new recorder that is told of each step from now on; arguments as there.

        `synchronize` is called before a record is read: it concludes a step that is pending.
        """
        recorder = Recorder(writers, every, updates, record, self._remove, synchronize)
        self._each.append(recorder)
        self.on = True
        return recorder

    def _remove(self, recorder: Recorder) -> None:
        if recorder in self._each:
            self._each.remove(recorder)
            self.on = bool(self._each)

    def collected(self, batches: Sequence[Batch]) -> None:
        """Note what trains in this step, and its gradients before any operation on them."""
        self._params = {batch.hyper["name"]: batch.params for batch in batches}
        self._grads = {batch.hyper["name"]: batch.grads for batch in batches}
        self.norms = {}

    def begin(self, step: int, batches: Sequence[Batch]) -> None:
        """Note the weights before the update."""
        rows = [(batch.hyper["name"], batch.scale) for batch in batches]
        self._scales = {name: scale for name, scale in rows if scale is not None}
        for recorder in self._each:
            recorder.begin(step, self._params, self._grads, self.norms)

    def begin_search(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note the weights before a line search, which asks for gradients several times."""
        params = {group["name"]: group["params"] for group in groups}
        self._scales = {}
        for recorder in self._each:
            recorder.begin(step, params, {}, {})

    def end(
        self,
        step: int,
        applied: Mapping[str, Mapping[str, Any]],
        norms: Mapping[str, torch.Tensor],
        held: bool = False,
    ) -> None:
        """Record a step that was taken, or of which only an accelerator knows it yet (`held`)."""
        for recorder in self._each:
            recorder.end(step, applied, self._scales, norms, held)
        self._params, self._grads, self._scales, self.norms = {}, {}, {}, {}

    def release(self, taken: bool) -> None:
        """Tell what became of a step that was held."""
        for recorder in self._each:
            recorder.release(taken)

    def windows(self, step: int, before: Sequence[Any], now: Sequence[Any], names: Any) -> None:
        """Record which groups thaw or freeze at a step."""
        kinds = (("thaw", True, "trains", "train"), ("freeze", False, "is frozen", "are frozen"))
        for kind, becomes, *verbs in kinds:
            rows = zip(names, before, now, strict=True)
            changed = tuple(name for name, old, new in rows if old != new and new == becomes)
            if changed:
                text = f"{', '.join(changed)} {agree(changed, *verbs)} from step {step} on"
                self.event(step, kind, text, changed)

    def event(self, step: int, kind: str, text: str, groups: tuple[str, ...] = ()) -> None:
        """Record an event."""
        for recorder in self._each:
            recorder.event(RecordEvent(step, kind, text, groups))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record what was reported."""
        for recorder in self._each:
            recorder.report(step, values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorders, ()

    def __deepcopy__(self, _: Any) -> Recorders:
        return Recorders()

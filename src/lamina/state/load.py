"""A saved state matched to the optimizer of a plan: everything is prepared, nothing changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .._util.sharding import is_flattened
from .._util.text import listed
from ..algorithms.registry import is_whole_vector, method_of, settings_of
from ..errors import StateError
from ..files.plain import check_values
from ..guests.guests import Guests
from ..guests.memory import OURS, Contents
from ..guests.packing import unpack
from ..model.parameters import ParamInfo
from ..optim.updates import initial_state
from ..resolve.resolved import Cell, Resolved
from ..resolve.timeline import Feedback, Values, values_at
from .compare import differences
from .entries import (
    another_rounding,
    belongs,
    check_shape,
    converted,
    copied,
    guest_entry,
    has_state,
    keeps_nothing,
    own_entry,
    whole_entry,
)
from .history import restore_history
from .lost import has_begun, refuse_lost
from .match import Matched, match
from .report import LoadReport
from .schema import Entry, Saved, number_of_steps, read, reading, short, stray


@dataclass(frozen=True)
class Loaded:
    """State ready to be put in place; `groups` holds values that guests keep in their groups.

    `guests` is what guests keep beside groups and the state of parameters. `feedback` are the
    overrides and what reactions have seen, `lost` in words those of them that fit nothing any
    more; `warning` what the user is told of the parameters, or "".
    """

    state: dict[torch.Tensor, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    guests: dict[torch.optim.Optimizer, Contents]
    clock: int
    feedback: Feedback
    lost: tuple[str, ...]
    warning: str
    report: LoadReport


def prepare(
    resolved: Resolved,
    live: Sequence[dict[str, Any]],
    guests: Guests,
    state_dict: Any,
    strict: bool = False,
    renamed: Mapping[str, str | None] | None = None,
) -> Loaded:
    """Match a saved state dict to an optimizer, without changing it.

    Args:
        resolved: the resolved plan of the optimizer.
        live: its parameter groups.
        guests: its third-party optimizers.
        state_dict: what was saved.
        strict: whether state that is missing or left over is an error.
        renamed: new names of parameters and modules by their saved ones.

    Raises:
        StateError: if it does not fit.
    """
    saved = read(state_dict)
    matched = match(saved, _as_now(resolved, live), renamed)
    clock, _ = clock_of(saved)
    feedback, lost = restore_history(saved, matched, resolved)
    values = values_at(resolved, clock, feedback)
    for scope in range(len(resolved.scopes)):
        values.operations(scope)  # a schedule that fails at the clock fails here
    fitting = _Fitting(dict(matched.entries), clock, feedback, guests)
    with reading("the saved state of the parameters"):
        if saved.by_fqn:
            refuse_lost(resolved, live, matched.entries, clock, feedback)
        if is_whole_vector(resolved.cells[0].optimizer):
            fitting.whole(resolved, live)
        else:
            for index, group in enumerate(live):
                fitting.cell(resolved.cells[index], group)
        _refuse_loose(saved, resolved)
        records = fitting.records(saved)
        place = live, fitting.state, fitting.groups
        contents = guests.read_memories(records, *place)
        guests.check_loaded(*place, contents, values.hyper)
    report = _report(saved, matched, resolved, fitting, values, lost)
    rows = _unexpected(report, {*matched.asked, *lost})
    if strict:
        _refuse_unexpected([*rows, ("that fits no rule", lost)])
    unused = clock == 0 and not any(entry.values for entry in saved.entries)
    # Saved before its first step, it has nothing of the parameters that it lists.
    told = _unexpected(report, {*matched.asked, *lost, *matched.entries}) if unused else rows
    prepared = (fitting.state, fitting.groups, contents, clock, feedback, lost)
    return Loaded(*prepared, _warning(told), report)


def _report(
    saved: Saved,
    matched: Matched,
    resolved: Resolved,
    fitting: _Fitting,
    values: Values,
    lost: Sequence[str],
) -> LoadReport:
    clock, clock_from = clock_of(saved)
    return LoadReport(
        kept=tuple(fitting.kept),
        new=tuple(fitting.new),
        restarted=tuple(fitting.restarted),
        renamed=tuple(matched.renamed),
        dropped=(*fitting.entries, *matched.asked, *fitting.left, *lost),
        hyperparameters=differences(saved, matched, resolved, clock, values),
        clock=clock,
        clock_from=clock_from,
        saved_run=saved.run,
        run=resolved.run,
        saved_planned=saved.settled_for,
        planned=resolved.settled_for,
        matched_by=matched.by,
        converted=tuple(fitting.converted),
        rounding=tuple(fitting.rounding),
    )


def in_order(resolved: Resolved) -> list[ParamInfo]:
    """Return every parameter once, in the order of the model."""
    infos = {info.name: info for cell in resolved.cells for info in cell.parameters}
    return [infos[name] for name in resolved.chains if name in infos]


def _as_now(resolved: Resolved, groups: Iterable[Mapping[str, Any]]) -> list[ParamInfo]:
    """Return every parameter once, in its shape of now: a weight may grow after build."""
    shapes = {
        info.name: tuple(param.shape)
        for cell, group in zip(resolved.cells, groups, strict=True)
        for info, param in zip(cell.parameters, group["params"], strict=True)
    }
    return [replace(info, shape=shapes[info.name]) for info in in_order(resolved)]


def clock_of(saved: Saved) -> tuple[int, str]:
    """Return the steps taken, and what tells: the clock, or the most updates of any parameter."""
    if saved.clock is not None:
        return saved.clock, "clock"
    entries = [entry.values or {} for entry in saved.entries]
    steps = [number_of_steps("a parameter", each["step"]) for each in entries if "step" in each]
    return (max(steps), "steps") if steps else (0, "nothing")


@dataclass
class _Fitting:
    """Takes the saved entries one by one; what is left in `entries` fits no parameter.

    `told` are the entries whose groups speak for guests, by their class.
    """

    entries: dict[str, Entry]
    clock: int
    feedback: Feedback
    guests: Guests
    state: dict[torch.Tensor, dict[str, Any]] = field(default_factory=dict)
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    converted: list[tuple[str, str, str]] = field(default_factory=list)
    rounding: list[tuple[str, str, str]] = field(default_factory=list)
    told: dict[type, Entry] = field(default_factory=dict)

    def cell(self, cell: Cell, group: Mapping[str, Any]) -> None:
        """Fit what was saved of the parameters of a cell."""
        own = cell.algorithm is not None
        told: Entry | None = None  # the entry whose group speaks for this one
        for info, param in zip(cell.parameters, group["params"], strict=True):
            entry = self.entries.pop(info.name, None)
            self.state[param] = initial_state(param) if own else self._guest_begun(info)
            if entry is None or (own and not entry.values):
                # Of parts of FSDP1, what was never updated is left out of a saved state.
                part = entry is not None and is_flattened(param) and "clock" in entry.group
                if entry is not None and (part or keeps_nothing(entry, cell)):
                    self.kept.append(info.name)
                elif has_begun(cell, self.clock, self.feedback):
                    self.new.append(info.name)
            elif has_state(entry) and not belongs(entry, cell):
                self.restarted.append(info.name)
            else:
                with reading(f"the saved state of {info.name!r}"):
                    self._keep(info, param, entry, cell, group)
                if told is None or not has_state(told):
                    told = entry
                elif not own:
                    _refuse_unlike_modes(cell, told, entry)
        if not own:  # what nothing was saved of begins anew
            first = self.guests.initial_groups[cell.name]
            keys = self.guests.own_keys(cell.name, first)
            saved = _carried(cell, group, told.group) if told else {}
            self.groups[cell.name] = {key: copied(first[key], None) for key in keys} | saved
            before = self.told.get(cell.optimizer)
            if told and (before is None or (has_state(told) and not has_state(before))):
                self.told[cell.optimizer] = told

    def records(self, saved: Saved) -> dict[type, Mapping[str, Any]]:
        """Return what was saved of guests beside groups and parameters, by their class."""
        found = {kind: dict(told.group.get("guest", {})) for kind, told in self.told.items()}
        if len(found) == 1:  # a state that the guest itself wrote
            [record] = found.values()
            for key, values in (("loose", saved.loose), ("own", saved.rest)):
                if values:
                    record.setdefault(key, values)
        return {kind: _checked(record) for kind, record in found.items()}

    def _guest_begun(self, info: ParamInfo) -> dict[str, Any]:
        """Return the state that a guest gave a parameter when it was built: mostly none."""
        values = self.guests.initial.get(info.name, {})
        return {key: copied(value, None) for key, value in values.items()}

    def _keep(
        self,
        info: ParamInfo,
        param: torch.Tensor,
        entry: Entry,
        cell: Cell,
        group: Mapping[str, Any],
    ) -> None:
        # Which may have changed since build, and be that of a part, of FSDP1.
        info = replace(info, shape=tuple(param.shape))
        if entry.shape is not None and has_state(entry):
            check_shape(info, "state", entry.shape)
        if cell.algorithm is None:
            check_values(entry.values, f"the saved state of {info.name!r}")
            fitted = guest_entry(param, entry)
            if fitted:
                self.guests.read(group, param, fitted)
                self.state[param] = fitted
        else:
            self.state[param], left = own_entry(info, param, entry, cell)
            self.left += [f"{key} of {info.name}" for key in left]
            self.converted += converted(info.name, entry, self.state[param])
            self.rounding += another_rounding(info.name, entry, param, cell)
        self.kept.append(info.name)

    def whole(self, resolved: Resolved, groups: Iterable[Mapping[str, Any]]) -> None:
        """Fit the memory of L-BFGS, which is of all parameters in one order."""
        infos = [info for cell in resolved.cells for info in cell.parameters]
        params = [param for group in groups for param in group["params"]]
        self.state = {param: initial_state(param) for param in params}
        names = [info.name for info in infos]
        saved = dict(self.entries)
        known = [name for name in names if self.entries.pop(name, None) is not None]
        memory = next((e for e in saved.values() if e.values and len(e.values) > 1), None)
        alike = list(saved) == names
        if memory is not None and memory.values and alike and belongs(memory, resolved.cells[0]):
            self.state[params[0]] = whole_entry(infos, params[0], memory.values)
        elif any(map(has_state, saved.values())):
            self.restarted, known = known, []
        self.kept = known
        self.new = [name for name in names if name not in saved]


def _carried(cell: Cell, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a guest keeps in its group: neither a setting of its constructor nor ours."""
    record = saved.get("guest", {})
    if isinstance(record, Mapping) and "keys" in record:
        keys = {*record["keys"]} & saved.keys()
    else:  # the guest's own state, to which schedulers may have added
        keys = saved.keys() - (_SCHEDULERS - group.keys())
    keys -= OURS | settings_of(cell.optimizer) | dict(cell.hyper).keys()
    check_values([saved[key] for key in keys], f"the saved group {cell.name!r}")
    return {key: unpack(copied(saved[key], None)) for key in keys}


#: what schedulers of torch put into groups
_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


def _checked(record: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("loose", "attributes", "own"):
        if not isinstance(record.get(key, {}), Mapping):
            raise StateError(
                f"the saved {key} of a guest is {short(record[key])}; expected a dict."
            )
    return record


def _refuse_loose(saved: Saved, resolved: Resolved) -> None:
    """Raise `StateError` for entries of no parameter, unless they are those of the only guest."""
    guests = {cell.optimizer for cell in resolved.cells if method_of(cell.optimizer) is None}
    if saved.loose and len(guests) != 1:
        raise stray(next(iter(saved.loose)), len(saved.entries))


def _refuse_unlike_modes(cell: Cell, one: Entry, other: Entry) -> None:
    """Raise if a group would join weights of a schedule-free guest that lie in different modes.

    What is frozen stays in the mode in which it froze, and the guest keeps one mode for a group.
    """
    modes = [entry.group.get("train_mode") for entry in (one, other) if has_state(entry)]
    if len(modes) == 2 and modes[0] != modes[1]:
        raise StateError(
            f"group {cell.name!r} joins parameters whose groups were saved in different modes: "
            f"some in training mode, as they froze, others after optimizer.eval(). Nothing was "
            "loaded. Load with the plan of that run, call optimizer.train(), save, and load that."
        )


def _unexpected(report: LoadReport, asked: set[str]) -> list[tuple[str, list[str]]]:
    """List what was not restored as it was, but for what was asked for."""
    rows = [
        ("not in the state", [name for name in report.new if name not in asked]),
        ("of another optimizer", list(report.restarted)),
        ("not in the model or the plan", [name for name in report.dropped if name not in asked]),
    ]
    return [(what, names) for what, names in rows if names]


def _warning(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """Return the one warning about state that does not fit, or ""."""
    if not rows:
        return ""
    told = "; ".join(f"{what}: {listed(names)}" for what, names in rows)
    return (
        f"the saved state was loaded, but does not fit all parameters ({told}). Those that are not "
        "in it, or whose state was another optimizer's, begin anew; optimizer.last_load lists all. "
        "If only names have changed, load with renamed=; strict=True makes this an error."
    )


def _refuse_unexpected(rows: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Raise `StateError` with every row about state that was not taken over as it was."""
    told = [f"{what}: {listed(names, 10)}" for what, names in rows if names]
    if told:
        raise StateError(
            f"strict=True, but the state does not match ({'; '.join(told)}); nothing was loaded. "
            "Rename with renamed=, or load with strict=False and read optimizer.last_load."
        )

"""State in and out of an optimizer under a plan: loading, torch's form, room for a checkpoint."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch

from .._util.notices import warn
from .._util.sharding import is_flattened
from ..algorithms.base import state_dtype_of
from ..algorithms.registry import is_whole_vector, optimizer_name
from ..errors import StateError
from ..guests.memory import OURS
from ..model.ties import Watched
from ..optim.run_state import RunState
from ..resolve.resolved import NEVER
from ..runtime.audit import Audit
from ..runtime.gradient_tracker import GradientTracker
from ..state import Loaded, prepare
from ..state.entries import evaluations
from ..state.history import KEYS, written
from ..state.report import few
from ..state.schema import MOMENTUM
from .steering import Steerable

log = logging.getLogger("lamina")


class Restorable(Steerable):
    """An optimizer under a plan whose state can be saved and loaded."""

    _audit: Audit
    _received: GradientTracker
    _ties: Watched
    _run_state: RunState

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's shape, with what a plan needs to go on in the groups.

        Tensors and plain values only; the tensors are the live ones, not copies.
        """
        self._follow_model()
        state = super().state_dict()
        if any(is_flattened(param) for group in self.param_groups for param in group["params"]):
            # FSDP1 puts states of a flat parameter together only if those it finds are alike.
            entries = state["state"].items()
            state["state"] = {n: entry for n, entry in entries if not _never_updated(entry)}
        for group in state["param_groups"]:
            group.update({key: written(group[key]) for key in KEYS if key in group})
            for key in ("param_names", "run", "planned"):
                group[key] = deepcopy(group[key])
        for saved, group in zip(state["param_groups"], self.param_groups, strict=True):
            saved["param_shapes"] = [list(param.shape) for param in group["params"]]
        self._guests.write(state["param_groups"], state["state"])
        return state

    def load_state_dict(
        self,
        state_dict: dict[str, Any],
        *,
        strict: bool = False,
        renamed: Mapping[str, str | None] | None = None,
    ) -> None:
        """Take over the state of a saved optimizer, by parameter name and shape.

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
        self._restore(state_dict, strict, renamed)
        report = self._run_state.last_load
        jumps = report.jumps if report else ()
        if jumps:
            log.warning(
                "the state's schedules fit a run of another length, and the plan's are used: "
                "%s. To choose how the run goes on, build with resume=state and extend='hold' or "
                "'stretch'.",
                few(jumps),
            )

    def _restore(
        self,
        state_dict: Any,
        strict: bool = False,
        renamed: Mapping[str, str | None] | None = None,
    ) -> None:
        self._follow_model()
        if isinstance(state_dict, Mapping):
            state_dict = dict(state_dict)  # what a hook changes is not the caller's
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        loaded = prepare(self, state_dict, strict, renamed)  # type: ignore[arg-type]
        self._ties.warn()
        if loaded.warning:  # before anything is changed: warnings may be errors
            warn(loaded.warning)
        self._put(loaded)
        if loaded.lost:
            log.warning(
                "the state holds what fits no group or rule of the plan any more, and it is lost: "
                "%s. Call override again where it is still meant.",
                few(loaded.lost),
            )
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _put(self, loaded: Loaded) -> None:
        """Exchange the state; nothing in here can fail."""
        self.state.update(loaded.state)
        self._kept_batches.clear()  # kept batches hold the old tensors
        for group in self.param_groups:
            group["overrides"] = loaded.lived.overrides.get(group["name"], [])
            group["feedback"] = loaded.lived.seen
        self._guests.put(self.param_groups, loaded.groups, loaded.guests)
        self._audit.forget()
        self._received.begin(loaded.clock)
        self._monitor.loaded()
        self._publish(loaded.clock)
        self._run_state.last_load = loaded.report

    def torch_state_dict(self) -> dict[str, Any]:
        """The state in the form that torch's optimizer of the same name loads.

        Without what only a plan reads, and without entries for parameters that were never updated,
        whose state torch allocates itself. torch matches by position: build its optimizer over
        `[{"params": group["params"]} for group in optimizer.param_groups]`.

        Raises:
            StateError: if the plan uses several optimizers; torch's can be only one.
        """
        kinds = list(dict.fromkeys(cell.optimizer for cell in self._resolved.cells))
        if len(kinds) > 1:
            raise StateError(
                f"the plan uses {' and '.join(map(optimizer_name, kinds))}; torch's optimizers are "
                "of one kind, so that none can load this state."
            )
        state = self.state_dict()
        ours = OURS - {"params", "param_names"}
        groups = [
            {key: value for key, value in group.items() if key not in ours}
            for group in state["param_groups"]
        ]
        rest = self._guests.restore_form(groups, state)
        own: set[str] = set()
        if is_whole_vector(kinds[0]):  # torch's keeps no count, and writes its default out
            own = {"step", "places"}
            for group in groups:
                group["max_eval"] = evaluations(group)
        entries = {
            index: entry
            if isinstance(index, str)
            else {key: value for key, value in entry.items() if key not in own}
            for index, entry in state["state"].items()
            if isinstance(index, str) or entry.keys() - {"step"}
        }
        return {"state": entries, "param_groups": groups, **rest}

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
        groups, active = self.param_groups, list(self._freezer.active)
        given: list[tuple[int, torch.Tensor, bool]] = []
        added: list[tuple[torch.Tensor, dict[str, Any], list[str]]] = []
        try:
            for place, (cell, group) in enumerate(zip(self._resolved.cells, groups, strict=True)):
                for param in group["params"] if cell.windows != NEVER else ():
                    given.append((place, param, param.requires_grad))
                    param.requires_grad_(True)
                    if cell.algorithm is not None:
                        before = set(self.state[param])
                        self._make_room(param, group)
                        new = [*self.state[param].keys() - before]
                        added.append((param, self.state[param], new))
            yield
        finally:
            for place, param, flag in given:
                if self._freezer.active[place] == active[place]:  # else the load has set it
                    param.requires_grad_(flag)
            for param, entry, keys in added:
                if self.state[param] is entry:
                    for key in keys:
                        del entry[key]

    def _make_room(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        algorithm, entry = self.algorithm_for(group), self.state[param]
        self._ensure_state(algorithm, param, entry, group)
        # Whatever the momentum is now: a schedule or an override may have given it another value.
        if MOMENTUM in algorithm.buffers and MOMENTUM not in entry:
            entry[MOMENTUM] = torch.full_like(param, math.nan, dtype=state_dtype_of(param, group))

    def _drop_states(self, before: Sequence[bool | None]) -> None:
        """Release the state of what froze now, or was loaded frozen, where the plan says so."""
        rows = zip(
            self._resolved.cells, self.param_groups, before, self._freezer.active, strict=True
        )
        for cell, group, was, now in rows:
            if now or cell.frozen_state == "keep":
                continue
            # Loaded state may come from a plan that keeps it.
            if was or any(len(self.state.get(param, ())) > 1 for param in group["params"]):
                self._drop_state(group)

    def _initial_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        # Guests make their state themselves, where they find an empty one.
        return {} if group["name"] in self._guests else super()._initial_state(group, param)


def _never_updated(entry: Mapping[str, Any]) -> bool:
    """Whether an entry says no more than that a parameter was never updated."""
    return entry.keys() == {"step"} and not float(entry["step"])

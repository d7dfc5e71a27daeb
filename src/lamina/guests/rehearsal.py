"""Try a third-party optimizer on small tensors: can it step, save and resume?

The trial goes through what a real run does: groups that rest and thaw later, a save that
`torch.load(weights_only=True)` reads, a load into a fresh build. It leaves no trace: no warnings,
no output, and the random numbers of the run are not used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..algorithms.registry import settings_of
from ..algorithms.trial import RecordingGroup, into_training, over, quietly, seed, trial_of
from ..errors import StateError, did_you_mean
from ..resolve.resolved import Cell
from .memory import ABSENT, OURS, GuestMemory, plain_form
from .packing import UnwritableError, pack, unpack

#: steps before the save, and in all; what rests at first thaws in between, and after it
_SAVED, _STEPS = 2, 5
_THAW = 3
#: groups that are tried, and the longest side of their small tensors
_GROUPS, _SIDE = 4, 6

Values = Mapping[str, Any]


def construct(
    optimizer: type[torch.optim.Optimizer],
    values: Sequence[Values],
    params: Sequence[Sequence[torch.Tensor]],
) -> torch.optim.Optimizer:
    """Build a guest as one would by hand: arguments of the first group, the rest by group.

    What is a default of the class is left to the class.

    Args:
        optimizer: the class.
        values: the hyperparameters of each group.
        params: the parameters of each group.
    """
    known, made = settings_of(optimizer), trial_of(optimizer).made or {}
    given = [{k: v for k, v in each.items() if k not in made or made[k] != v} for each in values]
    common = {k: v for k, v in given[0].items() if k in known}
    # A value that is left to the class elsewhere must be spelled where it is the default.
    spelled = [
        {k for k, v in each.items() if k not in known or v != common.get(k, made.get(k, v))}
        for each in values
    ]

    def build() -> torch.optim.Optimizer:
        groups = [
            RecordingGroup(params=list(chosen), **{key: each[key] for key in keys})
            for each, chosen, keys in zip(values, params, spelled, strict=True)
        ]
        return over(groups, optimizer, common)

    guest = build()
    missed = [
        {key for key in each.keys() & group.keys() if not alike(each[key], group[key])}
        for each, group in zip(values, guest.param_groups, strict=False)
    ]
    # Some have another default for groups of another kind: there the plan's value is spelled too.
    # A value that every group has otherwise is one that the constructor makes another of.
    left = [set(each) - own for each, own in zip(values, spelled, strict=True)]
    kept = set().union(*(keys - miss for keys, miss in zip(left, missed, strict=False)))
    kept &= set().union(*missed)
    if not kept or len(missed) != len(values):
        return guest
    spelled = [one | (other & kept) for one, other in zip(spelled, missed, strict=True)]
    return build()


def alike(given: Any, made: Any) -> bool:
    """Return whether a group holds a value of the plan, perhaps as a list or in a tensor."""
    if isinstance(made, torch.Tensor) and made.numel() == 1 and isinstance(given, (int, float)):
        made, given = made.item(), torch.tensor(given, dtype=made.dtype).item()
    if isinstance(made, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(made) == len(given) and all(map(alike, given, made))
    return made is given or bool(made == given)


@dataclass(frozen=True)
class _Play:
    """What is tried: a class, its cells, their first values, and small tensors for each."""

    optimizer: type[torch.optim.Optimizer]
    cells: Sequence[Cell]
    values: Sequence[Values]
    likes: Sequence[Sequence[torch.Tensor]]

    def params(self) -> list[list[torch.nn.Parameter]]:
        """Return new parameters, with the same numbers at every call."""
        seed(0)
        return [
            [torch.nn.Parameter(torch.randn_like(like) * 0.5) for like in row] for row in self.likes
        ]


class _Stage:
    """A guest over small tensors, stepped by hand."""

    def __init__(self, play: _Play, params: Sequence[Sequence[torch.nn.Parameter]]) -> None:
        self.params = params
        self.guest = construct(play.optimizer, play.values, params)
        self.groups = self.guest.param_groups
        self.late = [not (c.windows and c.windows[0][0] == 0) for c in play.cells]
        if all(self.late):  # a guest whose parts all rest is not stepped
            self.late = [False] * len(self.late)
        self._tensors = [
            {k: v for k, v in group.items() if k in own and isinstance(v, torch.Tensor)}
            for group, own in zip(self.groups, play.values, strict=True)
        ]
        self._settings = settings_of(play.optimizer).union(*play.values)
        self.values = play.values
        self._initial_state = [dict(group) for group in self.groups]
        self.memory = GuestMemory(self.guest)

    def step(self, number: int, *, graph: bool, all_train: bool = False) -> None:
        """Take a step with gradients that depend on the weights, as a loss would give them."""
        seed(number)
        training: list[torch.nn.Parameter] = []
        for index, params in enumerate(self.params):
            rests = self.late[index] and number < _THAW and not all_train
            training += [] if rests else params
            self._publish(index, rests)
        with torch.enable_grad():
            terms = [(p * torch.randn_like(p) - 0.3).abs().square().sum() for p in training]
            loss = sum(terms, torch.zeros((), device=training[0].device))
            grads = torch.autograd.grad(loss, training, create_graph=graph)
        for params in self.params:
            for param in params:
                param.grad = None
        for param, grad in zip(training, grads, strict=True):
            param.grad = grad
        into_training(self.guest)
        with torch.no_grad(), self.memory.at_work(self.guest.state):
            self.guest.step()

    def _publish(self, index: int, rests: bool) -> None:
        """Write the plan's values into a group, as a run does before each step."""
        group, tensors = self.groups[index], self._tensors[index]
        for key in self.values[index].keys() & group.keys() - tensors.keys():
            group[key] = self.values[index][key]
        if rests and "lr" in group and "lr" not in tensors:
            group["lr"] = 0.0

    def saved(self) -> Any:
        """Return what a checkpoint would hold of it, written to a file and read back."""
        groups = [
            {k: pack(v) for k, v in group.items() if self._is_own(k, v, begun)}
            for group, begun in zip(self.groups, self._initial_state, strict=True)
        ]
        entries = [[pack(dict(self.guest.state.get(p, {}))) for p in row] for row in self.params]
        content = {"groups": groups, "state": entries, "memory": self.memory.write(self.guest)}
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def _is_own(self, key: str, value: Any, begun: Mapping[str, Any]) -> bool:
        """Return whether a value of a group is state, and not what every build puts there."""
        constant = plain_form(value) is ABSENT and begun.get(key) is value
        return key not in OURS | self._settings and not constant

    def load(self, saved: Any) -> None:
        """Go on from what another stage saved."""
        for group, own, params, entries in zip(
            self.groups, saved["groups"], self.params, saved["state"], strict=True
        ):
            group.update(unpack(own))
            for param, entry in zip(params, entries, strict=True):
                self.guest.state[param] = unpack(entry)
        contents = self.memory.read(self.guest, saved["memory"], self.groups, self.guest.state)
        self.memory.put(self.guest, contents)

    def weights(self) -> list[torch.Tensor]:
        """Return the values of all parameters."""
        return [param.detach() for params in self.params for param in params]


_verdicts: WeakKeyDictionary[type, dict[Any, str]] = WeakKeyDictionary()


def rehearse(
    optimizer: type[torch.optim.Optimizer],
    cells: Sequence[Cell],
    values: Sequence[Values],
    params: Sequence[Sequence[torch.Tensor]],
) -> str:
    """Return why a guest is refused, in words that follow "the third-party optimizer X"; or "".

    Args:
        optimizer: its class.
        cells: its cells.
        values: the first values of each cell.
        params: the parameters of each cell, for their shapes, dtype and device.

    Returns:
        "" also where it cannot be tried: on the meta device, or if it does not take small tensors.
    """
    likes = [_likes(each) for each in params]
    if not all(likes) or any(p.is_meta for each in likes for p in each):
        return ""
    chosen = _chosen(cells, values, likes)
    key = repr([(sorted(values[i].items()), _shapes(likes[i]), cells[i].windows) for i in chosen])
    known = _verdicts.setdefault(optimizer, {})
    if key not in known:
        rows: Any = [[row[i] for i in chosen] for row in (cells, values, likes)]
        with quietly(likes[0][0].device):
            known[key] = _verdict(_Play(optimizer, *rows))
    return known[key]


def _chosen(cells: Sequence[Cell], values: Sequence[Values], likes: Any) -> list[int]:
    """Return a few groups that stand for all: different windows, keys and kinds of parameters."""
    found: dict[Any, int] = {}
    for index, cell in enumerate(cells):
        late = bool(cell.windows) and cell.windows[0][0] == 0
        found.setdefault((late, frozenset(values[index]), _shapes(likes[index])), index)
    return sorted(found.values())[:_GROUPS]


def _shapes(params: Sequence[torch.Tensor]) -> str:
    return repr([(tuple(p.shape), p.dtype, p.device) for p in params])


def _likes(params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a small tensor for each number of dimensions and dtype in a group."""
    found: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    for param in params:
        shape = [min(side, _SIDE - place) for place, side in enumerate(param.shape)]
        if 0 not in shape and (param.is_floating_point() or param.is_complex()):
            small = torch.empty(shape, dtype=param.dtype, device=param.device)
            found.setdefault((param.ndim, param.dtype), small)
    return list(found.values())


def _verdict(play: _Play) -> str:
    """Run the trial; see `rehearse`."""
    for graph in (False, True):  # second-order optimizers need a graph of the gradients
        stage = _Stage(play, play.params())
        failure = _failure(stage, range(_STEPS), graph)
        if not failure:
            break
    else:
        return _why(play, failure)
    first = _Stage(play, play.params())
    for number in range(_SAVED):
        first.step(number, graph=graph)
    try:
        saved = first.saved()
        weights = [[torch.nn.Parameter(p.detach().clone()) for p in row] for row in first.params]
        second = _Stage(play, weights)
        second.load(saved)
    except UnwritableError as error:
        return f"cannot be saved: it keeps {error} in its state, which a checkpoint cannot hold."
    except StateError as error:
        return f"cannot be saved and loaded: {error}"
    except Exception as error:
        return f"cannot be saved and loaded ({_in_a_line(error)})."
    failure = _failure(second, range(_SAVED, _STEPS), graph)
    if failure:
        return f"cannot be resumed: after a save and a load, its step fails ({failure})."
    pairs = zip(stage.weights(), second.weights(), strict=True)
    unread = _unread(play.optimizer, stage)
    if unread:
        known = [*settings_of(play.optimizer), *(trial_of(play.optimizer).read or ())]
        return f"neither takes nor reads a setting {unread!r}.{did_you_mean(unread, known)}"
    if not all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in pairs):
        return (
            "cannot be resumed: after a save and a load into a fresh build, its steps are others "
            "than without. It keeps state where neither its groups, its state_dict nor plain "
            "attributes hold it."
        )
    return ""


def _unread(optimizer: type[torch.optim.Optimizer], stage: _Stage) -> str:
    """Return a setting that was put into a group, and that nothing looked for there; "" if none."""
    known = settings_of(optimizer).union(trial_of(optimizer).made or ())
    for group, own in zip(stage.groups, stage.values, strict=True):
        if isinstance(group, RecordingGroup):
            for key in own.keys() - known - group.read:
                return key
    return ""


def _in_a_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"


def _failure(stage: _Stage, steps: range, graph: bool, all_train: bool = False) -> str:
    """Describe how a step failed; "" if none did."""
    try:
        for number in steps:
            stage.step(number, graph=graph, all_train=all_train)
    except Exception as error:
        return _in_a_line(error)
    return ""


def _why(play: _Play, failure: str) -> str:
    """Describe why a trial failed; "" if only its tensors may have been too small."""
    stage = _Stage(play, play.params())
    if any(stage.late) and not _failure(stage, range(_STEPS), False, all_train=True):
        return (
            f"fails where a part of its groups has no gradients ({failure}): train all its "
            "parameters from the first step, without thaw=, freeze= or frozen=."
        )
    guest: Any = construct(play.optimizer, play.values, play.params())
    for group in guest.param_groups:
        for param in group["params"]:
            param.grad = torch.full_like(param, 0.1)
    try:
        into_training(guest)
        guest.step(lambda: torch.tensor(0.5))
    except Exception:
        return ""
    return (
        f"needs a closure in every step (without: {failure}), which a plan evaluates before its "
        "optimizers step: use it without a plan."
    )


def steps_with(
    guest: torch.optim.Optimizer,
    group: Mapping[str, Any],
    param: torch.Tensor,
    entry: Mapping[str, Any],
) -> str:
    """Return how a guest fails in a step with some state of one parameter; "" if it does not.

    Args:
        guest: a copy of the guest, which is used up.
        group: the parameter's group.
        param: the parameter, which is not changed.
        entry: its state, which is not changed.
    """
    small = torch.nn.Parameter(param.detach().clone())
    loose = {k: v for k, v in guest.state.items() if not isinstance(k, torch.Tensor)}
    with quietly(param.device):
        guest.param_groups = [{**deepcopy(dict(group)), "params": [small]}]
        guest.state.clear()
        guest.state.update({**deepcopy(loose), small: deepcopy(dict(entry))})
        shapes = _tensor_shapes(guest.state[small])
        try:
            with torch.no_grad():
                into_training(guest)
                small.grad = torch.full_like(small, 1e-3)
                type(guest).step(guest)
        except Exception as error:
            return _in_a_line(error)
        if bool(param.isfinite().all()) and not bool(small.isfinite().all()):
            return "it makes the weights infinite or NaN"
        after = _tensor_shapes(guest.state[small])
    changed = [key for key, shape in shapes.items() if after.get(key, shape) != shape]
    return f"it changes the shape of its {changed[0]}" if changed else ""


def _tensor_shapes(entry: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in entry.items() if isinstance(v, torch.Tensor)}

"""One forward pass: which of its calls are made, replayed or put off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_leaves

from .boundaries import Stage
from .copies import version_of
from .keys import Inputs, autocast_of
from .lazy import LazyTensor, TensorForm, real
from .lineage import ROOT_KEY, UNBATCHED, child_key, tensors_in
from .profile import Profile
from .shelf import OutputForm
from .store import Place


class Owner(Protocol):
    """What a pass asks of the session that it belongs to."""

    counts: dict[str, int]
    forms: dict[Place, OutputForm]
    device: str

    def begin(self, current: Pass) -> Plan | None:
        """Return what a pass may leave out; None if everything must run."""

    def keep(self, current: Pass, key: str, output: Any) -> None:
        """Store what a call returned."""

    def replay(self, current: Pass, key: str) -> list[torch.Tensor] | None:
        """Return stored outputs of a call for the examples of a pass."""

    def is_examined(self) -> bool:
        """Return whether a call is made although it could be replayed, to compare."""

    def compare(self, current: Pass, key: str, output: Any, stored: list[torch.Tensor]) -> None:
        """Compare what a call returned with what is stored."""


@dataclass
class Frame:
    """A call that is going on: its key, and how often each module was called in it."""

    key: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Plan:
    """What a pass does in one profile at one stage.

    `stored` are the keys of the calls that are kept. `keyed` has all that are kept or left out,
    with the modes of what each consists of and of what is called before it.
    """

    profile: Profile
    stage: Stage
    stored: frozenset[str]
    keyed: Mapping[str, str]


class Deferred:
    """A call that was left out, and is made if something looks at its outputs."""

    def __init__(self, make: Callable[[], Any], device: str, inputs: Sequence[torch.Tensor]):
        self._make = make
        self._device = device
        self._grad = torch.is_grad_enabled()
        self._autocast = autocast_of(device)
        self._inputs = [(tensor, version_of(tensor)) for tensor in inputs]
        self._tensors: list[torch.Tensor] | None = None

    def tensor(self, place: int) -> torch.Tensor:
        """Return an output tensor by its place, computed as it would have been then."""
        if self._tensors is None:
            if any(version_of(tensor) != version for tensor, version in self._inputs):
                raise RuntimeError(
                    "lamina.reuse left out a call whose output is used after its input was changed "
                    "in place. Train this model without reuse."
                )
            enabled, dtype = self._autocast
            with (
                torch.set_grad_enabled(self._grad),
                torch.autocast(self._device, dtype=dtype, enabled=enabled),
            ):
                self._tensors = tensors_in(self._make())
        return self._tensors[place]


class Pass:
    """One forward pass of the model.

    Args:
        owner: whose passes these are.
        args: of the pass.
        kwargs: of the pass.
    """

    def __init__(self, owner: Owner, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.owner = owner
        self.given = (args, kwargs)
        self.stack = [Frame(ROOT_KEY)]
        self.decisions: list[str] = []
        self.plan: Plan | None = None
        self.begun = False
        self.inputs: Inputs
        self.context = ""
        self.layout = ""
        self.unbatched = ""
        self.examples: list[bytes] = []
        self._places: dict[str, Place] = {}
        self._own_work = False

    def on_read(self, tensors: list[torch.Tensor], result: Any) -> None:
        """Remember what Python saw: what is computed from now on may follow from it."""
        if not self._own_work:
            array = hasattr(result, "tobytes")
            text = hashlib.blake2b(result.tobytes()).hexdigest() if array else repr(result)
            self.decisions.append(text)

    def call(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call of a module, or do what has the same effect on the pass."""
        if not self.begun:
            self.begun = True
            with self._working():
                self.plan = self.owner.begin(self)
        if self.plan is None:
            return original(*args, **kwargs)
        frame = self.stack[-1]
        key = child_key(frame.key, path, frame.counts)
        stage = self.plan.stage
        if key in stage.handed_on:
            given = tensors_in((args, kwargs))
            place = stage.handed_on[key]
            if place < len(given) and isinstance(given[place], LazyTensor):
                return given[place]
        if key in self.plan.keyed:
            self._note_arguments(key, args, kwargs)
        if key in stage.needed:
            return self._replay(key, original, args, kwargs)
        if key in stage.skipped:
            return self._defer(key, original, args, kwargs)
        return self.run(key, original, args, kwargs)

    def run(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call, and store what it returns if that is wanted."""
        assert self.plan is not None
        self.stack.append(Frame(key))
        try:
            output = original(*args, **kwargs)
        finally:
            self.stack.pop()
        if key in self.plan.stored:
            with self._working():
                self.owner.keep(self, key, output)
        return output

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Take no notice of the values that are read inside, which decide nothing in the model."""
        self._own_work = True
        try:
            yield
        finally:
            self._own_work = False

    def place(self, key: str) -> Place:
        """Return where the outputs of a call are stored: what it was given is part of it."""
        return self._places[key]

    def _note_arguments(self, key: str, args: Any, kwargs: Any) -> None:
        assert self.plan is not None
        leaves = tree_leaves((args, kwargs))
        given = [
            tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves
        ]
        text = f"{self.layout}{self.plan.keyed[key]}{given}{list(kwargs)}{self.decisions}"
        if self.plan.profile.depends(key) & UNBATCHED:
            text += self.unbatched
        self._places[key] = key, hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _replay(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._working():
            tensors = self.owner.replay(self, key)
        if tensors is None:
            return self._compute(key, original, args, kwargs)
        self.owner.counts["replayed"] += 1
        if self.owner.is_examined():
            args, kwargs = real((args, kwargs))
            self.owner.compare(self, key, self.run(key, original, args, kwargs), tensors)
        return self.owner.forms[self.place(key)].filled(tensors)

    def _compute(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = real((args, kwargs))
        output = self.run(key, original, args, kwargs)
        self.owner.forms[self.place(key)] = OutputForm.of(output, [])
        return output

    def _defer(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        form = self.owner.forms.get(self.place(key))
        if form is None or not form.is_plain:
            return self._compute(key, original, args, kwargs)
        self.owner.counts["skipped"] += 1
        given = [one for one in tensors_in((args, kwargs)) if not isinstance(one, LazyTensor)]

        def make() -> Any:
            self.owner.counts["skipped"] -= 1
            return self._compute(key, original, args, kwargs)

        deferred = Deferred(make, self.owner.device, given)
        tensors = [_lazy(deferred, place, each) for place, each in enumerate(form.tensors)]
        return form.filled(tensors)


def _lazy(deferred: Deferred, place: int, form: TensorForm) -> LazyTensor:
    return LazyTensor(form, lambda: deferred.tensor(place))

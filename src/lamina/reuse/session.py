"""Reuse of what is frozen: the passes of one model, and what is stored of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .._util.notices import Notices
from .boundaries import Stage
from .copies import Stub, own_forward
from .frozen import FrozenWatch
from .keys import Inputs, UnhashableInputError, autocast_of, context_of, device_type, modes_of
from .lazy import LazyTensor, TensorForm, real
from .lineage import ROOT_KEY, ReadWatch, child_key, tensors_in
from .profile import Profile, mixed, same_bits
from .shelf import OutputForm, Shelf
from .store import Store


@dataclass
class Frame:
    """A call that is going on: its key, and how often each module was called in it."""

    key: str
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Plan:
    """What a pass does in one profile at one stage.

    `stored` are the keys of the calls that are kept; `modes` are the modes of what each of them
    consists of and of what is called before it.
    """

    profile: Profile
    stage: Stage
    stored: frozenset[str]
    modes: Mapping[str, str]


class Deferred:
    """A call that was left out, and is made if something looks at its outputs."""

    def __init__(self, make: Callable[[], Any], device: str, inputs: Sequence[torch.Tensor]):
        self._make = make
        self._device = device
        self._grad = torch.is_grad_enabled()
        self._autocast = autocast_of(device)
        self._inputs = [(tensor, tensor._version) for tensor in inputs]
        self._tensors: list[torch.Tensor] | None = None

    def tensor(self, place: int) -> torch.Tensor:
        """Return an output tensor by its place, computed as it would have been then."""
        if self._tensors is None:
            if any(tensor._version != version for tensor, version in self._inputs):
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
        ids: what identifies the examples, if the user says it.
    """

    def __init__(
        self, owner: Session, args: Any, kwargs: Mapping[str, Any], ids: Sequence[Any] | None
    ) -> None:
        self.owner = owner
        self.given = (args, kwargs, ids)
        self.stack = [Frame(ROOT_KEY)]
        self.decisions: list[str] = []
        self.plan: Plan | None = None
        self.begun = False
        self.inputs: Inputs
        self.context = ""
        self.layout = ""
        self.examples: list[bytes] = []

    def on_read(self, tensors: list[torch.Tensor], result: Any) -> None:
        """Remember what Python saw: what is computed from now on may follow from it."""
        self.decisions.append(repr(result))

    def call(self, path: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call of a module, or do what has the same effect on the pass."""
        if not self.begun:
            self.begun = True
            self.plan = self.owner.begin(self)
        if self.plan is None:
            return original(*args, **kwargs)
        frame = self.stack[-1]
        key = child_key(frame.key, path, frame.counts)
        stage = self.plan.stage
        place = stage.handed_on.get(key)
        if place is not None:
            given = tensors_in((args, kwargs))
            if place < len(given) and isinstance(given[place], LazyTensor):
                return given[place]
        if key not in stage.skipped:
            return self.run(key, original, args, kwargs)
        if key in stage.needed:
            return self._replay(key, original, args, kwargs)
        return self._defer(key, original, args, kwargs)

    def run(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call, and store what it returns if that is wanted."""
        assert self.plan is not None
        self.stack.append(Frame(key))
        try:
            output = original(*args, **kwargs)
        finally:
            self.stack.pop()
        if key in self.plan.stored:
            self.owner.keep(self, key, output)
        return output

    def shelf_key(self, key: str) -> tuple[str, str]:
        """Return where the outputs of a call are stored."""
        assert self.plan is not None
        seen = f"{self.decisions}" if self.decisions else ""
        return key, f"{self.layout}{self.plan.modes.get(key, '')}{seen}"

    def _replay(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if key in self.owner.replayable(self, key):
            shelf = self.owner.store.shelves[self.shelf_key(key)]
            slots = shelf.find(self.examples)
            if slots is not None:
                self.owner.counts["replayed"] += 1
                return shelf.form.filled(shelf.get(slots))
        return self._compute(key, original, args, kwargs)

    def _compute(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = real((args, kwargs))
        output = self.run(key, original, args, kwargs)
        self.owner.forms[self.shelf_key(key)] = _form_of(output)
        return output

    def _defer(self, key: str, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        form = self.owner.forms.get(self.shelf_key(key))
        if form is None:
            return self._compute(key, original, args, kwargs)
        self.owner.counts["skipped"] += 1
        given = [one for one in tensors_in((args, kwargs)) if not isinstance(one, LazyTensor)]

        def make() -> Any:
            self.owner.counts["computed after all"] += 1
            return self._compute(key, original, args, kwargs)

        deferred = Deferred(make, self.owner.device, given)
        tensors = [
            LazyTensor(each, lambda place=place: deferred.tensor(place))  # type: ignore[misc]
            for place, each in enumerate(form.tensors)
        ]
        return form.filled(tensors)


def _form_of(output: Any) -> OutputForm:
    return OutputForm.of(output, [])


class Session:
    """Stores and replays the outputs of what is frozen, for one model and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: Any, store: Store) -> None:
        self.model = model
        self.optimizer = optimizer
        self.store = store
        self.device = device_type(model)
        self.notices = Notices()
        self.counts = {"replayed": 0, "skipped": 0, "computed after all": 0, "stored": 0}
        self.forms: dict[tuple[str, str], OutputForm] = {}
        self.watch = FrozenWatch(model, optimizer)
        self.ids: Sequence[Any] | None = None
        self._profiles: dict[str, Profile | None] = {}
        self._plans: dict[str, tuple[int, Plan]] = {}
        #: (key, layout, context) of what was compared with a second computation of other batches
        self._verified: set[tuple[str, str, str]] = set()
        self._pass: Pass | None = None
        self._reading: ReadWatch | None = None
        self._stubs = self._make_stubs()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    # --- around a pass ---------------------------------------------------------------------------

    def _before(self, _model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._pass is not None or torch.compiler.is_compiling():
            return
        self._pass = Pass(self, args, kwargs, self.ids)
        for module, stub in self._stubs:
            stub.before = module.__dict__.get("forward")
            module.__dict__["forward"] = stub
        if any(profile and profile.lineage.reads for profile in self._profiles.values()):
            self._reading = ReadWatch(self._pass.on_read)
            self._reading.__enter__()

    def _after(self, _model: nn.Module, _args: Any, _output: Any) -> None:
        if self._pass is None or len(self._pass.stack) > 1:
            return
        if self._reading is not None:
            self._reading.__exit__(None, None, None)
            self._reading = None
        for module, stub in self._stubs:
            if stub.before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = stub.before
        self._pass = None

    def _make_stubs(self) -> list[tuple[nn.Module, Stub]]:
        return [
            (module, self._stub(path, module))
            for path, module in self.model.named_modules()
            if path
        ]

    def _stub(self, path: str, module: nn.Module) -> Stub:
        own = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            before = stub.before
            original = own.__get__(module) if before is None else before
            current = self._pass
            if current is None:
                return original(*args, **kwargs)
            return current.call(path, original, args, kwargs)

        stub = Stub(forward, own_forward(module))
        return stub

    # --- what a pass asks ------------------------------------------------------------------------

    def begin(self, current: Pass) -> Plan | None:
        """Return what a pass may leave out; None if everything must run."""
        args, kwargs, ids = current.given
        try:
            inputs = Inputs.of(args, kwargs, None if ids is None else len(ids))
        except UnhashableInputError as error:
            self.notices.tell(f"Nothing is reused in such passes: {error}.")
            return None
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in inputs.leaves):
            return None
        for changed in self.watch.changed():
            self._drop(changed)
        flags = context_of(self.model) + inputs.form()
        context = flags + modes_of(self.model)
        profile = self._profile(context, inputs)
        if profile is None:
            return None
        plan = self._plan(context, profile, inputs)
        if plan is None:
            return None
        current.inputs = inputs
        current.context = context
        current.layout = hashlib.blake2b(
            (flags + inputs.layout()).encode(), digest_size=16
        ).hexdigest()
        current.examples = inputs.examples()
        return plan

    def keep(self, current: Pass, key: str, output: Any) -> None:
        """Store what a call returned."""
        plan = current.plan
        assert plan is not None
        dims = plan.profile.dims.get(key)
        if dims is None or any(tensor.requires_grad for tensor in tensors_in(output)):
            return
        place = current.shelf_key(key)
        shelf = self.store.shelf(place, OutputForm.of(output, dims))
        if shelf.put(current.examples, output):
            self.counts["stored"] += 1

    def replayable(self, current: Pass, key: str) -> set[str]:
        """Return the keys that may be replayed in this pass, compared before their first use."""
        plan, place = current.plan, current.shelf_key(key)
        assert plan is not None
        shelf = self.store.shelves.get(place)
        slots = None if shelf is None else shelf.find(current.examples)
        if shelf is None or slots is None or key in plan.profile.refused:
            return set()
        verified = (*place, current.context)
        if verified not in self._verified:
            reason = self._compare(current, key, shelf, slots)
            if reason:
                path = plan.profile.call(key).path
                self._refuse(plan.profile, {path: reason}, current.inputs)
                return set()
            self._verified.add(verified)
        return {key}

    def _compare(self, current: Pass, key: str, shelf: Shelf, slots: torch.Tensor) -> str:
        """Compare stored outputs with those of a batch mixed from the same examples."""
        assert current.plan is not None
        places = mixed(current.inputs.size)
        run = current.plan.profile.outputs([key], current.inputs, places)
        if key not in run.outputs:
            return "is called for some batches only"
        pairs = zip(tensors_in(run.outputs[key]), shelf.get(slots), shelf.form.dims, strict=True)
        for computed, stored, dim in pairs:
            expected = stored if dim is None else stored.index_select(dim, places.to(stored.device))
            if not same_bits(computed, expected):
                return "gives an example other bits in another batch"
        return ""

    # --- profiles and plans ----------------------------------------------------------------------

    def _profile(self, context: str, inputs: Inputs) -> Profile | None:
        if context not in self._profiles:
            try:
                self._profiles[context] = Profile(self.model, inputs, self.watch.bits)
            except Exception as error:  # whatever a model's own code raises in a copy
                self._profiles[context] = None
                self.notices.tell(
                    f"Nothing is reused: a copy of the model cannot be tried ({error!r})."
                )
        return self._profiles[context]

    def _plan(self, context: str, profile: Profile, inputs: Inputs) -> Plan | None:
        trained = self.watch.trained()
        known = self._plans.get(context)
        if known is not None and known[0] == trained:
            return known[1]
        for _ in range(20):
            plan = self._planned(profile, trained)
            failed = profile.check(plan.stored, inputs)
            if not failed:
                break
        self._tell(profile)
        self._plans[context] = (trained, plan)
        self._retain()
        return plan

    def _planned(self, profile: Profile, trained: int) -> Plan:
        stage = profile.stage(trained)
        stored = set(stage.needed)
        since = trained
        for later in self.watch.later():
            since |= later
            ahead = profile.stage(later)
            for key in ahead.needed:
                call = profile.call(key)
                if not (call.mask | call.inside) & since:
                    stored.add(key)
        return Plan(
            profile, stage, frozenset(stored), {key: profile.modes(key) for key in stored}
        )

    def _refuse(self, profile: Profile, reasons: Mapping[str, str], inputs: Inputs) -> None:
        profile.refuse(reasons, inputs)
        self._plans.clear()
        self._tell(profile)

    def _tell(self, profile: Profile) -> None:
        for path, reason in profile.refused.items():
            self.notices.tell(f"{path!r} is not reused: it {reason}.")

    def _retain(self) -> None:
        wanted = {key for _, plan in self._plans.values() for key in plan.stored}
        self.store.retain(lambda key: key in wanted)

    def _drop(self, changed: int) -> None:
        """Forget everything that depends on what changed."""
        for profile in self._profiles.values():
            for call in profile.lineage.calls.values() if profile else ():
                if (call.mask | call.inside) & changed:
                    self.store.retain(lambda key, gone=call.key: key != gone)  # type: ignore[misc]

    def close(self) -> None:
        """Take the hooks from the model."""
        for handle in self._handles:
            handle.remove()

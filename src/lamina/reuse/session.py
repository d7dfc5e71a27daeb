"""Reuse of what is frozen: the passes of one model, and what is stored of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .._util.notices import Notices
from ..errors import LaminaError
from .attach import attach
from .copies import Hook, Stub, compiled_paths, lies_in, own_way_of
from .examples import Examples, IndexedBatch
from .forecast import Forecast, forecast
from .frozen import FrozenWatch
from .keys import Inputs, UnhashableInputError, context_of, device_type, modes_of
from .lineage import ATTACHED, Call, ReadWatch, tensors_in
from .passes import Pass, Plan
from .profile import Profile, mixed, same_bits
from .shelf import OutputForm
from .store import Place, Store

#: a model that is called in more ways than so many is not worth a trace for each
_MOST_PROFILES = 16


class Reuse:
    """Stores and replays the outputs of what is frozen in one model; made by `lamina.reuse`.

    `counts` says what became of calls so far: "replayed" from storage, "skipped" because only such
    calls would read their outputs, and the examples "stored". `refused` says what is never reused,
    and why, by the path of the module.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        space: int,
        folder: Path | None,
        debug: float,
        preprocessing: str,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.notices = Notices()
        self.store = Store(space, folder, self.notices.tell)
        self.device = device_type(model)
        self.counts = {"replayed": 0, "skipped": 0, "stored": 0}
        self.refused: dict[str, str] = {}
        #: the form of what each call returns
        self.forms: dict[Place, OutputForm] = {}
        self.watch = FrozenWatch(model, optimizer)
        self.examples = Examples(self.notices)
        self._debug = debug
        self._preprocessing = preprocessing
        self._random = random.Random(0)
        self._profiles: dict[str, Profile | None] = {}
        self._plans: dict[str, Plan] = {}
        self._trained = 0
        self._held = 0
        self._dropped: set[str] = set()
        self._added: list[Any] = []
        #: what was compared with a second computation, of other batches: place and context
        self._verified: set[tuple[Place, str]] = set()
        self._pass: Pass | None = None
        self._reading: ReadWatch | None = None
        self._closed = False
        compiled = compiled_paths(model)
        self._stubs = [
            (module, self._stub(path, module))
            for path, module in model.named_modules()
            if path and not lies_in(path, compiled)
        ]
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before), with_kwargs=True),
            model.register_forward_hook(Hook(self._after), always_call=True),
        ]

    # --- what a user calls -----------------------------------------------------------------------

    @contextmanager
    def batch(self, ids: Iterable[Any]) -> Iterator[None]:
        """Say which examples the passes inside are about; otherwise their inputs are hashed.

        Args:
            ids: one for each example of the batch: a number or a text that stands for it in all
                epochs, and for no other example.
        """
        with self.examples.named(ids):
            yield

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a loader without their indices, which name the examples meanwhile.

        Args:
            loader: over an `IndexedDataset`, with `IndexedDataset.collate`.
        """
        for batch in loader:
            if not isinstance(batch, IndexedBatch):
                raise LaminaError(
                    f"a batch of type {type(batch).__name__} came from the loader; expected one "
                    "with indices. Make it so: DataLoader(IndexedDataset(data), "
                    "collate_fn=IndexedDataset.collate())."
                )
            with self.batch(batch.ids):
                yield batch.batch

    def preview(self, examples: int, *args: Any, **kwargs: Any) -> Forecast:
        """Return what each stage of the plan will store and save, from some passes of a copy.

        Args:
            examples: how many there are in an epoch.
            *args: a batch, as the model is called with it.
            **kwargs: its keyword arguments.

        Returns:
            The stages; `print` shows a table.
        """
        inputs = Inputs.of(args, kwargs, None)
        profile = Profile(self.model, inputs, self.watch.bits)
        moments = [(self.optimizer.clock, self.watch.trained()), *self.watch.later()]
        for _ in range(20):
            wanted = {key for _, trained in moments for key in profile.stage(trained).needed}
            if profile.check(wanted, inputs):
                break
        end = self.optimizer.resolved.run.steps
        return forecast(profile, moments, end, examples, self.store.space)

    def close(self) -> None:
        """Take the hooks from the model and let go of the folder; the run goes on without reuse."""
        for handle in self._handles:
            handle.remove()
        self.store.close()
        self._closed = True

    def __enter__(self) -> Reuse:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        return f"<Reuse: {counts}; {self.store.used / 2**20:.1f} MiB>"

    # --- around a pass ---------------------------------------------------------------------------

    def _before(self, _model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._pass is not None or torch.compiler.is_compiling():
            return
        self._pass = Pass(self, args, kwargs)
        added: list[Any] = []
        for module, stub in self._stubs:
            stub.before = module.__dict__.get("forward")
            module.__dict__["forward"] = stub
            added.append((stub.before, [*module._forward_hooks], [*module._forward_pre_hooks]))
        if added != self._added or self.watch.has_other_settings():
            # A hook or a forward was put on a module in the middle of a run, or a setting was
            # changed: what was seen of the model, and found to be the same again, is past.
            self._added = added
            self._profiles.clear()
            self._plans.clear()
            self._forget(lambda place: False)
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
        self.watch.note_settings()
        self._pass = None

    def _stub(self, path: str, module: nn.Module) -> Stub:
        def forward(*args: Any, **kwargs: Any) -> Any:
            own = type(module).forward.__get__(module)
            original = own if stub.before is None else stub.before
            if self._pass is None:
                return original(*args, **kwargs)
            return self._pass.call(path, original, args, kwargs)

        stub = Stub(forward, None)
        return stub

    # --- what a pass asks ------------------------------------------------------------------------

    def begin(self, current: Pass) -> Plan | None:
        """Return what a pass may leave out; None if everything must run."""
        args, kwargs = current.given
        own_way = own_way_of(self.model, self._handles[0].id)
        if own_way:
            self.notices.tell(f"Nothing is reused: the model itself {own_way}.")
            return None
        try:
            inputs = Inputs.of(args, kwargs, self.examples.size)
        except UnhashableInputError as error:
            self.notices.tell(f"Nothing is reused in such passes: {error}.")
            return None
        if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in inputs.leaves):
            return None
        self._follow_weights()
        flags = context_of(self.model) + inputs.form()
        context = flags + modes_of(self.model)
        profile = self._profile(context, inputs)
        if profile is None:
            return None
        plan = self._plan(context, profile, inputs)
        if not plan.stored and not plan.stage.needed:
            return None
        text = flags + inputs.layout() + self._preprocessing
        current.unbatched = inputs.unbatched()
        current.inputs, current.context = inputs, context
        current.layout = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        current.examples = self.examples.identify(inputs, current.layout)
        if self.examples.distrusted:
            self._forget(lambda place: False)
        return plan

    def keep(self, current: Pass, key: str, output: Any) -> None:
        """Store what a call returned."""
        plan = current.plan
        assert plan is not None
        dims = plan.profile.dims.get(key)
        call = plan.profile.call(key)
        explained = call.mask & (self._held | ATTACHED)
        if dims is None or (
            not explained and any(tensor.requires_grad for tensor in tensors_in(output))
        ):
            return
        form = OutputForm.of(output, dims)
        if any(0 in each.stride for each in form.tensors if each.size_in_bytes()):
            output = tree_map_only(torch.Tensor, torch.clone, output)
        mask = plan.profile.depends(key)
        place = current.place(key)
        shelf = self.store.shelf(place, form, lambda: self.watch.fingerprint(mask))
        self.counts["stored"] += shelf.put(current.examples, output)
        if self.store.full:
            self._make_room(plan, place)

    def replay(self, current: Pass, key: str) -> list[torch.Tensor] | None:
        """Return stored outputs of a call for the examples of a pass.

        Before the first use of a layout in a context they are compared with outputs of a batch that
        is mixed from the same examples: what a row of a batch is may depend on the other rows, or
        on its place, in the last bits.
        """
        plan, place = current.plan, current.place(key)
        assert plan is not None
        shelf = self.store.shelves.get(place)
        slots = None if shelf is None else shelf.find(current.examples)
        if shelf is None or slots is None or plan.profile.call(key).path in self.refused:
            return None
        tensors = shelf.get(slots)
        if (place, current.context) not in self._verified:
            reason = self._difference(current, key, tensors, shelf.form)
            if reason:
                path = plan.profile.call(key).path
                plan.profile.refuse({path: reason}, current.inputs)
                self._plans.clear()
                self._tell(plan.profile)
                return None
            self._verified.add((place, current.context))
        self.forms[place] = shelf.form
        return self._attached(plan.profile.call(key), tensors)

    def _attached(self, call: Call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return replayed outputs that require a gradient where those of a real call would."""
        if not call.mask & (self._held | ATTACHED):
            return tensors
        return [
            attach(tensor, self.watch.params_of(mask & self._held), hooked=bool(mask & ATTACHED))
            for tensor, mask in zip(tensors, call.masks, strict=True)
        ]

    def is_examined(self) -> bool:
        """Return whether a call is made although it could be replayed, to compare."""
        return self._debug > 0 and self._random.random() < self._debug

    def compare(self, current: Pass, key: str, output: Any, stored: list[torch.Tensor]) -> None:
        """Raise `LaminaError` if a call returned other bits than are stored."""
        if not all(map(same_bits, tensors_in(output), stored)):
            assert current.plan is not None
            raise LaminaError(
                f"{current.plan.profile.call(key).path!r} gives other bits than are stored of it, "
                "which lamina.reuse(debug=...) has found. Something that its output depends on "
                "changed and cannot be seen; train this model without reuse."
            )

    def _difference(
        self, current: Pass, key: str, stored: Sequence[torch.Tensor], form: OutputForm
    ) -> str:
        assert current.plan is not None
        places = mixed(current.inputs.size)
        output = current.plan.profile.outputs([key], current.inputs, places).outputs.get(key)
        if output is None:
            return "is called for some batches only"
        for computed, kept, dim in zip(tensors_in(output), stored, form.dims, strict=True):
            expected = kept if dim is None else kept.index_select(dim, places.to(kept.device))
            if not same_bits(computed, expected):
                return "gives an example other bits in another batch"
        return ""

    # --- profiles and plans ----------------------------------------------------------------------

    def _profile(self, context: str, inputs: Inputs) -> Profile | None:
        if context not in self._profiles:
            if len(self._profiles) >= _MOST_PROFILES:
                self.notices.tell("This model is called in too many ways to reuse what it does.")
                return None
            try:
                self._profiles[context] = Profile(self.model, inputs, self.watch.bits)
            except Exception as error:  # whatever a model's own code raises in a copy
                self._profiles[context] = None
                self.notices.tell(
                    f"Nothing is reused: a copy of the model cannot be tried ({error!r})."
                )
        return self._profiles[context]

    def _plan(self, context: str, profile: Profile, inputs: Inputs) -> Plan:
        if context in self._plans:
            return self._plans[context]
        plan = self._planned(profile)
        while not profile.check(plan.stored, inputs):
            plan = self._planned(profile)
        self._tell(profile)
        self._plans[context] = plan
        return plan

    def _planned(self, profile: Profile) -> Plan:
        stage = profile.stage(self._trained)
        stored = set(stage.needed)
        since = self._trained
        for _, later in self.watch.later():
            since |= later
            ahead = profile.stage(later).needed
            if not any(profile.depends(key) & since for key in ahead):
                stored |= ahead
        stored -= self._dropped
        keyed = stored | set(stage.skipped)
        return Plan(profile, stage, frozenset(stored), {key: profile.modes(key) for key in keyed})

    def _tell(self, profile: Profile) -> None:
        for path, reason in {**profile.causes(self._trained), **profile.refused}.items():
            self.refused[path] = reason
            name = repr(path) if path else "the model itself"
            self.notices.tell(
                f"{name} {reason}: neither it nor what is computed from it is reused."
            )
        trains = [self._trained, *(bits for _, bits in self.watch.later())]
        unused = not self.refused and not any(self.counts.values())
        if unused and not any(profile.stage(bits).needed for bits in trains):
            self.notices.tell(
                "Nothing is reused: nothing is frozen at any time that is not computed from "
                "something that trains. Freeze the bottom of the model, or leave reuse out."
            )

    # --- what is dropped -------------------------------------------------------------------------

    def _follow_weights(self) -> None:
        """Forget what depends on something that trains, or that changed although it is frozen."""
        changed = self.watch.changed()
        trained = self.watch.trained()
        self._held = self.watch.held()
        if not changed and trained == self._trained:
            return
        profiles = [profile for profile in self._profiles.values() if profile is not None]
        stale = {
            key
            for profile in profiles
            for key in profile.lineage.calls
            if profile.depends(key) & (changed | trained)
        }
        self._forget(lambda place: place[0] not in stale)
        self._plans.clear()
        self._trained = trained
        if changed == -1:  # tensors were exchanged
            self._profiles.clear()

    def _forget(self, wanted: Any) -> None:
        self.store.retain(wanted)
        self._verified = {one for one in self._verified if one[0] in self.store.shelves}

    def _make_room(self, plan: Plan, place: Place) -> None:
        """Drop what a later stage needs for what this one needs; else store no more of this."""
        self.store.full = False
        later = list(plan.stored - plan.stage.needed - self._dropped)
        if place[0] in later:
            least = place[0]
        elif later:
            least = max(later, key=lambda key: plan.profile.call(key).index)
        else:
            return
        self._dropped.add(least)
        self._plans.clear()
        self._forget(lambda each: each[0] != least)
        self.notices.tell(
            f"The outputs of {plan.profile.call(least).path!r}, which a later stage needs, are not "
            f"stored: all outputs together take more than {self.store.space / 2**20:.0f} MiB. "
            "Give more space=."
        )

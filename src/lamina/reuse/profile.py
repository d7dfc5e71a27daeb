"""What is known of a model's forward pass in one context: what depends on what, and what is exact.

A context is everything but the examples: modes, autocast, gradient mode, the form of the inputs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only

from .attach import asks_for_gradients
from .boundaries import Stage, stage_of
from .copies import (
    compiled_paths,
    copy_to_try,
    has_hooks,
    lies_in,
    own_forward,
    replaced_forward,
    same_randomness,
    version_of,
    without_compiled,
)
from .keys import Inputs, as_bytes, device_type
from .lineage import (
    ATTACHED,
    IMPURE,
    INPUT,
    ROOT_KEY,
    Call,
    Lineage,
    ReadWatch,
    child_key,
    storage_key,
    tensors_in,
    trace,
)
from .shelf import OutputForm

_PLAIN = (str, int, float, bool, type(None))


class Profile:
    """A trace of the model, and what checks on copies of it have found.

    Args:
        model: the model.
        inputs: those of the pass at hand.
        bits: the bit of each parameter and buffer, by its name in the model.

    Raises:
        Exception: what a model raises that cannot be copied or traced.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, bits: Mapping[str, int]) -> None:
        self.model = model
        self.bits = bits
        #: why modules are not reused, by path
        self.refused: dict[str, str] = {}
        #: the dimension of the examples in each tensor that a call returns
        self.dims: dict[str, tuple[int | None, ...]] = {}
        #: how many bytes an example takes in the outputs of a call
        self.widths: dict[str, int] = {}
        #: how long each call took in the last check
        self.seconds: dict[str, float] = {}
        self._compiled = compiled_paths(model)
        #: the modules that a pass is followed through
        self._stubbed = {
            path for path, _ in model.named_modules() if not lies_in(path, self._compiled)
        }
        self._modules = dict(model.named_modules())
        self._inside = {path: self._bits_in(path, module) for path, module in model.named_modules()}
        self.lineage = self._trace(inputs)

    def _trace(self, inputs: Inputs) -> Lineage:
        twin = copy_to_try(self.model)
        by_storage: dict[int, int] = {}
        names = (name for name, _ in named_tensors(self.model))
        for name, (_, tensor) in zip(names, named_tensors(twin), strict=True):
            key = storage_key(tensor) or 0
            by_storage[key] = by_storage.get(key, 0) | self.bits[name]
            if asks_for_gradients(self.model.get_submodule(name.rpartition(".")[0])):
                by_storage[key] |= ATTACHED
        with (
            same_randomness(torch.device(device_type(self.model))),
            warnings.catch_warnings(action="ignore"),  # the model itself gives them too
        ):
            tampered = {**tampered_modules(self.model), **self.refused}
            lineage = trace(without_compiled(twin), self._stubbed, inputs, by_storage, tampered)
        for call in lineage.calls.values():
            call.inside = self._inside[call.path]
        return lineage

    def stage(self, trained: int) -> Stage:
        """Return what can be left out while these train; boundaries are checked before use."""
        return stage_of(self.lineage, trained, {*self.refused, *self._compiled})

    def causes(self, trained: int) -> dict[str, str]:
        """Return what keeps frozen modules from being reused, by path: what it does."""
        held_up = [
            call.index
            for call in self.lineage.calls.values()
            if call.inside
            and not (call.inside | call.mask) & trained
            and (call.blocked or call.mask & IMPURE)
        ]
        last = max(held_up, default=-1)
        return {
            path: reason
            for path, (index, reason) in self.lineage.causes.items()
            if (index <= last and not self._inside[path] & trained) or (not path and held_up)
        }

    def call(self, key: str) -> Call:
        """Return a call by its key."""
        return self.lineage.calls[key]

    def depends(self, key: str) -> int:
        """Return the bits of what a call depends on."""
        call = self.call(key)
        return call.mask | call.inside

    def modes(self, key: str) -> str:
        """Return the modes of the modules in a call and of those called before it.

        The calls around it are left out: they are in training mode as soon as a part of them is.
        What that changes in a call is seen when its outputs are compared in each context.
        """
        call = self.call(key)
        around = set()
        outer = call.parent
        while outer is not None:
            around.add(outer.key)
            outer = outer.parent
        seen = [
            self._modules[other.path].training
            for other in self.lineage.calls.values()
            if other.key not in around
            and (other.index <= call.index or other.key.startswith(f"{key}>"))
        ]
        return "".join("t" if each else "e" for each in seen)

    def check(self, keys: Iterable[str], inputs: Inputs) -> bool:
        """Compute some calls a second time, and with the examples mixed; refuse what differs.

        Returns:
            Whether all of them can be reused; otherwise `refused` says what cannot, and why.
        """
        wanted = [key for key in keys if key not in self.dims]
        if not wanted:
            return True
        trial = _Trial(self, wanted, inputs)
        self.seconds = trial.first.seconds
        reasons = {key: trial.reason(key) for key in wanted}
        if not any(reasons.values()):
            for key in wanted:
                self.dims[key] = trial.dims[key]
                form = OutputForm.of(trial.first.outputs[key], self.dims[key])
                self.widths[key] = sum(form.widths())
            return True
        self.refuse(self._culprit(inputs) or self._named(reasons), inputs)
        return False

    def _culprit(self, inputs: Inputs) -> dict[str, str]:
        """Return the first module of a pass, as they end, that does not do the same again."""
        trial = _Trial(self, list(self.lineage.calls), inputs)
        for key in trial.first.outputs:
            reason = "" if self.call(key).parent is None else trial.reason(key, narrow=True)
            if reason:
                return self._named({key: reason})
        return {}

    def _named(self, reasons: Mapping[str, str]) -> dict[str, str]:
        return {self.call(key).path: reason for key, reason in reasons.items() if reason}

    def twin(self) -> nn.Module:
        """Return a copy of the model that can run for nothing."""
        return without_compiled(copy_to_try(self.model))

    def outputs(
        self,
        keys: Iterable[str],
        inputs: Inputs,
        places: torch.Tensor | None = None,
        twin: nn.Module | None = None,
    ) -> Run:
        """Run a copy of the model and return copies of what some calls return.

        Args:
            keys: of the calls.
            inputs: of the pass.
            places: which of its examples, in which order; by default as they are.
            twin: the copy to use; by default a new one.
        """
        twin = self.twin() if twin is None else twin
        args, kwargs = inputs.arguments() if places is None else inputs.rows(places)
        # Some modules change their inputs.
        with torch.inference_mode(False):
            args, kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        run = Run(set(keys))
        with (
            same_randomness(torch.device(device_type(self.model))),
            warnings.catch_warnings(action="ignore"),
            torch.inference_mode(False),
            ExitStack() as undo,
        ):
            for path, module in followed(twin, self._stubbed):
                undo.enter_context(replaced_forward(module, run.stub(path, module.forward)))
            if self.lineage.reads:
                undo.enter_context(ReadWatch(run.on_read))
            twin(*args, **kwargs)
        return run

    def refuse(self, reasons: Mapping[str, str], inputs: Inputs) -> None:
        """Never reuse the outputs of some modules, nor what is computed from them.

        Args:
            reasons: why, by the path of the module.
            inputs: of the pass at hand.
        """
        self.refused.update(reasons)
        self.lineage = self._trace(inputs)

    def _bits_in(self, path: str, module: nn.Module) -> int:
        prefix = f"{path}." if path else ""
        found = 0
        for name, _ in module.named_parameters(remove_duplicate=False):
            found |= self.bits[prefix + name]
        return found


class _Trial:
    """Three passes of copies: twice as it is, and with the examples mixed.

    Args:
        profile: whose model it is.
        keys: of the calls to compare.
        inputs: of the pass.
    """

    def __init__(self, profile: Profile, keys: list[str], inputs: Inputs) -> None:
        self._profile = profile
        self._size = inputs.size
        self._places = mixed(inputs.size)
        #: the dimension of the examples in each tensor that a call returns
        self.dims: dict[str, tuple[int | None, ...]] = {}
        twin = profile.twin()
        self.first = profile.outputs(keys, inputs, twin=twin)
        before = _state(twin)
        self._again = profile.outputs(keys, inputs, twin=twin).outputs
        self._changed = [path for path, state in _state(twin).items() if state != before[path]]
        self._mixed = profile.outputs(keys, inputs, self._places).outputs

    def reason(self, key: str, *, narrow: bool = False) -> str:
        """Return why the outputs of a call cannot be reused; empty if they can.

        Args:
            key: of the call.
            narrow: only what is certainly the fault of this very module.
        """
        call = self._profile.call(key)
        first, again = self.first.outputs.get(key), self._again.get(key)
        own = [
            path
            for path in self._changed
            if path == call.path or (not narrow and lies_in(path, [call.path]))
        ]
        if own:
            return "keeps state between calls"
        one, other = tensors_in(first), tensors_in(again)
        if first is None or again is None or len(one) != len(other):
            return "" if narrow else "is not called alike when the same batch comes again"
        if not all(map(same_bits, one, other)):
            return "gives other values when the same batch comes again"
        if narrow and not any(self._size in tensor.shape for tensor in one):
            return ""
        return self._find_dims(key, first)

    def _find_dims(self, key: str, first: Any) -> str:
        leaves = tree_flatten(first)[0]
        if any(not isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
            return "returns something that is no tensor, number or text"
        moved, masks = tensors_in(self._mixed.get(key)), self._profile.call(key).masks
        if key not in self._mixed or len(moved) != len(masks):
            return "is called for some batches only"
        if any(not tensor.numel() for tensor in moved):
            return "returns an empty tensor"
        found: list[int | None] = []
        for tensor, other, mask in zip(tensors_in(first), moved, masks, strict=True):
            if not mask & INPUT and same_bits(tensor, other):
                found.append(None)
                continue
            fits = [
                dim
                for dim, length in enumerate(tensor.shape)
                if length == self._size
                and same_bits(tensor.index_select(dim, self._places.to(tensor.device)), other)
            ]
            if not fits:
                return "gives an example other bits in another batch"
            found.append(fits[0])
        self.dims[key] = tuple(found)
        return ""


class Run:
    """One pass of a copy: what the wanted calls returned, and what Python read."""

    def __init__(self, wanted: set[str]) -> None:
        self.outputs: dict[str, Any] = {}
        self.decisions: list[Any] = []
        self.seconds: dict[str, float] = {}
        self._wanted = wanted
        self._stack: list[tuple[str, dict[str, int]]] = []

    def stub(self, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a `forward` that counts calls and keeps what is wanted."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            key = child_key(*self._place(path)) if self._stack else ROOT_KEY
            self._stack.append((key, {}))
            began = time.perf_counter()
            try:
                output = original(*args, **kwargs)
            finally:
                self._stack.pop()
            self.seconds[key] = time.perf_counter() - began
            if key in self._wanted:
                self.outputs[key] = tree_map_only(
                    torch.Tensor, lambda tensor: tensor.detach().clone(), output
                )
            return output

        return forward

    def on_read(self, _tensors: list[torch.Tensor], result: Any) -> None:
        """Note what Python read."""
        self.decisions.append(result)

    def _place(self, path: str) -> tuple[str, str, dict[str, int]]:
        key, counts = self._stack[-1]
        return key, path, counts


def mixed(size: int) -> torch.Tensor:
    """Return places of examples: in reverse, and some of them twice in the place of others."""
    places = torch.arange(size - 1, -1, -1)
    places[1::3] = places[0::3][: len(places[1::3])]
    return places


def followed(model: nn.Module, paths: Container[str]) -> list[tuple[str, nn.Module]]:
    """Return the modules of a model that have these paths."""
    return [(path, module) for path, module in model.named_modules() if path in paths]


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return every parameter and buffer with each of its names."""
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit; NaN equals itself."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return not one.is_floating_point() or torch.equal(one.signbit(), other.signbit())
    as_bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bits)


def tampered_modules(model: nn.Module) -> dict[str, str]:
    """Return the modules whose calls somebody watches or replaces, with what that means."""
    found = {}
    for path, module in model.named_modules():
        if path and has_hooks(module) and not asks_for_gradients(module):
            found[path] = "has a forward hook, which sees every pass"
        elif path and own_forward(module) is not None and path not in compiled_paths(model):
            found[path] = "has a forward of its own, put there by hand"
    return found


def _state(model: nn.Module) -> dict[str, Any]:
    """Return what can be seen of the state of every module: attributes and buffers."""
    return {
        path: (
            {name: _look(value) for name, value in vars(module).items() if name != "forward"},
            [
                as_bytes(buffer.detach()[None].cpu()).numpy().tobytes()
                for buffer in module._buffers.values()
                if buffer is not None
            ],
        )
        for path, module in model.named_modules()
    }


def _look(value: Any) -> Any:
    if isinstance(value, (int, float, str, bool)):
        return value
    if isinstance(value, torch.Tensor):
        return id(value), version_of(value)
    if isinstance(value, (list, dict, set)):
        return id(value), len(value)
    return id(value)

"""What each module call of one forward pass depends on, seen operator by operator.

Every tensor is followed by its storage: it carries a set of bits, one for each parameter and buffer
that it was computed from, and one (`IMPURE`) for what no later pass need repeat: random numbers,
tensors that come from nowhere, state that the pass itself changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .copies import replaced_forward, version_of
from .keys import Inputs

#: the bit of what cannot be computed again to the same bits
IMPURE = 1
#: the bit of what differs from example to example
INPUT = 2
#: the bit of a tensor among the inputs that belongs to no single example
UNBATCHED = 4
#: the bit of what a hook makes require a gradient (see `attach.asks_for_gradients`)
ATTACHED = 8
#: the bits from this one on belong to parameters and buffers
FIRST_BIT = 16


@dataclass(eq=False)
class Call:
    """One call of a module in a pass; `key` says which: the calls it lies in, path and count.

    `mask` is what its outputs depend on, `inside` what its module holds; `outputs` are the storages
    of its output tensors, in order, `masks` what each of them depends on; `alias_of` says which of
    the input tensors it is, if it is one. `blocked` says why the call cannot be left out.
    """

    key: str
    path: str
    parent: Call | None
    index: int
    mask: int = 0
    inside: int = 0
    blocked: str = ""
    outputs: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    alias_of: list[int | None] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def block(self, reason: str) -> None:
        """Record that this call and those around it cannot be left out."""
        call: Call | None = self
        while call is not None:
            call.blocked = call.blocked or reason
            call = call.parent

    def within(self, keys: Mapping[str, Any]) -> Call | None:
        """Return the outermost of this call and those around it whose key is given."""
        found: Call | None = None
        call: Call | None = self
        while call is not None:
            if call.key in keys:
                found = call
            call = call.parent
        return found


@dataclass
class _Source:
    """A storage: what it depends on, and the call that last wrote it."""

    ref: StorageWeakRef
    mask: int
    producer: Call | None


@dataclass
class Lineage:
    """What was seen of a pass.

    `consumed` lists (call, producer, storage): in that call an operator read the storage, which
    the producer wrote; the model's own outputs are read by the root. `changed` are the bits of
    buffers and parameters that the pass wrote. `reads` says whether code outside of leaf modules
    looked at values (`if x.any()`). `causes` are the modules that make something impure, by path,
    with the index of the call and what it does.
    """

    calls: dict[str, Call]
    consumed: list[tuple[Call, Call, int]]
    changed: int
    reads: bool
    causes: dict[str, tuple[int, str]]


def child_key(parent: str, path: str, counts: dict[str, int]) -> str:
    """Return the key of the next call of a module inside a call; `counts` belongs to the latter."""
    count = counts.get(path, 0)
    counts[path] = count + 1
    return f"{parent}>{path}#{count}"


ROOT_KEY = "model"


def trace(
    model: nn.Module,
    followed: Container[str],
    inputs: Inputs,
    bits: Mapping[int, int],
    tampered: Mapping[str, str],
) -> Lineage:
    """Run a model once and return what each of its calls depends on.

    Args:
        model: a copy that may be run for nothing (see `copies.copy_to_try`).
        followed: the paths of the modules whose calls are told apart.
        inputs: the arguments of the pass.
        bits: the bit of each parameter and buffer, by the identity of its storage.
        tampered: the paths of modules of which somebody's hooks run, and why that matters.
    """
    tracer = _Tracer(bits, tampered)
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        inputs = inputs.copied()  # some models change what they are given
        args, kwargs = inputs.arguments()
        undo.enter_context(torch.no_grad())
        for path, module in model.named_modules():
            if path not in followed:
                continue
            undo.enter_context(replaced_forward(module, tracer.stub(path, module)))
        undo.enter_context(ReadWatch(tracer.on_read))
        undo.enter_context(tracer)
        tracer.take_inputs(inputs)
        versions = tracer.versions(model)
        output = model(*args, **kwargs)
        tracer.finish(output, versions)
    return Lineage(tracer.calls, tracer.consumed, tracer.changed, bool(tracer.reads), tracer.causes)


def storage_key(tensor: torch.Tensor) -> int | None:
    """Return what identifies the memory of a tensor; None if it has none of its own."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, and some subclasses
        return None


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of nested containers, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


#: what takes values out of a tensor into Python, where they can decide what is computed
_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.is_nonzero,
    torch.is_nonzero,
    torch.equal,
    torch.Tensor.equal,
    torch.allclose,
    torch.Tensor.allclose,
}


class ReadWatch(TorchFunctionMode):
    """Tells whoever asks when values go from a tensor into Python.

    Args:
        on_read: called with the tensors that are read and what Python got.
    """

    def __init__(self, on_read: Callable[[list[torch.Tensor], Any], None]) -> None:
        super().__init__()
        self._on_read = on_read

    def __enter__(self) -> ReadWatch:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _READS:
            self._on_read(tensors_in(args), result)
        return result


class _Tracer(TorchDispatchMode):
    def __init__(self, bits: Mapping[int, int], tampered: Mapping[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bits = bits
        self._tampered = tampered
        self._sources: dict[int, _Source] = {}
        self._stack: list[Call] = []
        self.calls: dict[str, Call] = {}
        self.consumed: list[tuple[Call, Call, int]] = []
        self._known: set[tuple[int, int, int]] = set()
        self.changed = 0
        self.reads: list[Call] = []
        #: what everything from now on depends on: Python has seen such values
        self._control = 0
        self.causes: dict[str, tuple[int, str]] = {}

    # --- calls -----------------------------------------------------------------------------------

    def stub(self, path: str, module: nn.Module) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._enter(path)
            given = tensors_in((args, kwargs))
            versions = [version_of(tensor) for tensor in given]
            drawn = _python_random()
            try:
                output = original(*args, **kwargs)
            finally:
                self._stack.pop()
            if _python_random() != drawn:
                call.block("draws random numbers of Python or NumPy")
                self._taint_rest(call)
            if [version_of(tensor) for tensor in given] != versions:
                call.blocked = call.blocked or "changes its input in place"
            if path in self._tampered:
                call.block(self._tampered[path])
                self._blame(call, self._tampered[path])
                for tensor in tensors_in(output):
                    self._find(tensor, call).mask |= IMPURE
            self._note_outputs(call, given, output)
            return output

        return forward

    def _enter(self, path: str) -> Call:
        parent = self._stack[-1] if self._stack else None
        key = ROOT_KEY if parent is None else child_key(parent.key, path, parent.counts)
        call = Call(key, path, parent, len(self.calls))
        self.calls[key] = call
        self._stack.append(call)
        return call

    def _note_outputs(self, call: Call, given: list[torch.Tensor], output: Any) -> None:
        call.mask |= self._control
        places = {id(tensor): place for place, tensor in reversed(list(enumerate(given)))}
        for tensor in tensors_in(output):
            source = self._find(tensor, call)
            call.mask |= source.mask
            call.masks.append(source.mask | self._control)
            call.outputs.append(storage_key(tensor) or 0)
            call.alias_of.append(places.get(id(tensor)))

    # --- tensors ---------------------------------------------------------------------------------

    def take_inputs(self, inputs: Inputs) -> None:
        for place, leaf in enumerate(inputs.leaves):
            if isinstance(leaf, torch.Tensor):
                self._keep(leaf, INPUT if place in inputs.batched else UNBATCHED, None)

    def versions(self, model: nn.Module) -> list[tuple[torch.Tensor, int]]:
        held = [*model.parameters(), *model.buffers()]
        return [(tensor, tensor._version) for tensor in held]

    def finish(self, output: Any, versions: list[tuple[torch.Tensor, int]]) -> None:
        root = self.calls[ROOT_KEY]
        for tensor in tensors_in(output):
            self._consume(tensor, self._find(tensor, root), root)
        for tensor, before in versions:
            if tensor._version != before:
                self.changed |= self._bits.get(storage_key(tensor) or 0, 0)

    def _keep(self, tensor: torch.Tensor, mask: int, producer: Call | None) -> _Source | None:
        key = storage_key(tensor)
        if key is None:
            return None
        # The weak reference keeps the identity from being given to another storage.
        source = _Source(StorageWeakRef(tensor.untyped_storage()), mask, producer)
        self._sources[key] = source
        return source

    def _find(self, tensor: torch.Tensor, call: Call | None) -> _Source:
        key = storage_key(tensor)
        source = None if key is None else self._sources.get(key)
        if source is not None:
            return source
        mask = self._bits.get(key or 0)
        if mask is None:
            mask = IMPURE
            reason = "uses a tensor that is neither an input, a parameter nor a buffer"
            self._blame(call, reason)
        return self._keep(tensor, mask, None) or _Source(None, IMPURE, None)  # type: ignore[arg-type]

    def _blame(self, call: Call | None, reason: str) -> None:
        if call is not None:
            call.block(reason)
            self.causes.setdefault(call.path, (call.index, reason))

    def _taint_rest(self, call: Call) -> None:
        self._control |= IMPURE
        self.causes.setdefault(call.path, (call.index, call.blocked))

    def on_read(self, tensors: list[torch.Tensor], _result: Any) -> None:
        call = self._stack[-1] if self._stack else None
        for tensor in tensors:
            mask = self._find(tensor, call).mask
            self._read(mask)

    def _read(self, mask: int) -> None:
        self._control |= mask
        if self._stack:
            call = self._stack[-1]
            call.block("reads values in Python, which may decide what is computed")
            self.reads.append(call)

    def _consume(self, tensor: torch.Tensor, source: _Source, call: Call | None) -> None:
        if call is None or source.producer is None:
            return
        key = storage_key(tensor) or 0
        known = (call.index, source.producer.index, key)
        if known not in self._known:
            self._known.add(known)
            self.consumed.append((call, source.producer, key))

    # --- operators -------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._stack[-1] if self._stack else None
        given = tensors_in((args, kwargs))
        mask = self._control
        fresh = func is torch.ops.aten.lift_fresh.default  # a constant of torch.tensor(...)
        for tensor in [] if fresh else given:
            source = self._find(tensor, call)
            mask |= source.mask
            self._consume(tensor, source, call)
        seeded = torch.Tag.nondeterministic_seeded in func.tags
        drawn = _torch_random(given) if seeded else None
        result = func(*args, **kwargs)
        if seeded and not _same_states(drawn, _torch_random(given)):
            mask |= IMPURE
            self._blame(call, "draws random numbers")
        if func is torch.ops.aten._local_scalar_dense.default:
            self._read(mask)
        for tensor in _written(func, args, kwargs):
            source = self._find(tensor, call)
            source.mask |= mask
            bit = self._bits.get(storage_key(tensor) or 0, 0)
            if bit:
                self.changed |= bit
                self._blame(call, "changes one of its buffers or parameters")
            source.producer = call
        for tensor in tensors_in(result):
            known = self._sources.get(storage_key(tensor) or 0)
            if known is None:
                self._keep(tensor, mask, call)
            else:
                known.mask |= mask
        return result


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the arguments that an operator changes."""
    found: list[torch.Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(given)
    return found


def _torch_random(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    states = [torch.get_rng_state()]
    for device in sorted(devices, key=str):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _same_states(before: list[torch.Tensor] | None, after: list[torch.Tensor]) -> bool:
    pairs = zip(before or [], after, strict=False)
    return all(torch.equal(one, other) for one, other in pairs)


def _python_random() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return (random.getstate(), name, np.asarray(keys).tobytes(), *rest)

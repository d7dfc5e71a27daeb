"""The only file that walks a model: the names, owners and ties of its parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._util.blocks import PLAIN
from .._util.sharding import flat_parts, lasting_parameters, shard_origins
from .._util.tensors import has_elements, overlapping, relation
from ..errors import PlanError
from .adapters import has_adapters, is_adapter, merged_layers, names_in_base, prefix_of
from .mistaken import misspelt_flags, unregistered

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

#: the attribute of a module that lists its parameters frozen by a plan (and not by the user);
#: copies and pickles of the model keep it
MARK = "_lamina_frozen"
#: the same for tensors of this process: modules may be exchanged around their parameters
_FROZEN_BY: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
#: how many weights of a 16-bit parameter are looked at
_SAMPLED = 4096


@dataclass(frozen=True)
class ParamInfo:
    """What patterns and per-parameter functions see of a parameter (no tensor).

    `names` are all names of a tied parameter, `name` the first; `types` the class names of the
    owning modules and their base classes; `depth` and `rank` what the rule at hand captured with
    `{depth}` (rank 0 is the lowest layer). `adapted` says that PEFT has frozen it under adapters:
    it thaws only by `frozen=False`, not by a `thaw` that was written for its layer; `prefix` is
    what PEFT has put before the names of the base under a trained prompt.
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    types: frozenset[str]
    requires_grad: bool
    depth: int | None = None
    rank: int | None = None
    adapted: bool = False
    prefix: str = ""

    @cached_property
    def matched_names(self) -> tuple[str, ...]:
        """The names that patterns look at: all of them, and those in the base model under PEFT."""
        short = (name.removeprefix(self.prefix) for name in self.names)
        every = dict.fromkeys((*self.names, *short))
        return tuple(known for name in every for known in names_in_base(name))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def differentiable(self) -> bool:
        """Whether its dtype has gradients; integer, bool and quantized dtypes have none."""
        dtype = getattr(torch, self.dtype)
        return bool(dtype.is_floating_point or dtype.is_complex)


@dataclass(frozen=True)
class Owned:
    """A parameter with its description and the places in the model that hold it."""

    info: ParamInfo
    tensor: nn.Parameter
    places: tuple[tuple[nn.Module, str], ...] = field(default=())


@dataclass(frozen=True)
class Observed:
    """What was seen of a model beside its parameters.

    `compiled` says whether torch.compile is on it or on a part of it; `reentrant` holds the modules
    under reentrant activation checkpointing, each with the names of its parameters; `stray` the
    modules that have a plain attribute `requires_grad`, which has no effect, and contradicts them;
    `misspelt` the parameters and modules with an attribute that looks like it and contradicts their
    flag, with its name; `unregistered` the attributes with trainable tensors in them that are no
    parameters of the model, which are given by `id`;
    `split` the names that were one tensor until FSDP2 put them into different shard groups;
    `statistics` the modules that update running statistics in training mode, each with the names of
    the parameters that must be frozen for it to count as frozen; `merged` the layers whose
    adapters are merged into the base; `typical` the size of a typical weight of each parameter of
    16 bits, by its name.
    """

    compiled: bool = False
    reentrant: tuple[tuple[str, frozenset[str]], ...] = ()
    stray: tuple[tuple[str, bool], ...] = ()
    misspelt: tuple[tuple[str, str], ...] = ()
    unregistered: tuple[tuple[str, frozenset[int]], ...] = ()
    split: tuple[tuple[str, ...], ...] = ()
    statistics: tuple[tuple[str, frozenset[str]], ...] = ()
    merged: tuple[str, ...] = ()
    typical: Mapping[str, float] = field(default_factory=dict)


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Return each name without the prefixes that wrappers (DDP, compile, checkpointing) add.

    A leading `module.` goes only if all names have it, since it may be the user's own.
    """
    given = list(names)
    cleaned = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in given
    }
    while cleaned and all(name.startswith("module.") for name in cleaned.values()):
        cleaned = {key: name.removeprefix("module.") for key, name in cleaned.items()}
    return cleaned if len(set(cleaned.values())) == len(given) else {name: name for name in given}


def walk(model: nn.Module) -> tuple[Owned, ...]:
    """Return every parameter of a model once, in order, with all its names.

    Raises:
        PlanError: if two Parameters share elements in memory, or there is none.
    """
    found = collect(model)
    for first, second in overlaps(found):
        raise PlanError(
            f"{first.info.name!r} and {second.info.name!r} are two Parameters over the same "
            "memory: each would be updated, so that the memory is updated twice. "
            f"{overlap_fix(first, second)}"
        )
    return found


def collect(model: nn.Module) -> tuple[Owned, ...]:
    """Collect the parameters as `walk` does, but allow those that share memory."""
    if not isinstance(model, nn.Module):
        what, fix = f"of type {type(model).__name__}", ""
        if isinstance(model, type) and issubclass(model, nn.Module):
            what, fix = f"that is the class {model.__name__}", f" Make one: {model.__name__}(...)."
        elif isinstance(model, Iterable):
            fix = " Pass the model itself, not model.parameters()."
        raise PlanError(f"a model {what} was given; expected a torch.nn.Module.{fix}")
    places = _places(model)
    cleaned = clean_names(places)
    by_identity: dict[int, list[str]] = {}
    for raw, (_, _, tensor) in places.items():
        by_identity.setdefault(id(tensor), []).append(raw)
    flat = flat_parts(model, [tensor for _, _, tensor in places.values()])
    adapters, prefix = has_adapters(cleaned.values()), prefix_of(cleaned.values())
    found = []
    for raws in by_identity.values():
        tensor = places[raws[0]][2]
        shape = flat[id(tensor)].shape if id(tensor) in flat else tensor.shape
        owners = tuple(places[raw][:2] for raw in raws)
        info = ParamInfo(
            name=cleaned[raws[0]],
            names=tuple(cleaned[raw] for raw in raws),
            shape=tuple(shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            types=frozenset(base.__name__ for owner, _ in owners for base in type(owner).__mro__),
            requires_grad=tensor.requires_grad or frozen_by_plan(tensor, owners),
        )
        if adapters and not info.requires_grad and not any(map(is_adapter, raws)):
            info = replace(info, adapted=True)
        if prefix:
            info = replace(info, prefix=prefix)
        found.append(Owned(info, tensor, owners))
    if not found:
        raise PlanError(f"the model {type(model).__name__} has no parameters.")
    return tuple(found)


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Return every place that holds a parameter, by its name with all prefixes of wrappers.

    Where FSDP2 shows a gathered copy for a while, the sharded parameter stands for it.
    """
    lasting = lasting_parameters(model)
    return {
        f"{path}.{attribute}" if path else attribute: (
            module,
            attribute,
            lasting.get((id(module), attribute), tensor),
        )
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, tensor in module._parameters.items()
        if tensor is not None
    }


def module_paths(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by their paths, without the prefixes that wrappers add."""
    raw, clean = next(iter(clean_names(_places(model)).items()))
    parts = [part for part in raw.split(".") if part not in _WRAPPERS]
    dropped = len(parts) - len(clean.split("."))  # the "module" of DDP, which may be the user's own
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = [part for part in path.split(".") if part and part not in _WRAPPERS]
        # of a wrapper and what it wraps, the latter
        found[".".join(inner[max(dropped, 0) :])] = module
    return found


def tensors_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model as it is now, by each of their names."""
    places = _places(model)
    cleaned = clean_names(places)
    return {cleaned[raw]: tensor for raw, (_, _, tensor) in places.items()}


def subtrees(
    model: nn.Module, owned: Iterable[Owned]
) -> list[tuple[str, nn.Module, frozenset[str]]]:
    """List every module that has parameters: path, module, names of those below it.

    Outer modules come before those inside them.
    """
    names = {(id(at), key): item.info.name for item in owned for at, key in item.places}
    own = {
        id(module): [
            names[id(module), key] for key in module._parameters if (id(module), key) in names
        ]
        for module in model.modules()
    }
    found = []
    for path, module in model.named_modules():
        below = frozenset(chain.from_iterable(own[id(inside)] for inside in module.modules()))
        if below:
            found.append((path, module, below))
    return found


def needs(model: nn.Module, owned: Iterable[Owned]) -> list[tuple[nn.Module, frozenset[str]]]:
    """Return every module with the names of the parameters that must be frozen for it to be frozen.

    They are those below it; for a module without any, those of all modules that use it (one
    dropout may be in several places). A wrapper whose mode is that of the module inside (of a
    compiled model) is left out.
    """
    parts = subtrees(model, owned)
    found = {id(module): below for _, module, below in parts}
    bare: dict[int, frozenset[str]] = {}
    for _, module, below in parts:
        for child in module.children():
            for inside in child.modules() if id(child) not in found else ():
                # Most have one user, whose set they share: a copy for each would be quadratic.
                known = bare.get(id(inside), below)
                bare[id(inside)] = below if known is below else known | below
    found |= bare
    return [
        (module, found[id(module)])
        for module in model.modules()
        if id(module) in found
        if not isinstance(getattr(type(module), "training", None), property)
    ]


def observe(model: nn.Module, owned: Iterable[Owned]) -> Observed:
    """Return what findings need to know of a model beside its parameters."""
    owned = tuple(owned)
    trains = {item.info.name: item.info.requires_grad for item in owned}
    reentrant: list[tuple[str, frozenset[str]]] = []
    stray = []
    hooked = False
    for path, module, below in subtrees(model, owned):
        path = _without_wrappers(path)
        hooked = hooked or bool(getattr(module, "_require_grads_hook", None))
        if _is_reentrant(module):  # the innermost are the segments
            reentrant = [item for item in reentrant if not below < item[1]] + [(path, below)]
        asked = module.__dict__.get("requires_grad")
        if isinstance(asked, bool) and any(trains[name] is not asked for name in below):
            stray.append((path, asked))
    compiled = any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
    segments = () if hooked else tuple(reentrant)
    split = _split_by_sharding(model, owned)
    statistics = _moving_statistics(model, owned)
    merged = merged_layers(model)
    typical = _typical_weights(owned)
    named = [(item.info.name, item.tensor) for item in owned]
    return Observed(
        compiled,
        segments,
        tuple(stray),
        tuple((_without_wrappers(name), key) for name, key in misspelt_flags(model, named)),
        tuple((_without_wrappers(place), ids) for place, ids in unregistered(model)),
        split,
        statistics,
        merged,
        typical,
    )


def _without_wrappers(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def _typical_weights(owned: Iterable[Owned]) -> dict[str, float]:
    """Return the median absolute value of some weights of each 16-bit parameter.

    What is sharded, or has no data yet, is left out; so are zeros, from which any step leads away.
    """
    found = {}
    for item in owned:
        tensor = item.tensor.detach()
        if item.info.dtype not in ("bfloat16", "float16") or type(item.tensor) not in PLAIN:
            continue
        if tensor.is_meta or not has_elements(tensor):
            continue
        some = tensor.reshape(-1)[:: max(1, tensor.numel() // _SAMPLED)].float().abs()
        some = some[some > 0]
        if some.numel():
            found[item.info.name] = float(some.median())
    return found


def _moving_statistics(
    model: nn.Module, owned: Iterable[Owned]
) -> tuple[tuple[str, frozenset[str]], ...]:
    """Return the modules that update running statistics in training mode, with their parameters.

    One that is in eval mode while the model trains is kept so by its owner. A model in eval mode
    tells nothing: it may just have been loaded.
    """
    paths = {id(module): path for path, module in module_paths(model).items()}
    return tuple(
        (paths[id(module)], below)
        for module, below in needs(model, owned)
        if getattr(module, "track_running_stats", False)
        and isinstance(getattr(module, "running_mean", None), torch.Tensor)
        and not is_locked(module)
        and (module.training or not model.training)
    )


def is_locked(module: nn.Module) -> bool:
    """Return whether a module is kept in eval mode through calls of `train`."""
    return getattr(module.__dict__.get("train"), "keeps_eval", False) is True


def _split_by_sharding(model: nn.Module, owned: Iterable[Owned]) -> tuple[tuple[str, ...], ...]:
    """Find ties across groups of `fully_shard`, which makes a parameter for each group."""
    name_of = {(id(at), key): item.info.name for item in owned for at, key in item.places}
    found: dict[int, dict[str, None]] = {}
    for module, attribute, origin in shard_origins(model):
        name = name_of.get((id(module), attribute))
        if name is not None:
            found.setdefault(origin, {})[name] = None
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def _is_reentrant(module: nn.Module) -> bool:
    """Return whether torch or Transformers checkpoints this module in the reentrant way."""
    if type(module).__name__ == "CheckpointWrapper":
        function = getattr(module, "checkpoint_fn", None)
    elif getattr(module, "gradient_checkpointing", False):
        function = getattr(module, "_gradient_checkpointing_func", None)
    else:
        return False
    return getattr(function, "keywords", {}).get("use_reentrant") is True


def frozen_by_plan(tensor: torch.Tensor, places: Iterable[tuple[nn.Module, str]]) -> bool:
    """Return whether a plan, and not the user, turned `requires_grad` of a parameter off."""
    if tensor in _FROZEN_BY:
        return bool(_FROZEN_BY[tensor] == "plan")
    return any(attribute in getattr(owner, MARK, ()) for owner, attribute in places)


def frozen_by_call(tensor: torch.Tensor) -> bool:
    """Return whether `lamina.freeze` turned `requires_grad` of a parameter off."""
    return bool(_FROZEN_BY.get(tensor) == "call")


def mark_frozen(places: Iterable[tuple[nn.Module, str]], by: str | None) -> None:
    """Remember what froze a parameter, for builds that come later.

    Args:
        places: the modules that hold the parameter, each with the name of the attribute.
        by: "plan", "call" for `lamina.freeze`, or None to forget.
    """
    for module, attribute in places:
        tensor = module._parameters.get(attribute)
        if tensor is not None and by is not None:
            _FROZEN_BY[tensor] = by
        elif tensor is not None and tensor in _FROZEN_BY:
            del _FROZEN_BY[tensor]
        marks = set(getattr(module, MARK, ()))
        marks = marks | {attribute} if by == "plan" else marks - {attribute}
        if marks:
            setattr(module, MARK, marks)
        elif hasattr(module, MARK):
            delattr(module, MARK)


def set_requires_grad(wanted: Iterable[tuple[str, torch.Tensor, bool]]) -> None:
    """Set `requires_grad` of all given parameters, or of none.

    Args:
        wanted: the name, the tensor and the new value of each.

    Raises:
        PlanError: if torch refuses one of them; every flag is as it was.
    """
    changed: list[torch.Tensor] = []
    at = ""
    try:
        for name, tensor, flag in wanted:
            if tensor.requires_grad != flag:
                at = name
                tensor.requires_grad_(flag)
                changed.append(tensor)
    except BaseException as error:
        for tensor in changed:
            tensor.requires_grad_(not tensor.requires_grad)
        if not isinstance(error, RuntimeError):
            raise
        raise PlanError(
            f"requires_grad of {at!r} cannot be changed ({error}). Nothing was changed. Make it "
            "a leaf Parameter of a floating-point dtype first."
        ) from error


def overlaps(owned: Sequence[Owned]) -> list[tuple[Owned, Owned]]:
    """Return pairs of Parameter objects that share elements, which would be stepped twice."""
    pairs = overlapping([item.tensor for item in owned])
    return [(owned[one], owned[other]) for one, other in pairs]


def overlap_fix(first: Owned, second: Owned) -> str:
    """Return what to do about two Parameters over the same memory."""
    one, other = first.info, second.info
    how = relation(first.tensor, second.tensor)
    if how == "same":
        return f"Tie them: lamina.tie(model, {{{other.name!r}: {one.name!r}}})."
    if one.shape != other.shape:
        why, such = f"Their shapes {one.shape} and {other.shape} differ", f"`{one.name}.T`"
    elif how == "transposed":
        why, such = "One is the other transposed", f"`{one.name}.T`"
    else:
        why, such = "They begin at different elements, or have other strides", "a slice"
    return (
        f"{why}, so they cannot be one Parameter: keep one over all of it, and compute with a view "
        f"of it in forward, such as {such}."
    )

"""The only file that walks a model: the names, owners and ties of its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from .errors import PlanError
from .memory import overlapping, relation
from .sharding import flat_parts, lasting_parameters, shard_origins

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

#: the attribute of a module that lists its parameters frozen by a plan (and not by the user)
MARK = "_lamina_frozen"


@dataclass(frozen=True)
class ParamInfo:
    """What patterns and per-parameter functions see of a parameter (no tensor).

    `names` are all names of a tied parameter, `name` the first; `types` the class names of the
    owning modules and their base classes; `depth` and `rank` what the rule at hand captured with
    `{depth}` (rank 0 is the lowest layer).
    """

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    types: frozenset[str]
    requires_grad: bool
    depth: int | None = None
    rank: int | None = None

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


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
    `split` the names that were one tensor until FSDP2 put them into different shard groups.
    """

    compiled: bool = False
    reentrant: tuple[tuple[str, frozenset[str]], ...] = ()
    stray: tuple[tuple[str, bool], ...] = ()
    split: tuple[tuple[str, ...], ...] = ()


def clean_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without the prefixes that wrappers (DDP, compile, checkpointing) add.

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
    """Every parameter of a model once, in order, with all its names.

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
    """`walk` without its refusal of Parameters that share memory."""
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
    flat = flat_parts(model)
    found = []
    for raws in by_identity.values():
        tensor = places[raws[0]][2]
        shape = flat[id(tensor)].shape if id(tensor) in flat else tensor.shape
        owners = tuple((places[raw][0], places[raw][1]) for raw in raws)
        info = ParamInfo(
            name=cleaned[raws[0]],
            names=tuple(cleaned[raw] for raw in raws),
            shape=tuple(shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            types=frozenset(base.__name__ for owner, _ in owners for base in type(owner).__mro__),
            requires_grad=tensor.requires_grad or _frozen_by_plan(owners),
        )
        found.append(Owned(info, tensor, owners))
    if not found:
        raise PlanError(f"the model {type(model).__name__} has no parameters.")
    return tuple(found)


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Every place that holds a parameter, by its name with all prefixes of wrappers.

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


def tensors_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model as it is now, by each of their names."""
    places = _places(model)
    cleaned = clean_names(places)
    return {cleaned[raw]: tensor for raw, (_, _, tensor) in places.items()}


def subtrees(
    model: nn.Module, owned: Iterable[Owned]
) -> list[tuple[str, nn.Module, frozenset[str]]]:
    """Every module that has parameters: its path, itself, the names of all parameters below it.

    Outer modules come before those inside them.
    """
    names = {(id(at), key): item.info.name for item in owned for at, key in item.places}
    found = []
    for path, module in model.named_modules():
        inside = ((id(m), key) for m in module.modules() for key in m._parameters)
        below = frozenset(names[place] for place in inside if place in names)
        if below:
            found.append((path, module, below))
    return found


def observe(model: nn.Module, owned: Iterable[Owned]) -> Observed:
    """What findings need to know of a model beside its parameters."""
    owned = tuple(owned)
    trains = {item.info.name: item.info.requires_grad for item in owned}
    reentrant: list[tuple[str, frozenset[str]]] = []
    stray = []
    hooked = False
    for path, module, below in subtrees(model, owned):
        path = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
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
    return Observed(compiled, segments, tuple(stray), _split_by_sharding(model, owned))


def _split_by_sharding(model: nn.Module, owned: Iterable[Owned]) -> tuple[tuple[str, ...], ...]:
    """Ties across groups of `fully_shard`: it makes a parameter of its own for each group."""
    name_of = {(id(at), key): item.info.name for item in owned for at, key in item.places}
    found: dict[int, dict[str, None]] = {}
    for module, attribute, origin in shard_origins(model):
        name = name_of.get((id(module), attribute))
        if name is not None:
            found.setdefault(origin, {})[name] = None
    return tuple(tuple(names) for names in found.values() if len(names) > 1)


def _is_reentrant(module: nn.Module) -> bool:
    """Whether torch or Transformers checkpoints this module in the reentrant way."""
    if type(module).__name__ == "CheckpointWrapper":
        function = getattr(module, "checkpoint_fn", None)
    elif getattr(module, "gradient_checkpointing", False):
        function = getattr(module, "_gradient_checkpointing_func", None)
    else:
        return False
    return getattr(function, "keywords", {}).get("use_reentrant") is True


def _frozen_by_plan(owners: tuple[tuple[nn.Module, str], ...]) -> bool:
    return any(attribute in getattr(owner, MARK, ()) for owner, attribute in owners)


def mark_frozen(owned_places: Iterable[tuple[nn.Module, str]], frozen: bool) -> None:
    """Note on the owning modules that a plan, not the user, froze these parameters (or undo)."""
    for module, attribute in owned_places:
        marks = set(getattr(module, MARK, ()))
        marks = marks | {attribute} if frozen else marks - {attribute}
        if marks:
            setattr(module, MARK, marks)
        elif hasattr(module, MARK):
            delattr(module, MARK)


def overlaps(found: Iterable[Owned]) -> list[tuple[Owned, Owned]]:
    """Pairs of Parameter objects that share elements, which would be stepped twice."""
    owned = list(found)
    pairs = overlapping([item.tensor for item in owned])
    return [(owned[one], owned[other]) for one, other in pairs]


def overlap_fix(first: Owned, second: Owned) -> str:
    """What to do about two Parameters over the same memory."""
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

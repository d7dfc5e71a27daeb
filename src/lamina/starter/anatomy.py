"""The parts of a model, found by its modules, shapes and their order, and not by names alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..model.parameters import Owned, ParamInfo, module_paths, walk
from .stacks import Inner, Stack, find_inner, find_stacks

_BATCH_NORM = "_BatchNorm"
#: of a part with more matrices, only the last one is the head
_HEAD_MATRICES = 2


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, each as the names of its parameters, in the order of the model.

    Args:
        infos: all parameters.
        stacks: the layers; several if they stand side by side.
        below: what stands before the layers: embeddings, the first convolution.
        above: what stands behind the layers and is not the head: a last norm, a pooler.
        head: what maps to the classes of a task, and most likely starts from random weights.
        output: what maps to the words of an embedding of the model, as in a language model; it may
            be tied to that.
        tokens: bare parameters that are no weight matrices: positions, class tokens, bias tables.
        frozen: what has requires_grad=False, unless under adapters.
        adapters: whether PEFT has put adapters into the model.
        inner: numbered modules of one kind inside of the layers, which are then stages.
    """

    infos: tuple[ParamInfo, ...]
    stacks: tuple[Stack, ...]
    below: tuple[str, ...]
    above: tuple[str, ...]
    head: tuple[str, ...]
    output: tuple[str, ...]
    tokens: tuple[str, ...]
    frozen: tuple[str, ...]
    adapters: bool
    inner: tuple[Inner, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers there are, in the stack that has the most."""
        return max((len(stack.numbers) for stack in self.stacks), default=0)

    def owns(self, kind: str) -> bool:
        """Return whether a parameter belongs to a module of this class."""
        return any(kind in info.types for info in self.infos)

    @property
    def convolves(self) -> bool:
        """Whether there are convolutions over images."""
        return self.owns("Conv2d")

    @property
    def batch_norms(self) -> tuple[str, ...]:
        """The names of the classes of BatchNorm that it has."""
        types = {info.types for info in self.infos if _BATCH_NORM in info.types}
        own = {kind for each in types for kind in each if kind.startswith("BatchNorm")}
        return tuple(sorted(own)) or ((_BATCH_NORM,) if types else ())


def examine(model: nn.Module) -> Anatomy:
    """Return the parts of a model; it may be on the meta device."""
    owned = walk(model)
    infos = tuple(item.info for item in owned)
    modules = module_paths(model)
    stacks = find_stacks(infos, modules)
    in_layers = {name for stack in stacks for name in stack.names}
    outside = [info for info in infos if info.name not in in_layers and info.ndim > 0]
    order = {info.name: place for place, info in enumerate(infos)}
    below = [info for info in outside if stacks and _is_below(info, stacks, order)]
    beneath = {info.name for info in below}
    above = [info for info in outside if stacks and info.name not in beneath]
    tied = tuple(info.name for info in infos if {"Embedding", "Linear"} <= info.types)
    output = (*tied, *_outputs(infos, above))
    head = _head(infos, above, output)
    named = {*head, *output}
    return Anatomy(
        infos,
        stacks,
        tuple(info.name for info in below),
        tuple(info.name for info in above if info.name not in named),
        head,
        output,
        tuple(item.info.name for item in owned if _is_token(item)),
        tuple(info.name for info in infos if not info.requires_grad and not info.adapted),
        any(info.adapted for info in infos),
        tuple(inner for stack in stacks for inner in find_inner(stack, modules)),
    )


def _is_below(info: ParamInfo, stacks: Sequence[Stack], order: dict[str, int]) -> bool:
    """Return whether a parameter stands before the layers next to it; embeddings always do."""
    if "Embedding" in info.types:
        return True
    nearest = max(stacks, key=lambda stack: _common(info.name, stack.prefix))
    return order[info.name] < order[nearest.names[0]]


def _common(name: str, prefix: str) -> int:
    """Return how many parts two names have in common from their beginning."""
    count = 0
    for one, other in zip(name.split("."), prefix.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def _outputs(infos: Sequence[ParamInfo], above: Sequence[ParamInfo]) -> tuple[str, ...]:
    """Return matrices with a row for each word of an embedding, and what belongs to them."""
    words = {info.shape[0] for info in infos if "Embedding" in info.types and info.ndim == 2}
    largest = max(words, default=0)
    matrices = [info for info in above if info.ndim == 2 and info.shape[0] == largest > 0]
    modules = {info.name.rpartition(".")[0] for info in matrices}
    return tuple(info.name for info in above if info.name.rpartition(".")[0] in modules)


def _head(
    infos: Sequence[ParamInfo], above: Sequence[ParamInfo], output: Sequence[str]
) -> tuple[str, ...]:
    """Return what maps features to classes: branches of the model behind the layers.

    A square last matrix is a pooler or a projection and not a head.
    """
    depth = _shared_depth([info.name for info in infos])
    branches: dict[str, list[ParamInfo]] = {}
    for info in infos:
        branches.setdefault(".".join(info.name.split(".")[: depth + 1]), []).append(info)
    kept = {info.name for info in above} - set(output)
    found: list[str] = []
    for its in branches.values():
        matrices = [info for info in its if info.ndim == 2]
        behind = all(info.name in kept for info in its)
        if not behind or not matrices or len(set(matrices[-1].shape)) == 1:
            continue
        chosen = its
        if len(matrices) > _HEAD_MATRICES:
            module = matrices[-1].name.rpartition(".")[0]
            chosen = [info for info in its if info.name.rpartition(".")[0] == module]
        found += [info.name for info in chosen]
    return tuple(found)


def _shared_depth(names: Iterable[str]) -> int:
    """Return how many parts all names begin with in common."""
    rows = [name.split(".")[:-1] for name in names]
    count = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _is_token(item: Owned) -> bool:
    """Return whether a parameter with several dimensions is no weight of a layer.

    Such are class tokens and positions, with one entry for the batch, and tables of biases; a
    module that computes with a matrix calls it a weight.
    """
    if item.info.ndim < 2 or "Embedding" in item.info.types:
        return False
    if any(attribute.endswith("weight") for _, attribute in item.places):
        return False
    has_parts = any(next(module.children(), None) is not None for module, _ in item.places)
    single = item.info.shape[0] == 1
    return single or (not has_parts and any("bias" in attribute for _, attribute in item.places))

"""Finding the layers of a model: modules that are numbered and alike, such as `encoder.layer.N`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..model.parameters import ParamInfo

_NUMBERED = re.compile(r"([^\W\d]*)(\d{1,6})")
#: a smaller part of a model is not what is meant by its layers
_SHARE = 0.1
#: modules that only hold others: two of them in a row are more likely a body and a head
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


@dataclass(frozen=True)
class Stack:
    """Layers in a row.

    Args:
        prefix: what stands before the number: `encoder.layer.`, or `layer` of `layer1.0.conv1`.
        numbers: of the layers, in order.
        names: their parameters.
        kind: the class of most of the layers.
    """

    prefix: str
    numbers: tuple[int, ...]
    names: tuple[str, ...]
    kind: str

    @property
    def word(self) -> str:
        """The last word of the prefix, such as "layer"."""
        return self.prefix.strip(".").rpartition(".")[2]


def find_stacks(infos: Sequence[ParamInfo], modules: Mapping[str, nn.Module]) -> tuple[Stack, ...]:
    """Return the layers of a model: one stack, or several side by side (encoder and decoder).

    Of several numbers in a name the outermost counts: the stages of a network whose stages have
    numbered blocks.

    Args:
        infos: the parameters.
        modules: the modules by their paths.
    """
    numel = {info.name: info.numel for info in infos}
    matrices = [info for info in infos if "Embedding" not in info.types]
    total = sum(info.numel for info in matrices) or 1
    found: list[Stack] = []
    taken: set[str] = set()
    for prefix, layers in sorted(_numbered(matrices).items(), key=lambda item: item[0].count(".")):
        names = [name for its in layers.values() for name in its]
        kind = _kind(prefix, layers, modules)
        if kind is None or not taken.isdisjoint(names):
            continue
        if sum(map(numel.__getitem__, names)) < _SHARE * total:
            continue
        inside = {f"{prefix}{number}" for number in layers}
        every = [info.name for info in infos if _start(info.name, prefix) in inside]
        found.append(Stack(prefix, tuple(sorted(layers)), tuple(every), kind))
        taken |= set(every)
    if not found:
        return ()
    longest = max(found, key=lambda stack: len(stack.numbers))
    return tuple(stack for stack in found if _are_parallel(stack, longest))


def _are_parallel(one: Stack, other: Stack) -> bool:
    """Return whether two stacks are of one kind, as encoder and decoder are."""
    return one.kind == other.kind or (one.word == other.word and one.word != "")


def _numbered(infos: Sequence[ParamInfo]) -> dict[str, dict[int, list[str]]]:
    """Return parameters by what stands before each number of their names, then by the number."""
    found: dict[str, dict[int, list[str]]] = {}
    for info in infos:
        parts = info.name.split(".")
        for place, part in enumerate(parts[:-1]):
            match = _NUMBERED.fullmatch(part)
            # In `layer1.0.conv1.weight` a number ends a word; `fc1.weight` is no layer of layers.
            if match is None or (match[1] and place + 2 >= len(parts)):
                continue
            before = ".".join(parts[:place])
            prefix = f"{before}.{match[1]}" if before else match[1]
            found.setdefault(prefix, {}).setdefault(int(match[2]), []).append(info.name)
    return found


def _start(name: str, prefix: str) -> str:
    """Return the prefix with the number behind it that a name begins with, if it does."""
    match = re.match(rf"{re.escape(prefix)}\d+(?=\.)", name)
    return match[0] if match else ""


def _kind(
    prefix: str, layers: Mapping[int, list[str]], modules: Mapping[str, nn.Module]
) -> str | None:
    """Return the class of most layers; None if these are no layers of one kind."""
    paths = [_start(names[0], prefix) for names in layers.values()]
    kinds = Counter(type(modules[path]).__name__ for path in paths if path in modules)
    if not kinds:
        return None
    kind, count = kinds.most_common(1)[0]
    needed = 3 if kind in _CONTAINERS else 2
    return kind if count >= needed and 2 * count >= len(layers) else None


@dataclass(frozen=True)
class Inner:
    """Numbered modules of one kind inside of a layer, which is then a stage.

    Args:
        stage: the number of the layer.
        path: what stands before their numbers, such as `layers.2.blocks`.
        numbers: of these modules.
    """

    stage: int
    path: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        first, last = self.numbers[0], self.numbers[-1]
        return f"{self.path}.{first}" + (f" to {last}" if last != first else "")


def find_inner(stack: Stack, modules: Mapping[str, nn.Module]) -> tuple[Inner, ...]:
    """Return the numbered modules inside of each layer; nothing if no layer has several.

    Sublayers such as attention and feed-forward may be numbered too, but are of several kinds.
    """
    found = []
    for number in stack.numbers:
        layer = f"{stack.prefix}{number}"
        inside = modules.get(layer)
        for path, module in {layer: inside, **_children(layer, inside)}.items():
            blocks = [name for name in _children(path, module) if name.rpartition(".")[2].isdigit()]
            kinds = {type(modules[name]).__name__ for name in blocks if name in modules}
            whole = all(_children(name, modules.get(name)) for name in blocks)
            if len(kinds) == 1 and whole:
                numbers = tuple(int(name.rpartition(".")[2]) for name in blocks)
                found.append(Inner(number, path, numbers))
                break
    return tuple(found) if any(len(each.numbers) > 1 for each in found) else ()


def _children(path: str, module: nn.Module | None) -> dict[str, nn.Module]:
    return {} if module is None else {f"{path}.{k}": each for k, each in module.named_children()}

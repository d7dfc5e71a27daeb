"""What is legal but probably not intended: stable codes, causes with names, and a fix."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .._util.text import agree, listed
from .parameters import Observed

#: codes of what may well be meant; all others are probably mistakes
ADVICE = frozenset(
    {
        *("clip-always", "clip-never", "group-per-tensor", "trains-in-eval-mode", "update-ratio"),
        "weight-decay-everywhere",
    }
)


@dataclass(frozen=True)
class Finding:
    """Something legal but suspicious: a stable code, the cause with names, the fix."""

    code: str
    message: str
    fix: str

    @property
    def severity(self) -> str:
        """`"advice"` for what may well be meant, `"problem"` for everything else."""
        return "advice" if self.code in ADVICE else "problem"

    def __str__(self) -> str:
        return f"{self.code}: {self.message} {self.fix}"


def moving_statistics(by_hand: Mapping[str, bool], seen: Observed) -> Iterator[Finding]:
    """Find the modules frozen by hand whose running statistics are updated all the same.

    Args:
        by_hand: the names of all parameters, and whether each was frozen by hand.
        seen: what was observed of the model.
    """
    paths = [path for path, below in seen.statistics if all(by_hand.get(name) for name in below)]
    if paths:
        frozen = _frozen_as_a_whole(by_hand)
        pattern = " | ".join(dict.fromkeys(_outermost(path, frozen) for path in paths))
        yield Finding(
            "statistics-drift",
            f"the parameters of {listed(paths)} were frozen by hand, but its running statistics "
            "go on moving in training mode.",
            f"Keep it in eval mode: call lamina.freeze(model, {pattern!r}) before the build, or "
            f"add the rule lamina.Rule({pattern!r}, frozen=True). If the statistics are to adapt, "
            f"say so: lamina.Rule({pattern!r}, frozen=True, hold=False).",
        )


def _frozen_as_a_whole(by_hand: Mapping[str, bool]) -> set[str]:
    """Return the paths of all modules that have parameters, each of them frozen by hand."""
    paths: set[str] = set()
    with_others: set[str] = set()
    for name, frozen in by_hand.items():
        around = _paths_around(name)
        paths.update(around)
        if not frozen:
            with_others.update(around)
    return paths - with_others


def _paths_around(name: str) -> list[str]:
    """Return the paths of the modules around a parameter, from the outermost to the innermost."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


def _outermost(path: str, frozen: set[str]) -> str:
    """Return the pattern of the largest part around a module that is frozen by hand as a whole."""
    around = (*_paths_around(path), path)
    return next((outer or "*" for outer in around if outer in frozen), path)


def stray_findings(seen: Observed) -> Iterator[Finding]:
    """Find attributes `requires_grad` of modules, which freeze and thaw nothing."""
    for path, value in seen.stray:
        yield Finding(
            "module-requires-grad",
            f"{f'the module {path!r}' if path else 'the model'} has an attribute "
            f"requires_grad={value}, which does nothing on a module.",
            f"Call lamina.{'thaw' if value else 'freeze'}(model, {path or '*'!r}) instead.",
        )


def attribute_findings(seen: Observed, held: Collection[int] = ()) -> Iterator[Finding]:
    """Find attributes that were meant to freeze, and layers that the model does not know.

    Args:
        seen: what was observed of the model.
        held: the ids of the tensors that optimizers hold.
    """
    yield from stray_findings(seen)
    if seen.misspelt:
        names = list(dict.fromkeys(name for name, _ in seen.misspelt))
        yield Finding(
            "requires-grad-misspelt",
            f"{listed(names)} {agree(names, 'has', 'have')} an attribute "
            f"{seen.misspelt[0][1]!r}, which freezes and thaws nothing.",
            "The flag is requires_grad: call requires_grad_(False) on a parameter or a module, or "
            "lamina.freeze(model, pattern).",
        )
    for place, ids in seen.unregistered:
        if not ids <= set(held):
            count = f"{len(ids)} trainable parameter{'s' * (len(ids) > 1)}"
            yield Finding(
                "not-registered",
                f"{place!r} holds {count} that the model does not know: "
                f"{agree(list(ids), 'it is', 'they are')} in no optimizer, and neither saved nor "
                "moved with the model.",
                "Keep layers in nn.ModuleList or nn.ModuleDict, and parameters in "
                "nn.ParameterList. What is not to train needs requires_grad_(False).",
            )


def merged_adapters(layers: Sequence[str]) -> Iterator[Finding]:
    """Find adapters that PEFT has merged into the base, and that get no gradient there."""
    if layers:
        yield Finding(
            "adapters-merged",
            f"the adapters of {listed(layers)} are merged into the base: they get no gradient.",
            "Call model.unmerge_adapter() before training goes on. To train the merged model "
            "itself, use merge_and_unload() and build the plan on what it returns.",
        )


def adapters_removed(names: Sequence[str]) -> Finding:
    """Return the finding on adapters that were taken out of the model after the build."""
    return Finding(
        "adapters-removed",
        f"{listed(names)} {agree(names, 'is', 'are')} not in the model any more "
        f"(merge_and_unload, delete_adapter?): what {agree(names, 'its', 'their')} updates were "
        "for is merged or gone.",
        "Merge adapters after the training. To train the merged model, thaw it and build the plan "
        "on it; it is a new optimizer.",
    )


def split_ties(seen: Observed) -> Iterator[Finding]:
    """Find parameters that were one tensor until they were sharded in different groups."""
    for names in seen.split:
        yield Finding(
            "tie-across-shards",
            f"{' and '.join(names)} were one tensor until fully_shard put their modules into "
            "different groups, which made a parameter of each; torch 2.13 refuses the first "
            "forward of such a model.",
            "Shard their modules in one call, fully_shard([module, other]), or leave both to the "
            "group of a module that holds both.",
        )

"""What can be said of a model, its optimizers and their schedulers before any step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .._util.text import agree, listed
from ..errors import PlanError
from ..model.finding import Finding, attribute_findings, moving_statistics
from ..model.parameters import Owned, collect, observe, overlap_fix, overlaps
from ..optimizer.optimizer import Optimizer as PlanOptimizer
from .lengths import all_of

#: groups with one tensor each, from which on they slow a step down noticeably
_MANY_GROUPS = 20
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "_NormBase", "LocalResponseNorm")


def check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    scheduler: Any = None,
) -> tuple[Finding, ...]:
    """Find mistakes in a model, its optimizer and its scheduler, without taking a step.

    Args:
        model: the model that is trained.
        optimizer: its optimizer, or a sequence of all its optimizers; of torch, lamina or another
            package.
        scheduler: the scheduler, or a sequence of them.

    Returns:
        The findings, each with a stable code, the cause and the fix; see
        docs/reference/findings.md. Those whose `severity` is `"advice"` may well be meant.

    Raises:
        PlanError: if the model is no module or the optimizer no optimizer.

    Example:
        >>> import torch, lamina as lm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
        >>> [finding.code for finding in check(model, optimizer)]
        ['not-in-optimizer']
    """
    if isinstance(model, torch.optim.Optimizer):
        raise _swapped(model, "model")
    owned = collect(model)
    optimizers = _listed(optimizer, torch.optim.Optimizer, "optimizer", "a torch.optim.Optimizer")
    schedulers = [] if scheduler is None else _sequence(scheduler)
    names = {id(item.tensor): item.info.name for item in owned}
    found: list[Finding] = []
    for each in optimizers:
        if isinstance(each, PlanOptimizer):
            found += each.check(model)
        else:
            found += optimizer_findings(each, names, owned)
    if not any(isinstance(each, PlanOptimizer) for each in optimizers):
        found += model_findings(model, owned, optimizers)
    for each in schedulers:
        found += scheduler_findings(each)
    return tuple(dict.fromkeys(found))


def _sequence(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _listed(given: Any, kind: type, argument: str, expected: str) -> list[Any]:
    items = _sequence(given)
    for item in items:
        if isinstance(item, nn.Module):
            raise _swapped(item, argument)
        if not isinstance(item, kind):
            raise PlanError(
                f"{argument} is of type {type(item).__name__}; expected {expected}, or a sequence "
                f"of them. Pass what trains the model, such as torch.optim.AdamW(...)."
            )
    if not items:
        raise PlanError(f"{argument} is empty; expected {expected}.")
    return items


def _swapped(given: Any, argument: str) -> PlanError:
    """Return the error for an argument that was given in the place of another one."""
    return PlanError(
        f"check was given {type(given).__name__} as the {argument}; expected the order "
        "lamina.check(model, optimizer, scheduler)."
    )


def model_findings(
    model: nn.Module, owned: Sequence[Owned], optimizers: Iterable[torch.optim.Optimizer]
) -> Iterator[Finding]:
    """Find what is wrong between a model and all its optimizers."""
    held = {
        id(param) for each in optimizers for group in each.param_groups for param in group["params"]
    }
    replaced = replaced_names(owned, optimizers)
    outside = [
        item.info.name
        for item in owned
        if item.tensor.requires_grad and id(item.tensor) not in held
    ]
    if replaced:
        yield replaced_finding(replaced)
    left_out = [name for name in outside if name not in replaced]
    if left_out:
        yield not_in_optimizer(left_out, with_gradient=False)
    seen = observe(model, owned)
    by_hand = {item.info.name: not item.info.requires_grad for item in owned}
    yield from attribute_findings(seen, held)
    yield from moving_statistics(by_hand, seen)
    yield from untied(model)
    for one, other in overlaps(owned):
        yield Finding(
            "shared-memory",
            f"{one.info.name!r} and {other.info.name!r} are two Parameters over the same memory.",
            overlap_fix(one, other),
        )


def replaced_names(
    owned: Sequence[Owned], optimizers: Iterable[torch.optim.Optimizer]
) -> list[str]:
    """Return parameters of a model that took the place of one that an optimizer still holds.

    They are as many as those that are in the optimizer and no longer in the model, or have the
    shape of one of these.
    """
    here = {id(item.tensor) for item in owned}
    params = [
        param for each in optimizers for group in each.param_groups for param in group["params"]
    ]
    held = {id(param) for param in params}
    if not here & held:
        return []  # optimizers of another model
    gone = [tuple(param.shape) for param in params if id(param) not in here]
    outside = [item for item in owned if item.tensor.requires_grad and id(item.tensor) not in held]
    if len(gone) == len(outside):
        return [item.info.name for item in outside]
    return [item.info.name for item in outside if tuple(item.tensor.shape) in gone]


def replaced_finding(names: Sequence[str]) -> Finding:
    """Return the finding on parameters that were replaced after the optimizer was built."""
    return Finding(
        "parameter-replaced",
        f"replaced in the model after the optimizer was built: {listed(names)}. The optimizer "
        "updates the old one; the new one does not train.",
        "Build the optimizer after the last change to the model.",
    )


def not_in_optimizer(names: Sequence[str], with_gradient: bool) -> Finding:
    """Return the finding on trainable parameters that no optimizer holds."""
    also = f" and {agree(names, 'receives', 'receive')} gradients" if with_gradient else ""
    return Finding(
        "not-in-optimizer",
        f"{listed(names)} {agree(names, 'has', 'have')} requires_grad=True{also}, but "
        f"{agree(names, 'is', 'are')} in no optimizer: "
        f"{agree(names, 'it never trains', 'they never train')}.",
        f"Give {agree(names, 'it', 'them')} to the optimizer, or freeze "
        f"{agree(names, 'it', 'them')} with requires_grad_(False), which saves the computation of "
        f"{agree(names, 'its', 'their')} gradients.",
    )


def untied(model: nn.Module) -> Iterator[Finding]:
    """Find a tie that the configuration of a Transformers model asks for and that is not there."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False) is not True:
        return
    if not (hasattr(model, "get_input_embeddings") and hasattr(model, "get_output_embeddings")):
        return
    asked: Any = model
    try:
        inner, outer = asked.get_input_embeddings(), asked.get_output_embeddings()
    except (AttributeError, NotImplementedError):  # as models without words answer
        return
    one, other = getattr(inner, "weight", None), getattr(outer, "weight", None)
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return
    if one is not other and one.shape == other.shape:
        paths = {id(module): path for path, module in model.named_modules()}
        first, second = paths.get(id(inner), "the embedding"), paths.get(id(outer), "the head")
        yield Finding(
            "tie-broken",
            f"{first}.weight and {second}.weight should be one parameter "
            "(config.tie_word_embeddings=True), but are two.",
            "Call model.tie_weights() after what broke it, before the optimizer is built.",
        )


def optimizer_findings(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], owned: Sequence[Owned]
) -> Iterator[Finding]:
    """Find what is wrong in the groups of one optimizer.

    Args:
        optimizer: any optimizer but that of a plan, whose groups lamina makes.
        names: the name of each parameter by its `id`.
        owned: the parameters of its models.
    """
    groups = optimizer.param_groups
    yield from _listed_twice(groups, names)
    yield from _shared_lr(groups)
    yield from _negative_lr(groups)
    yield from _group_per_tensor(groups)
    yield from _decayed(groups, owned)


def _listed_twice(
    groups: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> Iterator[Finding]:
    seen: set[int] = set()
    twice: dict[str, None] = {}
    for number, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            if id(param) in seen:
                twice[names.get(id(param), f"parameter {place} of group {number}")] = None
            seen.add(id(param))
    if twice:
        yield listed_twice(list(twice), "is listed twice in the optimizer")


def listed_twice(names: Sequence[str], how: str) -> Finding:
    """Return the finding on parameters that are updated twice."""
    return Finding(
        "listed-twice",
        f"{listed(names)} {how}: a step would update it twice. It may be one tensor under two "
        "names (tied).",
        "List it once: model.parameters() gives a tied parameter once, a concatenation of the "
        "parameters of two parts gives it twice.",
    )


def _shared_lr(groups: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    first: dict[int, int] = {}
    for number, group in enumerate(groups):
        lr = group.get("lr")
        if isinstance(lr, torch.Tensor) and id(lr) in first:
            yield Finding(
                "shared-lr-tensor",
                f"groups {first[id(lr)]} and {number} hold the same tensor as lr: whatever changes "
                "the lr of one in place changes that of the other.",
                "Give each group a tensor of its own: lr=lr.clone().",
            )
            return
        first[id(lr)] = number


def _negative_lr(groups: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    for number, group in enumerate(groups):
        lr = group.get("lr")
        if isinstance(lr, (int, float)) and lr < 0:
            yield negative_lr(f"group {number}", float(lr), None)


def negative_lr(group: str, lr: float, step: int | None) -> Finding:
    """Return the finding on a negative lr."""
    when = "" if step is None else f" at step {step}"
    return Finding(
        "lr-negative",
        f"the lr of {group} is {lr:g}{when}: the loss is climbed instead of descended.",
        "A linear or polynomial decay that is followed past its end goes below 0: end it with "
        "max(0, ...), or make it as long as the run.",
    )


def _group_per_tensor(groups: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    single = [group for group in groups if len(group["params"]) == 1]
    kinds = {
        repr([(key, value) for key, value in sorted(group.items()) if key not in _NOT_SETTINGS])
        for group in single
    }
    if len(single) >= _MANY_GROUPS and len(kinds) <= len(single) // 2:
        yield Finding(
            "group-per-tensor",
            f"{len(single)} groups hold one tensor each, with {len(kinds)} different settings: "
            "the optimizer works on each group by itself, which makes a step slow.",
            "Put the parameters with equal settings into one group.",
        )


_NOT_SETTINGS = ("params", "param_names", "name", "initial_lr")


def _decayed(groups: Sequence[Mapping[str, Any]], owned: Sequence[Owned]) -> Iterator[Finding]:
    decays = {id(param): group.get("weight_decay") for group in groups for param in group["params"]}
    norms, biases, embeddings = [], [], []
    for item in owned:
        decay = decays.get(id(item.tensor))
        if not isinstance(decay, (int, float)) or decay <= 0 or not item.tensor.requires_grad:
            continue
        if item.info.types & set(_NORMS):
            norms.append(item.info.name)
        elif item.info.name.endswith("bias"):
            biases.append(item.info.name)
        elif item.info.types == {"Embedding"}:  # a tied head is a matrix, too
            embeddings.append(item.info.name)
    kinds = (("norm", norms, "s"), ("bias", biases, "es"), ("embedding", embeddings, "s"))
    told = [
        f"{len(names)} {kind}{plural * (len(names) > 1)} ({names[0]})"
        for kind, names, plural in kinds
        if names
    ]
    if told:
        yield Finding(
            "weight-decay-everywhere",
            f"weight decay acts on {listed(told)}, which most recipes leave out.",
            "Put them into a group with weight_decay=0. In a plan: "
            f'lamina.Rule("ndim<2{" | type:Embedding" * bool(embeddings)}", weight_decay=0).',
        )


def scheduler_findings(scheduler: Any, lr_before: Sequence[Any] = ()) -> Iterator[Finding]:
    """Find what is wrong in a scheduler.

    Args:
        scheduler: any scheduler.
        lr_before: the lr of each group before it was built, if that was seen.
    """
    for each in all_of(scheduler):
        yield from _floor(each)
        yield from _never_reduces(each)
    yield from _peak(scheduler, lr_before)


def _lr_of_groups(scheduler: Any) -> list[float]:
    """Return the lr that a schedule starts from, for each group."""
    found = []
    for group in getattr(getattr(scheduler, "optimizer", None), "param_groups", ()):
        lr = group.get("initial_lr", group.get("lr"))
        found.append(float(lr))
    return found


def _per_group(value: Any, count: int) -> list[float]:
    return [float(each) for each in value] if isinstance(value, (list, tuple)) else [value] * count


def _floor(scheduler: Any) -> Iterator[Finding]:
    kind = type(scheduler).__name__
    lrs = _lr_of_groups(scheduler)
    if hasattr(scheduler, "min_lrs"):
        name, floors = "min_lr", _per_group(scheduler.min_lrs, len(lrs))
    elif isinstance(getattr(scheduler, "eta_min", None), (int, float)):
        name, floors = "eta_min", _per_group(scheduler.eta_min, len(lrs))
    else:
        return
    low = [(i, lr, f) for i, (lr, f) in enumerate(zip(lrs, floors, strict=False)) if f > lr > 0]
    if low:
        number, lr, floor = low[0]
        yield Finding(
            "floor-raises-lr",
            f"{kind}({name}={floor:g}) raises the lr of group {number}, which is {lr:g}: the floor "
            "is absolute, and the ratios between groups end at 1.",
            "Give a floor below every lr, or one for each group as a share of its lr; "
            "lamina.cosine(to=0.01) is a factor.",
        )


def _never_reduces(scheduler: Any) -> Iterator[Finding]:
    if not (hasattr(scheduler, "min_lrs") and hasattr(scheduler, "eps")):
        return
    lrs = _lr_of_groups(scheduler)
    floors = _per_group(scheduler.min_lrs, len(lrs))
    stuck = [
        (number, lr)
        for number, (lr, floor) in enumerate(zip(lrs, floors, strict=False))
        if lr > floor and lr - max(lr * scheduler.factor, floor) <= scheduler.eps
    ]
    if stuck:
        number, lr = stuck[0]
        yield Finding(
            "plateau-never-reduces",
            f"{type(scheduler).__name__} ignores reductions of no more than eps={scheduler.eps:g}, "
            f"so that the lr of group {number}, {lr:g}, is never reduced.",
            "Pass eps=0.",
        )


def _peak(scheduler: Any, lr_before: Sequence[Any]) -> Iterator[Finding]:
    groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", ())
    peaks = {float(group["max_lr"]) for group in groups if "max_lr" in group}
    before = {float(lr) for lr in lr_before if lr is not None}
    if type(scheduler).__name__ in ("OneCycleLR", "CyclicLR") and len(peaks) == 1 < len(before):
        yield Finding(
            "peak-erases-ratios",
            f"{type(scheduler).__name__}(max_lr={peaks.pop():g}) gives all {len(groups)} groups "
            f"one peak; before, their lr was {listed([f'{lr:g}' for lr in sorted(before)])}.",
            "Pass a peak for each group: max_lr=[group['lr'] for group in optimizer.param_groups].",
        )

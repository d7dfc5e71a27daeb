"""What is legal in a plan but suspicious: stable codes, causes with names, fixes."""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from .._util.text import agree, listed, quoted
from ..algorithms.registry import hyperparameters, is_whole_vector, optimizer_name
from ..model.finding import (
    Finding,
    attribute_findings,
    merged_adapters,
    moving_statistics,
    split_ties,
)
from ..model.parameters import Observed, ParamInfo
from ..plan.plan import Plan
from ..schedules.base import Floats
from ..schedules.duration import Run
from .cascade import Draft
from .resolved import NEVER, Cell, Scope, Setting, Trigger, Windows
from .timeline import product

#: how often dynamo compiles a function anew, where torch does not say
_RECOMPILE_LIMIT = 8
#: the lr above which an optimizer hardly ever trains: about 1 where a step has the length of lr
_LARGE_LR = {"SGD": 100.0, "LARS": 1000.0} | dict.fromkeys(
    ("Adam", "AdamW", "RMSprop", "LAMB", "LayerAdaptiveAdam", "Muon"), 1.0
)
#: optimizers of which a step moves every number by about lr
_MOVES_BY_LR = ("Adam", "AdamW", "RMSprop")
_NO_GRADIENT = (
    'loss.backward() raises "element 0 of tensors does not require grad and does not have a '
    'grad_fn"'
)


def find(
    plan: Plan,
    drafts: Sequence[Draft],
    cells: Sequence[Cell],
    run: Run,
    seen: Observed,
    scopes: Sequence[Scope],
) -> tuple[Finding, ...]:
    """Return all findings of a resolved plan."""
    by_hand = {name: draft.by_model for draft in drafts for name in draft.info.names}
    windows = {draft.info.name: draft.windows for draft in drafts}
    return (
        *_nothing_trains(drafts, run),
        *_cannot_train(drafts),
        *_set_but_never_trains(plan, drafts),
        *_thaw_after_end(drafts, run),
        *_frozen_by_model(drafts),
        *_lr_zero(cells),
        *_rules_without_effect(plan, drafts),
        *_suspicious(cells, run),
        *_rounds_to_nothing(cells, run, seen),
        *_unchecked(plan, cells, scopes),
        *moving_statistics(by_hand, seen),
        *model_findings(windows, run, seen),
    )


def model_findings(windows: Mapping[str, Windows], run: Run, seen: Observed) -> tuple[Finding, ...]:
    """Find what the windows of all parameters mean for this kind of model."""
    return (
        *_too_many_stages(windows, run, seen),
        *_reentrant_behind_frozen(windows, seen),
        *attribute_findings(seen),
        *merged_adapters(seen.merged),
        *split_ties(seen),
    )


def _nothing_trains(drafts: Sequence[Draft], run: Run) -> Iterator[Finding]:
    """Find the spans of steps in which no parameter trains."""
    spans = {span for draft in drafts for span in draft.windows}
    if not spans:
        yield Finding(
            "nothing-trains",
            f"every parameter is frozen for the whole run, so that {_NO_GRADIENT}.",
            "Add a rule with frozen=False or thaw= for the parts that should train.",
        )
        return
    waits = sorted({begin.reaction.metric for begin, _ in spans if isinstance(begin, Trigger)})
    unless = f" unless {listed(waits)} has stalled by then" if waits else ""
    for begin, end in _gaps({(begin, end) for begin, end in spans if isinstance(begin, int)}, run):
        yield Finding(
            "nothing-trains",
            f"nothing trains {_span_text(begin, end)}{unless}: {_NO_GRADIENT} there, and the run "
            "stops.",
            "Let some part train at every step: thaw it earlier, freeze it later, or end the run "
            "where the training ends.",
        )


def _gaps(spans: set[tuple[int, int | None]], run: Run) -> list[tuple[int, float]]:
    """Return the spans of steps of a run that no window covers."""
    last = math.inf if run.steps is None else run.steps
    covered, gaps = 0.0, []
    for begin, end in sorted(spans, key=lambda span: span[0]):
        if begin > covered:
            gaps.append((int(covered), min(begin, last)))
        covered = max(covered, math.inf if end is None else end)
    if covered < last:
        gaps.append((int(covered), last))
    return [(begin, end) for begin, end in gaps if begin < end]


def _span_text(begin: int, end: float) -> str:
    if end == math.inf:
        return f"from step {begin} on"
    return f"in step {begin}" if end == begin + 1 else f"in steps {begin} to {end - 1:.0f}"


def _cannot_train(drafts: Sequence[Draft]) -> Iterator[Finding]:
    """Find the parameters whose dtype has no gradients.

    A quantized base under PEFT's adapters is meant to rest, unless a rule asks for it by name.
    """
    found: dict[str, list[str]] = {}
    for draft in drafts:
        meant = draft.info.adapted and draft.by_model
        if not draft.info.differentiable and not meant:
            found.setdefault(draft.info.dtype, []).append(draft.info.name)
    for dtype, names in found.items():
        yield Finding(
            "cannot-train",
            f"{listed(names)} {agree(names, 'has', 'have')} dtype {dtype}, which has no gradients: "
            f"{agree(names, 'it stays', 'they stay')} frozen, whatever the rules say.",
            f"To train {agree(names, 'it, convert it', 'them, convert them')} to a floating-point "
            "dtype before the build; otherwise train other parameters beside it, such as scales or "
            "adapters.",
        )


def turned_on(names: Sequence[str], by_model: bool) -> Finding:
    """Return the finding on parameters that the plan freezes and that have `requires_grad`."""
    if by_model:
        return Finding(
            "requires-grad-on",
            f"requires_grad of {listed(names)} was False at build and was turned on since, but the "
            f"plan does not train {agree(names, 'it', 'them')}.",
            f"To train {agree(names, 'it', 'them')}, build the optimizer again from the plan, with "
            "resume=optimizer.state_dict(). The gradients are left alone, for an optimizer other "
            "than lamina's.",
        )
    return Finding(
        "requires-grad-on",
        f"{listed(names)} {agree(names, 'is', 'are')} frozen by the plan now, but requires_grad "
        "was turned on: the gradients are dropped.",
        f"To train {agree(names, 'it, give its', 'them, give their')} rule thaw= or frozen=False, "
        "call optimizer.release(), and build again with resume=optimizer.state_dict(). To keep "
        f"{agree(names, 'it', 'them')} frozen, leave requires_grad alone.",
    )


def turned_off(names: Sequence[str]) -> Finding:
    """Return the finding on parameters that the plan trains and that lost `requires_grad`."""
    return Finding(
        "requires-grad-off",
        f"{listed(names)} should train now, but has requires_grad=False.",
        "Something else froze it after the plan was built. Say it in the plan (frozen=True, "
        f"freeze=), or turn it on again: lamina.thaw(model, {[*names]!r}).",
    )


def rebuilt(steps: int) -> Finding:
    """Return the finding on an optimizer that replaces another one without its state."""
    return Finding(
        "rebuilt",
        f"this optimizer was built for a model whose optimizer had taken {steps} "
        f"{'step' if steps == 1 else 'steps'}: momentum, step counts and schedules begin again.",
        "Build the optimizer once, before the loop. To go on, pass resume=optimizer.state_dict() "
        "of the earlier one; for a fresh start, call release() on it first.",
    )


def _set_but_never_trains(plan: Plan, drafts: Sequence[Draft]) -> Iterator[Finding]:
    touched: dict[str, list[Draft]] = {}  # collected once: rules may be as many as parameters
    for draft in drafts:
        if not draft.info.differentiable:
            continue  # what cannot train has a finding of its own
        for label in {link.rule for link in draft.chains.get("lr", ())}:
            touched.setdefault(label, []).append(draft)
    for rule in plan.rules:
        if "lr" not in dict(rule.settings):
            continue
        hit = touched.get(rule.label, [])
        if hit and all(draft.windows == NEVER for draft in hit):
            names = listed([draft.info.name for draft in hit])
            yield Finding(
                "lr-never-trains",
                f"rule {rule.label!r} sets an lr on parameters that never train: {names}.",
                "Thaw them in this or a later rule (frozen=False), or drop the lr.",
            )


def _thaw_after_end(drafts: Sequence[Draft], run: Run) -> Iterator[Finding]:
    if run.steps is None:
        return
    late: dict[int, list[str]] = {}
    for draft in drafts:
        begins = (begin for begin, _ in draft.windows if isinstance(begin, int))
        first = next((begin for begin in begins if begin >= run.steps), None)
        if first is not None:
            late.setdefault(first, []).append(draft.info.name)
    for step, names in sorted(late.items()):
        yield Finding(
            "thaw-after-end",
            f"{listed(names)} would thaw at step {step}, but the run ends after {run.steps} steps.",
            "Thaw earlier, lengthen the run, or write frozen=True if that is meant.",
        )


def _frozen_by_model(drafts: Sequence[Draft]) -> Iterator[Finding]:
    # Where a rule has spoken of the window too, the freezing is what the plan wants.
    # So it is where PEFT has frozen the base model, which everybody knows who asked it for that.
    names = [
        draft.info.name
        for draft in drafts
        if draft.by_model and draft.info.differentiable and not draft.info.adapted
    ]
    if names:
        yield Finding(
            "frozen-by-model",
            f"{listed(names)} had requires_grad=False at build and stay frozen.",
            "To train them, add a rule with frozen=False; to say so in the plan, frozen=True.",
        )


def _lr_zero(cells: Sequence[Cell]) -> Iterator[Finding]:
    for cell in cells:
        if cell.windows and cell.constants.get("lr") == 0:
            yield Finding(
                "lr-zero",
                f"group {cell.name!r} has lr 0 but is not frozen: "
                f"{listed([info.name for info in cell.parameters])}.",
                "Write frozen=True: gradients are then not computed and nothing else moves it.",
            )


def _unchecked(plan: Plan, cells: Sequence[Cell], scopes: Sequence[Scope]) -> Iterator[Finding]:
    """Find parameters whose bad gradients nobody sees, since the plan looks at norms only."""
    if plan.nonfinite_check == "all":
        return
    measured = {
        index
        for index, scope in enumerate(scopes)
        if any(operation.measures for operation, _ in scope.operations)
    }
    names = [
        info.name
        for cell in cells
        if cell.windows and cell.scope not in measured and not is_whole_vector(cell.optimizer)
        for info in cell.parameters
    ]
    if names:
        yield Finding(
            "gradients-unchecked",
            "nonfinite_check='norms' looks for NaN and infinite gradients only where a norm is "
            f"computed, and none is of {listed(names)}: theirs would reach the weights.",
            "Leave nonfinite_check out, or clip their norm (clip_norm=).",
        )


def _rules_without_effect(plan: Plan, drafts: Sequence[Draft]) -> Iterator[Finding]:
    """Find rules of which later ones override every setting for all their parameters."""
    effective = {index for d in drafts for rules in d.sources.values() for index in rules}
    beside = _rules_beside(set(range(1, len(plan.rules) + 1)) - effective, drafts)
    for index, rule in enumerate(plan.rules, 1):
        if index in effective:
            continue
        later = beside.get(index, 0) >> (index + 1)
        if not later:  # top_down on parameters without a layer number says nothing of them
            continue
        others = [rule for place, rule in enumerate(plan.rules[index:]) if later >> place & 1]
        keys = ", ".join(f"{key}=" for key, _ in rule.settings)
        yield Finding(
            "rule-without-effect",
            f"rule {rule.label!r} ({keys}) has no effect: later rules win, and all that it sets is "
            f"set again by {quoted(other.label for other in others)}.",
            "Put general rules first and special ones after them: move it behind them, or drop it.",
        )


def _rules_beside(indices: set[int], drafts: Sequence[Draft]) -> dict[int, int]:
    """Return for each of some rules all that match a parameter of it too, as bits.

    Each parameter is looked at once, and only its own rules: both may be thousands.
    """
    asked = sum(1 << index for index in indices)
    found: dict[int, int] = {}
    for matched in {draft.matched for draft in drafts}:
        left = matched & asked
        while left:
            lowest = left & -left
            index = lowest.bit_length() - 1
            found[index] = found.get(index, 0) | matched
            left ^= lowest
    return found


def _suspicious(cells: Sequence[Cell], run: Run) -> Iterator[Finding]:
    """Find values that are legal and hardly ever meant."""
    found: dict[tuple[str, str], list[str]] = {}
    steps = np.unique(np.linspace(0, (run.steps or 1000) - 1, 100).round())
    for cell in cells:
        if cell.windows and cell.algorithm is not None:
            for what in _hardly_meant(cell, steps):
                found.setdefault(what, []).append(cell.name)
    for (message, fix), names in found.items():
        yield Finding("suspicious-value", f"group {quoted(names)}: {message}", fix)


def _hardly_meant(cell: Cell, steps: Floats) -> Iterator[tuple[str, str]]:
    """Find what is suspicious in the values of a group, each with its fix."""
    name = optimizer_name(cell.optimizer)
    usual_lr = hyperparameters(cell.optimizer)["lr"]
    moving = dict(cell.moving)
    values = {key: value for key, value in cell.constants.items() if key not in moving}
    lr, usual = _largest_lr(cell, steps), _LARGE_LR.get(name, 100.0)
    if lr > usual:
        yield (
            f"lr reaches {lr:g}; with {name} more than {usual:g} hardly ever trains.",
            f"See whether an exponent lost its sign; the default of {name} is lr={usual_lr:g}.",
        )
    decay = values.get("weight_decay", 0.0)
    if decay >= 1:
        yield (
            f"weight_decay={decay:g} pulls the weights to 0 faster than most gradients move them.",
            "Usual are 0 to 0.1.",
        )
    betas = values.get("betas", (0.0, 0.0))
    if betas[0] > betas[1]:
        yield (
            f"betas={betas!r} remember the direction longer than the size of gradients; they look "
            "swapped.",
            f"Write betas=({betas[1]!r}, {betas[0]!r}).",
        )
    momentum = values.get("momentum", 0.0)
    if momentum >= 1:
        yield f"momentum={momentum:g} never forgets a gradient.", "Usual is momentum=0.9."


def _rounds_to_nothing(cells: Sequence[Cell], run: Run, seen: Observed) -> Iterator[Finding]:
    """Find 16-bit weights whose steps are lost in rounding, also at the largest lr of the run.

    A step of Adam and its kind moves every number by about lr, whatever the gradient is; that of
    other rules depends on gradients, which nobody knows yet.
    """
    steps = np.unique(np.linspace(0, (run.steps or 1000) - 1, 100).round())
    found: list[tuple[float, float, ParamInfo]] = []
    for cell in cells:
        if not cell.windows or optimizer_name(cell.optimizer) not in _MOVES_BY_LR:
            continue
        if cell.constants.get("rounding") not in (None, "nearest"):
            continue
        lr = _largest_lr(cell, steps)
        for info in cell.parameters:
            distance = _distance_to_next(seen.typical.get(info.name, 0.0), info.dtype)
            if 0 < lr < 0.5 * distance:
                found.append((lr / distance, lr, info))
    if found:
        names = [info.name for *_, info in found]
        share, lr, worst = min(found, key=itemgetter(0))
        yield Finding(
            "steps-round-to-nothing",
            f"16-bit weights hardly move: {listed(names)}. A typical weight of {worst.name} is "
            f"{seen.typical[worst.name]:.2g}, and the next {worst.dtype} lies {lr / share:.2g} "
            f"from it. Its lr is at most {lr:.3g}, and a step of less than half of that distance "
            "is lost in rounding.",
            "Give the plan rounding='stochastic', 'kahan' or 'master'; or keep the weights in "
            "float32 and compute in 16 bits (torch.autocast).",
        )


def _distance_to_next(size: float, dtype: str) -> float:
    """Return how far from a number of some size the next larger one of a 16-bit dtype lies."""
    if size <= 0:
        return 0.0
    digits, lowest = (8, -126) if dtype == "bfloat16" else (11, -14)
    exponent = max(math.frexp(size)[1] - 1, lowest)
    return math.ldexp(1.0, exponent - digits + 1)


def _largest_lr(cell: Cell, steps: Floats) -> float:
    """Return the largest lr of a group at some steps."""
    setting = dict(cell.hyper)["lr"]
    assert isinstance(setting, Setting)  # the forms refuse several values of lr
    lr = product(setting, lambda curve: curve.at(steps))
    if cell.schedule is not None:
        lr = lr * cell.schedule.at(steps)
    return float(np.max(lr))


def _too_many_stages(windows: Mapping[str, Windows], run: Run, seen: Observed) -> Iterator[Finding]:
    if not seen.compiled:
        return
    end = math.inf if run.steps is None else run.steps
    moments = {
        moment if isinstance(moment, int) else moment.key
        for spans in windows.values()
        for span in spans
        for moment in span
        if isinstance(moment, Trigger) or (moment is not None and 0 < moment < end)
    }
    stages = len(moments) + 1
    config = sys.modules.get("torch._dynamo.config")  # there if anything was compiled
    limit = getattr(config, "recompile_limit", _RECOMPILE_LIMIT)
    if stages > limit:
        yield Finding(
            "recompile-limit",
            f"the plan goes through {stages} stages of what trains, each compiled anew, but "
            f"torch.compile gives up and runs uncompiled after {limit} versions.",
            f"Thaw in fewer stages, or set torch._dynamo.config.recompile_limit = {stages + 1}.",
        )


def _reentrant_behind_frozen(windows: Mapping[str, Windows], seen: Observed) -> Iterator[Finding]:
    if not seen.reentrant:
        return
    order = {name: place for place, name in enumerate(windows)}
    moments = sorted(
        {step for spans in windows.values() for span in spans for step in span if type(step) is int}
    )
    first_active = _first_active(windows, moments)
    cut: dict[str, int] = {}
    for path, below in seen.reentrant:
        its = [name for name in below if name in windows]
        first = min(order[name] for name in its)
        steps = [
            moments[begin + int(np.argmax(behind))]
            for spans in {windows[name] for name in its}
            for begin, end in _trained_moments(spans, moments)
            if (behind := first_active[begin:end] >= first).any()
        ]
        if steps:
            cut.setdefault(path, min(steps))
    if cut:
        yield Finding(
            "reentrant-behind-frozen",
            f"{listed(list(cut))} is under reentrant activation checkpointing and nothing before "
            f"it trains from step {min(cut.values())} on: its parameters would get no gradient.",
            "Use checkpointing with use_reentrant=False, or let its input require a gradient "
            "(in Transformers: model.enable_input_require_grads()).",
        )


def _first_active(windows: Mapping[str, Windows], moments: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return for each of some steps the place of the first parameter that trains then.

    Where none does, it is the number of parameters.
    """
    earliest: dict[Windows, int] = {}
    for place, spans in enumerate(windows.values()):
        earliest.setdefault(spans, place)
    found = np.full(len(moments), len(windows))
    for spans, place in reversed(earliest.items()):  # what comes first is written last
        for begin, end in _trained_moments(spans, moments):
            found[begin:end] = place
    return found


def _trained_moments(spans: Windows, moments: Sequence[int]) -> list[tuple[int, int]]:
    """Return the spans of a window as ranges of indices into sorted steps."""
    return [
        (
            bisect_left(moments, begin),
            len(moments) if end is None else bisect_left(moments, end),
        )
        for begin, end in spans
        if isinstance(begin, int)
    ]

"""What the counts of a run come to: the findings that need more than one step."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence

from .._util.text import agree, listed
from ..model.finding import Finding
from . import schedules
from .names import part_names
from .sightings import Sightings
from .static import listed_twice, negative_lr, not_in_optimizer, replaced_finding
from .steps import StepWatch

#: steps after which something that never happened is told
_ENOUGH = 5
#: ratios of the norms of update and weights, of matrices, that are taken for usual
LOW_RATIO, HIGH_RATIO = 1e-7, 0.1
#: measured steps before a ratio is judged
_RATIOS = 20
#: looks in a row at a model in eval mode, before that is told
_EVAL_LOOKS = 3


def conclude(seen: Sightings, passes: Sequence[int]) -> Iterator[Finding]:
    """Find what was seen over the whole run."""
    outside = [name for name, looks in seen.outside.items() if looks > 1]
    outside = [name for name in outside if name not in seen.replaced]
    if seen.replaced:
        yield replaced_finding(list(seen.replaced))
    if outside:
        yield not_in_optimizer(outside, with_gradient=True)
    yield from _statistics(seen)
    yield from _eval_mode(seen)
    for watch in seen.watches:
        yield from _of_optimizer(watch, seen.replaced)
    yield from _nonfinite_loss(seen)
    for schedule in seen.schedules:
        yield from schedules.conclude(schedule, seen.schedules, passes)
    for clip in seen.clips.values():
        yield from clip.conclude()
    for scaler in seen.scalers.values():
        yield from scaler.conclude()


def _statistics(seen: Sightings) -> Iterator[Finding]:
    paths = [
        item.path for root in seen.models.roots for item in root.statistics if item.moved_looks > 2
    ]
    if paths:
        yield Finding(
            "statistics-drift",
            f"the parameters of {listed(paths)} are frozen, but its running statistics go on "
            "moving in training mode.",
            "Keep it in eval mode: call lamina.freeze(model, ...) instead of setting "
            "requires_grad, or its eval() after every model.train().",
        )


def _eval_mode(seen: Sightings) -> Iterator[Finding]:
    for root in seen.models.roots:
        if root.eval_looks >= _EVAL_LOOKS:
            since = f"from step {root.eval_since} on" if root.eval_since else "in all steps"
            yield Finding(
                "trains-in-eval-mode",
                f"{root.kind} trains in eval mode {since}: dropout is off, and running "
                "statistics stand still.",
                "Call model.train() before the loop and after every evaluation. Models that are "
                "loaded with from_pretrained() are in eval mode.",
            )


def _of_optimizer(watch: StepWatch, replaced: Collection[str]) -> Iterator[Finding]:
    yield from _order_of_calls(watch)
    yield from _frozen(watch)
    yield from _lr(watch)
    yield from _nonfinite(watch)
    if watch.nonfinite or watch.is_plan:
        return  # NaN explains all the rest; a plan has findings of its own
    yield from _silent(watch, replaced)
    yield from _unmoved(watch)
    yield from _ratios(watch)


def _order_of_calls(watch: StepWatch) -> Iterator[Finding]:
    if watch.no_closure:
        yield Finding(
            "lbfgs-without-closure",
            "LBFGS.step() was called without a closure; it computes the loss several times a step.",
            "Pass a function that zeroes the gradients, computes the loss, calls backward and "
            "returns the loss: optimizer.step(closure).",
        )
    if watch.rebuilds >= 3:
        yield Finding(
            "rebuilt",
            f"{watch.kind} was built again and again for the same parameters, after "
            "few steps each: momentum and step counts begin anew every time.",
            "Build the optimizer once, before the loop.",
        )
    if watch.zeroed_first >= 2:
        yield Finding(
            "zeroed-before-step",
            f"the gradients of {watch.label} were zeroed between backward() and step(): "
            f"{watch.zeroed_first} steps found none.",
            "Call zero_grad() before backward() or after step().",
        )
    if watch.accumulated >= 3 and watch.accumulated > 0.5 * watch.could_accumulate:
        yield Finding(
            "gradients-accumulate",
            f"nobody zeroes the gradients of {watch.label} between steps: each step uses the sum "
            "of all gradients so far.",
            "Call optimizer.zero_grad() before every backward(), or after every step().",
        )
    doubled = [name for name, times in watch.doubled.items() if times > 1]
    if doubled:
        yield listed_twice(doubled, "is in two optimizers that step by the same gradients")


def _frozen(watch: StepWatch) -> Iterator[Finding]:
    moved = [name for name, seen in watch.params.items() if seen.frozen_moved]
    stale = [
        name for name, seen in watch.params.items() if seen.stale > 1 and not seen.frozen_moved
    ]
    if moved:
        yield Finding(
            "frozen-moved",
            f"{listed(moved)} {agree(moved, 'has', 'have')} requires_grad=False, but {watch.label} "
            f"moves {agree(moved, 'it', 'them')} by a gradient that was left over (with momentum "
            "and weight decay).",
            "Set .grad = None where you freeze it, or call zero_grad(), whose set_to_none is True "
            "by default.",
        )
    if stale:
        yield Finding(
            "frozen-gradient",
            f"{listed(stale)} {agree(stale, 'has', 'have')} requires_grad=False, but a gradient is "
            "left over, which clipping counts and optimizers with momentum or decay use.",
            "Set .grad = None where you freeze it.",
        )


def _lr(watch: StepWatch) -> Iterator[Finding]:
    if watch.is_plan:
        return  # what it freezes has lr 0, and its schedules are looked at in the preview
    trained = {seen.group for seen in watch.params.values() if seen.trains}
    zero = [
        group
        for group in watch.groups
        if group.steps >= 4 and group.zero * 2 >= group.steps
        if watch.prefix + group.label in trained
    ]
    if zero:
        group = zero[0]
        how = "all" if group.zero == group.steps else str(group.zero)
        yield Finding(
            "lr-zero",
            f"the lr of {listed([each.label for each in zero])} in {watch.label} was 0 in {how} of "
            f"{group.steps} steps: nothing trains there.",
            "Look at the schedule: an integer division, a warmup longer than the run, or a decay "
            "that ends too early. To freeze a part, use requires_grad_(False).",
        )
    for group in watch.groups:
        if group.negative is not None:
            step, lr = group.negative
            yield negative_lr(group.label, lr, step)
        if group.jump is not None and not watch.may_rise:
            step, old, lr = group.jump
            yield Finding(
                "lr-jumps",
                f"the lr of {group.label} in {watch.label} jumps from {old:g} to {lr:g} at step "
                f"{step}.",
                "Look at where two schedules meet, and at what else writes the lr.",
            )


def _nonfinite(watch: StepWatch) -> Iterator[Finding]:
    for what, (step, names) in watch.nonfinite.items():
        yield Finding(
            f"nonfinite-{what}",
            f"at step {step} of {watch.label} the {what} of {names[0]} is NaN or infinite"
            + (f", and that of {len(names) - 1} more." if len(names) > 1 else "."),
            "Look at what was computed there: a division by 0, a log or root of 0, an overflow in "
            "float16, or an lr that is too high.",
        )


def _nonfinite_loss(seen: Sightings) -> Iterator[Finding]:
    if seen.loss_nonfinite is not None:
        yield Finding(
            "nonfinite-loss",
            f"the loss is NaN from step {seen.loss_nonfinite} on.",
            "Look at the batch and the weights of that step; torch.autograd.set_detect_anomaly "
            "names the operation.",
        )


def _silent(watch: StepWatch, replaced: Collection[str]) -> Iterator[Finding]:
    lr_acts = any(group.zero < group.steps for group in watch.groups)
    missing = {
        name
        for name, seen in watch.params.items()
        if not seen.received and seen.waited >= _ENOUGH and name not in replaced
    }
    zero = {
        name
        for name, seen in watch.params.items()
        if seen.measured >= _ENOUGH and seen.largest_grad == 0 and lr_acts
    }
    # A bias may well have no effect, as before a BatchNorm; a gradient of 0 tells of matrices only.
    telling = missing | {name for name in zero if watch.params[name].is_matrix}
    trains = {
        name: bool(seen.received or seen.waited) and name not in missing | zero
        for name, seen in watch.params.items()
    }
    if not any(trains.values()):
        yield from _nothing(watch, missing)
        return
    parts, alone = part_names(missing | zero, trains)
    parts = [path for path in parts if any(name.startswith(f"{path}.") for name in telling)]
    alone = [name for name in alone if name in telling]
    if parts:
        yield Finding(
            "part-without-gradient",
            f"the loss does not depend on {listed(parts)}: none of its parameters received a "
            "gradient other than 0.",
            "See whether its output is used (a branch not taken, a detach, a factor 0), or freeze "
            "it.",
        )
    if alone:
        yield Finding(
            "no-gradient",
            f"{listed(alone)} never received a gradient other than 0.",
            "See whether the loss depends on it; if it does not, freeze it.",
        )


def _nothing(watch: StepWatch, missing: Collection[str]) -> Iterator[Finding]:
    """Find that no parameter of an optimizer ever had a gradient, unless it was zeroed away."""
    training = {name for name, seen in watch.params.items() if seen.trains}
    if missing and not watch.zeroed_first and training <= set(missing):
        names = [name for name in watch.params if name in missing]
        yield Finding(
            "no-gradient",
            f"none of the parameters of {watch.label} ever received a gradient ({listed(names)}), "
            "so that its steps do nothing.",
            "Build it from the parameters of the model that computes the loss, after the last time "
            "that this is made or loaded with assign=True; or see whether the loss is computed "
            "from a detached output.",
        )


def _unmoved(watch: StepWatch) -> Iterator[Finding]:
    half = statistics.median(watch.half) if len(watch.half) >= _ENOUGH else 0.0
    if half > 0.5:
        worst = sorted(watch.half_names, key=lambda name: -watch.half_names[name])
        yield Finding(
            "updates-round-away",
            f"{100 * half:.0f} % of the elements of 16-bit weights with a gradient did not move in "
            f"a step of {watch.label} (such as {listed(worst)}): the update is smaller than the "
            "distance to the next number.",
            "Keep the weights in float32 and compute in 16 bits (torch.autocast), use an optimizer "
            "that keeps small updates (lamina's with rounding='stochastic', 'kahan' or 'master'), "
            "or raise the lr.",
        )
        return
    still = [
        name
        for name, seen in watch.params.items()
        if seen.measured >= _ENOUGH and seen.asked and not seen.moved
    ]
    # The gradient of a bias before a BatchNorm is rounding noise, which moves nothing.
    if any(watch.params[name].is_matrix for name in still):
        yield Finding(
            "never-moved",
            f"{listed(still)} received gradients in {watch.label}, but never moved.",
            "The update may be smaller than the weights can hold: look at the lr, and at what "
            "writes the weights beside the optimizer.",
        )


def _ratios(watch: StepWatch) -> Iterator[Finding]:
    if watch.kind == "LBFGS":
        return  # the length of its steps comes from a line search
    for group in watch.groups:
        if len(group.ratios) < _RATIOS:
            continue
        usual = statistics.median(group.ratios)
        if usual > HIGH_RATIO or max(group.ratios) < LOW_RATIO:
            yield Finding(
                "update-ratio",
                f"a step changes the matrices of {group.label} in {watch.label} by {usual:.1e} of "
                f"their norm (median); usual is {LOW_RATIO:g} to {HIGH_RATIO:g}.",
                f"The lr may be too {'high' if usual > HIGH_RATIO else 'low'} for these weights.",
            )

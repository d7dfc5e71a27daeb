"""What changes during a run is remembered, and neither state nor steps grow with it."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.plan.history import LONGEST_HISTORY, extended, value_at
from lamina.schedules.base import EXACT, steps_to_check
from lamina.schedules.duration import Run


def stepped(optimizer, model, steps=1):
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()


def test_a_history_gives_the_value_of_any_step():
    history = []
    for step, value in [(2, "a"), (5, "b"), (5, "c"), (7, "c"), (9, "d")]:
        history = extended(history, step, value)
    assert history == [[2, "a"], [5, "c"], [9, "d"]]
    assert [value_at(history, step, "-") for step in range(10)] == list("--aaaccccd")
    assert value_at([], 3, 1.0) == 1.0


def test_a_history_keeps_the_latest_changes_only():
    history = []
    for step in range(10 * LONGEST_HISTORY):
        history = extended(history, step, step)
    assert len(history) == LONGEST_HISTORY
    assert value_at(history, 10 * LONGEST_HISTORY, None) == 10 * LONGEST_HISTORY - 1


def test_overrides_do_not_let_the_state_grow():
    model = nn.Linear(2, 2)
    optimizer = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.cosine()).build(model, steps=5000)
    sizes = []
    for turn in range(4 * LONGEST_HISTORY):
        stepped(optimizer, model)
        optimizer.override(lr=1e-3 + 1e-7 * turn)
        if turn >= LONGEST_HISTORY:
            sizes.append(len(pickle.dumps(optimizer.state_dict()["param_groups"])))
    assert max(sizes) < 1.1 * sizes[0]
    wanted = (1e-3 + 1e-7 * turn) * 0.5 * (1 + math.cos(math.pi * optimizer.clock / 5000))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-12)
    other = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.cosine()).build(
        nn.Linear(2, 2), steps=5000, resume=optimizer.state_dict()
    )
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_explain_says_that_old_overrides_are_not_kept():
    model = nn.Linear(2, 2)
    optimizer = lm.Plan(lm.SGD, lr=1.0).build(model, steps=2000)
    for turn in range(LONGEST_HISTORY + 20):
        optimizer.override(lr=1.0 + turn)
        stepped(optimizer, model)
    text = str(optimizer.explain("weight", step=3))
    assert "not kept" in text
    assert "not kept" not in str(optimizer.explain("weight"))


def test_overrides_take_the_value_of_the_last_one_that_began():
    model = nn.Linear(2, 2)
    optimizer = lm.Plan(lm.SGD, lr=1.0, momentum=0.5).build(model, steps=50)
    wanted = []
    for lr, momentum in [(0.5, None), (0.25, 0.9), (None, None)]:
        stepped(optimizer, model, 3)
        optimizer.override(lr=lr)
        optimizer.override(momentum=momentum)
        wanted.append((lr or 1.0, 0.5 if momentum is None else momentum))
    stepped(optimizer, model)
    values = lm.values_at(optimizer.resolved, np.arange(12), optimizer._feedback)
    hyper = values.hyper(0)
    for turn, (lr, momentum) in enumerate(wanted):
        at = 3 * (turn + 1)
        one = lm.values_at(optimizer.resolved, at, optimizer._feedback).hyper(0)
        assert (one["lr"], one["momentum"]) == (lr, momentum)
        assert (hyper["lr"][at], hyper["momentum"][at]) == (lr, momentum)


@pytest.mark.parametrize("first", [0, 3])
def test_each_thaw_warms_up_anew_as_one_by_one(first):
    thaws, freezes = [first, 20, 41], [10, 30]
    plan = lm.Plan(lm.SGD, lr=1.0, rewarm=lm.warmup(5), thaw=thaws, freeze=freezes)
    if first == 0:
        plan = lm.Plan(lm.SGD, lr=1.0, rewarm=lm.warmup(5), thaw=thaws[1:], freeze=freezes)
    resolved = lm.resolve_plan(plan, nn.Linear(2, 2), Run(60, 10))
    spans = [(first, 10), (20, 30), (41, math.inf)]

    def by_hand(step):
        for begin, end in spans:
            if begin <= step < end:
                return 1.0 if begin == 0 else min(1.0, (step - begin) / 5)
        return 0.0

    wanted = [by_hand(step) for step in range(60)]
    assert list(lm.values_at(resolved, np.arange(60)).lr(0)) == wanted
    assert [lm.values_at(resolved, step).lr(0) for step in range(60)] == wanted


def test_short_runs_are_looked_at_step_by_step_and_long_ones_at_every_mark():
    assert list(steps_to_check(5)) == [0, 1, 2, 3, 4]
    steps = steps_to_check(10**9, {7, 123_456_789})
    assert len(steps) < 2 * EXACT
    given = [0, 6, 7, 8, 123_456_788, 123_456_789, 123_456_790, 10**9 - 1]
    assert bool(np.isin(given, steps).all())
    assert bool((np.diff(steps) > 0).all())
    assert bool(np.bincount(steps.astype(np.int64) % 1000, minlength=1000).all())  # of a cycle


@pytest.mark.parametrize("steps", [EXACT + 1, 10**9, 10**15])
def test_the_steps_of_a_long_run_are_in_order_each_once(steps):
    marks = (-3, 0, 1, 7, steps // 3, steps - 2, steps + 5)
    checked = steps_to_check(steps, marks)
    assert bool((np.diff(checked) > 0).all())
    beside = {mark + shift for mark in marks for shift in (-1, 0, 1)}
    assert bool(np.isin([step for step in beside if 0 <= step < steps], checked).all())
    assert (checked[0], checked[-1]) == (0, steps - 1)


def test_the_longest_run_is_previewed_and_its_mistakes_are_found():
    plan = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.warmup("10%") >> lm.cosine())
    preview = plan.preview(nn.Linear(2, 2), steps=10**9)
    assert preview.peaks == ((1e-3, 10**8),)
    bad = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.from_function(lambda step: 1.0 - step / 9e8))
    with pytest.raises(lm.ScheduleError, match="at step"):
        bad.preview(nn.Linear(2, 2), steps=10**9)

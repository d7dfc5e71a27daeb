"""Feedback: plateaus, early stopping and thaws on a metric, in a plan and as pure functions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lamina as lm
from lamina.plan.reactions import better
from lamina.schedules.duration import Run


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))


def advance(model, optimizer, steps=1):
    for _ in range(steps):
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


LOSSES = [5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_reduces_when_torchs_does(patience, cooldown, mode):
    sign = 1 if mode == "min" else -1
    model, alone = small(), small()
    reaction = lm.plateau(
        "loss", factor=0.5, patience=patience, cooldown=cooldown, mode=mode, threshold=0.01
    )
    mine = lm.Plan(lm.SGD, lr=0.01, feedback=reaction).build(model)
    theirs = torch.optim.SGD(alone.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        theirs,
        mode,
        factor=0.5,
        patience=patience,
        cooldown=cooldown,
        threshold=0.01,
        threshold_mode="abs",
    )
    relative = [10.0 + sign * loss for loss in LOSSES]
    for loss in relative:
        advance(model, mine)
        mine.report(loss=loss)
        scheduler.step(loss)
        assert lrs(mine)[0] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)


def test_a_planned_plateau_lowers_tiny_learning_rates():
    model = small()
    optimizer = lm.Plan(lm.SGD, lr=1e-9, feedback=lm.plateau("loss", factor=0.1, patience=0)).build(
        model
    )
    for _ in range(3):
        advance(model, optimizer)
        optimizer.report(loss=1.0)
    assert lrs(optimizer)[0] == pytest.approx(1e-11, rel=1e-9)


def test_a_plateau_targets_its_rule_and_others_are_exempt():
    model = small()
    plan = lm.Plan(
        lm.SGD,
        lr=0.1,
        feedback=lm.plateau("loss", factor=0.5, patience=0),
        rules=[
            lm.Rule("1.*", feedback=None),
            lm.Rule("2.*", feedback=lm.plateau("accuracy", factor=0.1, patience=0, mode="max")),
        ],
    )
    optimizer = plan.build(model)
    for _ in range(2):
        optimizer.report(loss=1.0)
    assert lrs(optimizer) == pytest.approx([0.05, 0.1, 0.1])
    for _ in range(2):
        optimizer.report(accuracy=0.5)
    assert lrs(optimizer) == pytest.approx([0.05, 0.1, 0.01])


def test_min_factor_is_the_lowest_multiplier():
    optimizer = lm.Plan(
        lm.SGD, lr=0.1, feedback=lm.plateau("loss", factor=0.1, patience=0, min_factor=0.05)
    ).build(small())
    for _ in range(6):
        optimizer.report(loss=1.0)
    assert lrs(optimizer)[0] == pytest.approx(0.005)


def test_patience_in_epochs_counts_the_clock():
    model = small()
    optimizer = lm.Plan(
        lm.SGD, lr=0.01, feedback=lm.plateau("loss", factor=0.5, patience="2 epochs")
    ).build(model, epochs=10, steps_per_epoch=3)
    seen = []
    for _ in range(5):
        advance(model, optimizer, 3)
        optimizer.report(loss=1.0)
        seen.append(lrs(optimizer)[0])
    assert seen == pytest.approx([0.01, 0.01, 0.01, 0.005, 0.005])


def test_plateau_cosine_warmup_and_thaw_in_one_plan_resume_exactly(tmp_path):
    plan = lm.Plan(
        lm.AdamW,
        lr=0.01,
        schedule=lm.warmup("10%") >> lm.cosine(to=0.1),
        feedback=lm.plateau("loss", factor=0.5, patience=1),
        stop=lm.early_stop("loss", patience=50),
        rules=[
            lm.Rule("{depth}.*", thaw=lm.top_down(every=5, start=0)),
            lm.Rule("0.*", thaw=lm.on_plateau("loss", patience=0), rewarm=lm.warmup(3)),
        ],
    )
    text = str(plan.preview(small(), steps=30))
    assert "stalls" in text or "plateau" in text
    straight, stopped = small(), small()
    one, two = plan.build(straight, steps=30), plan.build(stopped, steps=30)
    for step in range(30):
        if step == 13:
            torch.save((stopped.state_dict(), two.state_dict()), tmp_path / "state.pt")
            weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
            stopped = small()
            stopped.load_state_dict(weights)
            two = plan.build(stopped, steps=30)
            two.load_state_dict(state)
        for model, optimizer in ((straight, one), (stopped, two)):
            advance(model, optimizer)
            optimizer.report(loss=1.0 if step > 3 else 2.0)
        assert one.applied == two.applied
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.applied["0.*"]["lr"] > 0


def test_a_past_value_is_still_what_was_applied():
    model = small()
    optimizer = lm.Plan(
        lm.SGD,
        lr=0.1,
        schedule=lm.cosine(),
        feedback=lm.plateau("loss", factor=0.5, patience=0),
        rules=[lm.Rule("0.*", thaw=lm.on_plateau("loss", patience=1))],
    ).build(model, steps=12)
    applied = []
    for step in range(12):
        advance(model, optimizer)
        applied.append({name: values["lr"] for name, values in optimizer.applied.items()})
        optimizer.report(loss=1.0)
        if step == 6:
            optimizer.override(lr=0.2, rule="2.*") if "2.*" in applied[0] else None
    feedback = optimizer._feedback
    for step, values in enumerate(applied):
        at = lm.values_at(optimizer.resolved, step, feedback)
        assert {c.name: at.lr(i) for i, c in enumerate(optimizer.resolved.cells)} == values


def test_early_stop_waits_for_a_pending_thaw_and_a_plateau():
    model = small()
    optimizer = lm.Plan(
        lm.SGD,
        lr=0.1,
        stop=lm.early_stop("loss", patience=2),
        rules=[lm.Rule("0.*", thaw=6)],
    ).build(model, steps=20)
    stops = []
    for _ in range(12):
        advance(model, optimizer)
        optimizer.report(loss=1.0)
        stops.append(optimizer.should_stop)
    assert stops.index(True) == 7  # thawed after step 6: patience of 2 begins again there
    plan = lm.Plan(
        lm.SGD,
        lr=0.1,
        stop=lm.early_stop("loss", patience=2),
        feedback=lm.plateau("loss", patience=1, factor=0.5, min_factor=0.5),
    )
    optimizer = plan.build(small())
    stops = []
    for _ in range(8):
        optimizer.report(loss=1.0)
        stops.append(optimizer.should_stop)
    assert stops == [False, False, False, False, True, True, True, True]


def test_early_stop_counts_reports_without_improvement():
    optimizer = lm.Plan(lm.SGD, lr=0.1, stop=lm.early_stop("loss", patience=3)).build(small())
    stops = []
    for loss in [3.0, 2.0, 2.5, 2.5, 1.9, 2.0, 2.0, 2.0]:
        optimizer.report(loss=loss)
        stops.append(optimizer.should_stop)
    assert stops == [False] * 7 + [True]


def test_a_saved_state_does_not_move_with_later_reports():
    optimizer = lm.Plan(lm.SGD, lr=0.1, feedback=lm.plateau("loss", patience=5)).build(small())
    optimizer.report(loss=1.0)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    optimizer.report(loss=1.0)
    assert saved["param_groups"] == before["param_groups"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"los": 1.0}, "the plan watches loss. Did you mean 'loss'"),
        ({}, "no metric"),
        ({"loss": math.nan}, "NaN"),
        ({"loss": "good"}, "expected a number"),
    ],
)
def test_a_bad_report_changes_nothing(metrics, message):
    optimizer = lm.Plan(lm.SGD, lr=0.1, feedback=lm.plateau("loss", patience=0)).build(small())
    before = copy.deepcopy(optimizer.param_groups[0]["feedback"])
    with pytest.raises(lm.PlanError, match=message):
        optimizer.report(**metrics)
    assert optimizer.param_groups[0]["feedback"] == before


def test_an_infinite_loss_is_not_an_improvement():
    optimizer = lm.Plan(lm.SGD, lr=0.1, feedback=lm.plateau("loss", patience=0)).build(small())
    optimizer.report(loss=math.inf)
    optimizer.report(loss=1.0)
    assert optimizer.param_groups[0]["feedback"]["plateau of plan (loss, min)"]["best"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.plateau("loss", factor=1.0), "less than 1"),
        (lambda: lm.plateau("loss", factor=-0.1), "at least 0"),
        (lambda: lm.plateau("loss", cooldown=1.5), "whole number of reports"),
        (lambda: lm.plateau("val loss"), "expected the name"),
        (lambda: lm.plateau("loss", mode="low"), "'min' or 'max'"),
        (lambda: lm.plateau("loss", patience=0.5), "has no unit"),
        (lambda: lm.early_stop("loss", patience=0), "1 report or more"),
        (lambda: lm.on_plateau("loss", threshold=math.nan), "at least 0"),
        (lambda: lm.Plan(lm.SGD, lr=0.1, feedback=lm.early_stop("loss")), r"stop=early_stop\("),
        (lambda: lm.Plan(lm.SGD, lr=0.1, stop=lm.plateau("loss")), r"early_stop\(...\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(lm.PlanError, match=message):
        make()


def test_better_is_relative_and_right_for_negative_metrics():
    assert better(-1.1, -1.0, "min", 0.01)
    assert not better(-1.001, -1.0, "min", 0.01)
    assert better(1e-9, 2e-9, "min", 0.01)
    assert better(0.0, None, "min", 0.01)


def test_reactions_are_pure():
    reaction = lm.plateau("loss", patience=0)
    seen = reaction.begin()
    reaction.observe(seen, 1.0, 0, Run())
    assert seen == reaction.begin()


def test_a_plateau_of_shorter_patience_does_not_keep_a_run_from_stopping():
    plan = lm.Plan(
        lm.SGD,
        lr=1e-3,
        stop=lm.early_stop("loss", patience=6),
        feedback=lm.plateau("loss", patience=2, factor=0.5),
    )
    model = small()
    optimizer = plan.build(model)
    for loss in [0.5, *[1.0] * 8]:
        advance(model, optimizer)
        optimizer.report(loss=loss)
    assert not optimizer.should_stop  # lowered at the third bad report, which had its chance of six
    advance(model, optimizer)
    optimizer.report(loss=1.0)
    assert optimizer.should_stop


@pytest.mark.parametrize("other", [("accuracy", "max"), ("loss", "max")])
def test_what_was_seen_of_one_metric_is_not_taken_for_another(other):
    def plan(metric, mode):
        return lm.Plan(
            lm.SGD,
            lr=0.1,
            stop=lm.early_stop(metric, mode=mode),
            feedback=lm.plateau(metric, mode=mode, patience=0),
        )

    optimizer = plan("loss", "min").build(small(), steps=9)
    for loss in (3.0, 4.0):
        optimizer.report(loss=loss)
    resumed = plan(*other).build(small(), steps=9, resume=optimizer.state_dict())
    assert resumed.param_groups[0]["lr"] == 0.1
    assert [row for row in resumed.last_load.dropped if "loss, min" in row]
    resumed.report(**{other[0]: 0.5})
    assert resumed.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("key", ["schedule", "lr", "rewarm"])
def test_a_plateau_in_another_place_says_where_it_belongs(key):
    with pytest.raises(lm.PlanError, match="feedback="):
        lm.Plan(lm.SGD, **{"lr": 0.1, key: lm.plateau("loss")})

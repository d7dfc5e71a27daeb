"""Lengths of time: how they are read, printed, rounded and refused."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina as lm
from lamina.schedules import duration as time
from lamina.schedules.duration import Run, run_of
from models import mlp


@pytest.mark.parametrize(
    ("written", "amount", "unit", "printed"),
    [
        (500, 500, "steps", 500),
        ("500", 500, "steps", 500),
        ("500 steps", 500, "steps", 500),
        ("1 step", 1, "steps", 1),
        ("2 epochs", 2, "epochs", "2 epochs"),
        ("1 epoch", 1, "epochs", "1 epochs"),
        (".5epochs", Fraction(1, 2), "epochs", "0.5 epochs"),
        (" 7 % ", 7, "%", "7%"),
        ("2.50%", Fraction(5, 2), "%", "2.5%"),
        ("0.00001%", Fraction(1, 100000), "%", "0.00001%"),
    ],
)
def test_what_a_user_writes(written, amount, unit, printed):
    parsed = time.parse(written)
    assert (parsed.amount, parsed.unit, parsed.text) == (amount, unit, printed)
    assert time.parse(parsed.text) == parsed


@given(st.decimals(0, 100, places=12), st.sampled_from(["%", " epochs"]))
def test_printing_loses_nothing(amount, unit):
    parsed = time.parse(f"{amount:f}{unit}")
    assert parsed.amount == Fraction(amount)
    assert time.parse(parsed.text) == parsed


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (-3, ["-3", "negative"]),
        (0.5, ["'0.5 epochs'", "'50%'", "no unit"]),
        (True, ["True", "not a length of time"]),
        (None, ["None", "'2 epochs'"]),
        ("soon", ["'soon'", "'10%'"]),
        ("-2 epochs", ["'-2 epochs'"]),
        ("1.5 steps", ["'1.5 steps'", "whole number"]),
        ("101%", ["'101%'", "at most 100%"]),
        ("9" * 5000 + "%", ["not a length of time"]),
    ],
)
def test_what_is_not_a_length_of_time(written, words):
    with pytest.raises(lm.TimeUnitError) as caught:
        time.parse(written)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_shares_and_epochs_are_exact():
    run = Run(steps=70, steps_per_epoch=7)
    assert time.parse("10%").in_steps(run) == 7
    assert time.parse("0.3 epochs").in_steps(run) == Fraction(21, 10)
    assert time.parse("29%").in_steps(Run(100)) == 29  # 0.29 * 100 is 28.999... in floats


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Run(None, None)),
        ({"steps": 10}, Run(10, None)),
        ({"steps": 10, "steps_per_epoch": 4}, Run(10, 4)),
        ({"epochs": 3, "steps_per_epoch": 4}, Run(12, 4)),
        ({"epochs": 2.5, "steps_per_epoch": 3}, Run(8, 3)),
        ({"epochs": 0.1, "steps_per_epoch": 10}, Run(1, 10)),
        ({"epochs": 3, "steps_per_epoch": 10, "accumulate": 4}, Run(9, 3)),
        ({"steps": 10, "accumulate": 4}, Run(10, None)),
    ],
)
def test_the_length_of_a_run(given, expected):
    assert run_of(**given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epochs": 3}, ["epochs=3", "steps_per_epoch="]),
        ({"steps": 10, "epochs": 3, "steps_per_epoch": 4}, ["steps=10", "epochs=3", "pass one"]),
        ({"steps": 0}, ["steps=0", "1 or more"]),
        ({"steps": 2.5}, ["steps=2.5", "whole number"]),
        ({"steps": True}, ["steps=True"]),
        ({"epochs": 1, "steps_per_epoch": -1}, ["steps_per_epoch=-1"]),
        ({"epochs": float("nan"), "steps_per_epoch": 3}, ["epochs=nan"]),
        ({"epochs": "3", "steps_per_epoch": 3}, ["epochs='3'"]),
        ({"steps": 10, "accumulate": 0}, ["accumulate=0"]),
        ({"steps": 10, "accumulate": 1.5}, ["accumulate=1.5"]),
    ],
)
def test_runs_that_make_no_sense(given, words):
    with pytest.raises(lm.TimeUnitError) as caught:
        lm.Plan("SGD", lr=0.1).build(mlp(), **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("setting", "run", "words"),
    [
        ({"schedule": lm.warmup("2 epochs")}, {"steps": 9}, ["'2 epochs'", "steps_per_epoch="]),
        ({"schedule": lm.warmup("10%")}, {}, ["'10%'", "steps="]),
        ({"thaw": "1 epochs"}, {"steps": 9}, ["'1 epochs'", "steps_per_epoch="]),
        ({"freeze": "50%"}, {"steps_per_epoch": 9}, ["'50%'", "epochs= with steps_per_epoch="]),
    ],
)
def test_a_unit_that_cannot_be_resolved_names_what_to_pass(setting, run, words):
    with pytest.raises(lm.TimeUnitError) as caught:
        lm.Plan("SGD", lr=0.1, **setting).build(mlp(), **run)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_phase_that_needs_the_run_says_so():
    with pytest.raises(lm.PlanError, match="steps="):
        lm.Plan("SGD", lr=0.1, schedule=lm.cosine(to=0.1)).build(mlp())


def test_accumulate_counts_batches():
    plan = lm.Plan("SGD", lr=1.0, schedule=lm.step_decay("1 epochs", 0.5))
    optimizer = plan.build(mlp(), epochs=2, steps_per_epoch=10, accumulate=4)
    assert [optimizer.resolved.run.steps, optimizer.resolved.run.steps_per_epoch] == [6, 3]
    preview = plan.preview(mlp(), epochs=2, steps_per_epoch=10, accumulate=4)
    lrs = [preview.at(step)["default"]["lr"] for step in range(6)]
    assert lrs == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


def test_phases_given_as_shares_meet_without_a_gap():
    third = lm.constant(1.0, "33.3%")
    plan = lm.Plan("SGD", lr=1.0, schedule=third >> lm.constant(0.5, "33.3%") >> lm.constant(0.25))
    preview = plan.preview(mlp(), steps=10)
    lrs = [preview.at(step)["default"]["lr"] for step in range(10)]
    # boundaries at ceil(3.33) and ceil(6.66), not at 4 and 4 + 4
    assert lrs == [1.0] * 4 + [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize(
    "length",
    [
        {"steps": 10**9 + 1},
        {"steps": 10**400},
        {"steps": 10**5000},
        {"steps": 1, "steps_per_epoch": 10**10},
        {"epochs": 1e308, "steps_per_epoch": 10},
        {"epochs": 10**400, "steps_per_epoch": 10},
        {"epochs": 10**5000, "steps_per_epoch": 10},
        {"epochs": 1e8 + 1, "steps_per_epoch": 10},
    ],
    ids=range(8),
)
def test_a_run_longer_than_any(length):
    with pytest.raises(lm.TimeUnitError, match="1,000,000,000"):
        run_of(**length)


def test_the_longest_run():
    assert run_of(epochs=1e8, steps_per_epoch=10).steps == 10**9
    assert run_of(steps=10**9).steps == 10**9

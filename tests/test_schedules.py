"""Every schedule: its published formula, random access, text, kinds and errors."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lamina._util.grammar import parse, to_source
from lamina.errors import PlanError, ScheduleError, TimeUnitError
from lamina.schedules import (
    SCHEDULES,
    Schedule,
    Shape,
    constant,
    cosine,
    cyclic,
    exponential,
    from_function,
    inverse_sqrt,
    linear,
    multi_step,
    noam,
    one_cycle,
    one_cycle_momentum,
    one_minus_sqrt,
    piecewise,
    polynomial,
    repeat,
    step_decay,
    warm_restarts,
    warmup,
    wsd,
)
from lamina.schedules.duration import Run

RUN = Run(steps=1000, steps_per_epoch=100)
COS = lambda x: (1 + math.cos(math.pi * x)) / 2  # noqa: E731


def one_cycle_formula(levels, turns):
    def value(t):
        for i in range(len(turns) - 1):
            if t < turns[i + 1]:
                share = (t - turns[i]) / (turns[i + 1] - turns[i])
                return levels[i + 1] + (levels[i] - levels[i + 1]) * COS(share)
        return levels[-1]

    return value


def restarts_formula(first, mult, decay, to):
    def value(t):
        cycle, size = 0, first
        while t >= size:
            t, size, cycle = t - size, size * mult, cycle + 1
        return to + (1 - to) * decay**cycle * COS(t / size)

    return value


def triangle(t, up, down):
    t = t % (up + down)
    return t / up if t <= up else (up + down - t) / down


# name -> (schedule, its kind, its formula for t = 0 ... 999)
TABLE = {
    "constant": (constant(0.3), "either", lambda t: 0.3),
    "linear": (linear(to=0.1), "factor", lambda t: 1 - 0.9 * t / 1000),
    "linear value": (linear(0.04, 0.4), "value", lambda t: 0.04 + 0.36 * t / 1000),
    "cosine": (cosine(to=0.01), "factor", lambda t: 0.01 + 0.99 * COS(t / 1000)),
    "cosine value": (cosine(2e-5, to=1e-6), "value", lambda t: 1e-6 + 1.9e-5 * COS(t / 1000)),
    "polynomial": (polynomial(2.0, to=0.1), "factor", lambda t: 0.1 + 0.9 * (1 - t / 1000) ** 2),
    "one_minus_sqrt": (one_minus_sqrt(), "factor", lambda t: 1 - math.sqrt(t / 1000)),
    "exponential": (exponential(0.5, "1 epochs"), "factor", lambda t: 0.5 ** (t / 100)),
    "steps": (step_decay("1 epochs", 0.5), "factor", lambda t: 0.5 ** (t // 100)),
    "steps, uneven": (step_decay("7.5%", 0.5), "factor", lambda t: 0.5 ** (t // 75)),
    "multi_step": (
        multi_step([30, "8 epochs", "50%", 30], 0.3),
        "factor",
        lambda t: 0.3 ** sum(t >= m for m in (30, 30, 500, 800)),
    ),
    "warmup": (warmup("10%"), "factor", lambda t: min(1.0, t / 100)),
    "inverse_sqrt": (
        inverse_sqrt(100),
        "factor",
        lambda t: min(t / 100, math.sqrt(100 / max(t, 1))),
    ),
    "inverse_sqrt, slow": (
        inverse_sqrt(100, timescale=400),
        "factor",
        lambda t: t / 100 if t < 100 else math.sqrt(400 / (t + 300)),
    ),
    "noam": (
        noam(512, 100),
        "value",
        lambda t: 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * 100**-1.5),
    ),
    "one_cycle": (
        one_cycle(),
        "factor",
        one_cycle_formula([1 / 25, 1, 1 / 25e4], [0, 300, 1000]),
    ),
    "one_cycle, three phases": (
        one_cycle(0.25, three_phase=True),
        "factor",
        one_cycle_formula([1 / 25, 1, 1 / 25, 1 / 25e4], [0, 250, 500, 1000]),
    ),
    "one_cycle_momentum": (
        one_cycle_momentum(),
        "value",
        one_cycle_formula([0.95, 0.85, 0.95], [0, 300, 1000]),
    ),
    "cyclic": (cyclic(70, 0.25, 30), "factor", lambda t: 0.25 + 0.75 * triangle(t, 70, 30)),
    "cyclic, triangular2": (
        cyclic("10%", 0.25, mode="triangular2"),
        "factor",
        lambda t: 0.25 + 0.75 * triangle(t, 100, 100) * 2.0 ** -(t // 200),
    ),
    "cyclic, exp_range": (
        cyclic(50, 0.1, mode="exp_range", gamma=0.999),
        "factor",
        lambda t: 0.1 + 0.9 * triangle(t, 50, 50) * 0.999**t,
    ),
    "cyclic momentum": (
        cyclic(50, 0.95, peak=0.85),
        "value",
        lambda t: 0.95 - 0.1 * triangle(t, 50, 50),
    ),
    "warm_restarts": (warm_restarts(150), "factor", restarts_formula(150, 1, 1, 0)),
    "warm_restarts, growing": (
        warm_restarts("1 epochs", mult=2, decay=0.5, to=0.1),
        "factor",
        restarts_formula(100, 2, 0.5, 0.1),
    ),
    "warm_restarts, counted": (
        warm_restarts(cycles=3),
        "factor",
        lambda t: COS(Fraction(3 * t, 1000) % 1),
    ),
    "wsd": (
        wsd(100, "20%", to=0.1),
        "factor",
        lambda t: min(1, t / 100) if t < 800 else 1 - 0.9 * (t - 800) / 200,
    ),
    "wsd with a decay": (
        wsd(100, one_minus_sqrt(length=200)),
        "factor",
        lambda t: min(1, t / 100) if t < 800 else 1 - math.sqrt((t - 800) / 200),
    ),
    "table": (
        piecewise([(0, 1.0), ("50%", 0.5), (800, 0.8)]),
        "either",
        lambda t: float(np.interp(t, [0, 500, 800], [1.0, 0.5, 0.8])),
    ),
    "table, held": (
        piecewise([(100, 1.0), ("50%", 0.5)], held=True),
        "either",
        lambda t: 1.0 if t < 500 else 0.5,
    ),
    "repeat": (
        repeat(linear(length=100), times=10),
        "factor",
        lambda t: 1 - (t % 100) / 100,
    ),
    "repeat, fitted": (
        repeat(step_decay(100, 0.5), times=4),
        "factor",
        lambda t: 0.5 ** (t % 250 // 100),
    ),
    "repeat, by period": (
        repeat(warmup(10) >> constant(), period="1 epochs"),
        "factor",
        lambda t: min(1, t % 100 / 10),
    ),
    "function": (from_function(lambda t: 0.99**t), "either", lambda t: 0.99**t),
    "function, looped": (
        from_function(lambda t: 0.5 if t > 10 else 1),
        "either",
        lambda t: 0.5 if t > 10 else 1,
    ),
    "sequence": (
        warmup("6%") >> cosine(to=0.01),
        "factor",
        lambda t: t / 60 if t < 60 else 0.01 + 0.99 * COS((t - 60) / 940),
    ),
    "product": (
        warmup(100) * exponential(0.999),
        "factor",
        lambda t: min(1, t / 100) * 0.999**t,
    ),
    "value times factor": (
        cosine(0.1) * warmup(10),
        "value",
        lambda t: 0.1 * COS(t / 1000) * min(1, t / 10),
    ),
}
every = pytest.mark.parametrize("name", TABLE)


@every
def test_formula(name):
    schedule, _, formula = TABLE[name]
    wanted = np.array([formula(t) for t in range(1000)], dtype=float)
    got = schedule(np.arange(1000), run=RUN)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-15)


@every
def test_kind(name):
    schedule, kind, _ = TABLE[name]
    assert schedule.kind == kind


@every
def test_one_step_equals_many_bit_by_bit(name):
    bound = TABLE[name][0].bind(RUN)
    places = np.random.default_rng(0).permutation(1200)[:300]
    many = bound.at(places.astype(float))
    assert [bound(int(place)) for place in places] == many.tolist()


@every
def test_the_end_is_held(name):
    bound = TABLE[name][0].bind(RUN)
    after = bound(np.arange(1000, 3000))
    assert (after == after[0]).all()
    assert abs(after[0] - bound(999)) < 0.03  # the left limit: no jump at the end


@every
def test_binding_twice_changes_nothing(name):
    bound = TABLE[name][0].bind(RUN)
    assert bound.bind(Run()) == bound
    assert hash(bound) == hash(TABLE[name][0].bind(RUN))


@every
def test_text_reads_back(name):
    schedule = TABLE[name][0]
    if not name.startswith("function"):
        assert parse(to_source(schedule, quote=False), SCHEDULES, "test") == schedule
        assert eval(repr(schedule), dict(SCHEDULES)) == schedule


def test_every_registered_schedule_is_in_the_table():
    told = " ".join(repr(schedule) for schedule, _, _ in TABLE.values())
    assert [name for name in SCHEDULES if f"{name}(" not in told and name != "wsd"] == []


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_shows_formula_and_example(name):
    text = SCHEDULES[name].__doc__
    assert "Example:" in text
    assert "Formula:" in text or name == "wsd"


def test_jumps_hold_the_value_before_the_jump():
    assert step_decay(100, length=300)(300) == pytest.approx(0.01)
    assert multi_step([100, 200], length=200)(500) == 0.1
    assert piecewise([(0, 1.0), (50, 0.5)], held=True, length=50)(80) == 1.0
    assert warm_restarts(100, to=0.1, length=200)(250) == 0.1
    assert warm_restarts(100, mult=2, length=300)(300) == 0.0
    assert repeat(linear(to=0.2, length=50), times=2)(170) == pytest.approx(0.2)


def test_an_open_schedule_goes_on():
    assert inverse_sqrt(100)(40_000) == 0.05
    assert step_decay(100, 0.5)(1_000) == 0.5**10
    assert cyclic(10, 0.5)(1_000_010) == 1.0


def test_a_million_steps_with_large_cycles_stay_exact():
    fine = warm_restarts("0.3%").bind(Run(1_000_000))
    assert fine(3000 * 333) == 1.0
    assert fine(3000 * 333 - 1) < 1e-6


class TestErrors:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: cosine(to=-0.1), "to=-0.1"),
            (lambda: cosine(to=math.nan), "to=nan"),
            (lambda: warmup(-5), "-5 is negative"),
            (lambda: cosine(length=-1), "-1 is negative"),
            (lambda: warmup("120%"), "longer than the run"),
            (lambda: warmup(0.06), "has no unit"),
            (lambda: warmup(None), "warmup needs a length"),
            (lambda: linear("10%"), "length='10%'"),
            (lambda: polynomial(0), "power=0"),
            (lambda: exponential(-0.9), "gamma=-0.9"),
            (lambda: exponential(0.9, every=0), "every=0"),
            (lambda: step_decay(0), "every=0"),
            (lambda: multi_step(30), "a list of times"),
            (lambda: multi_step([30, -1]), "-1 is negative"),
            (lambda: inverse_sqrt(0), "warmup=0"),
            (lambda: inverse_sqrt(0, timescale=0), "timescale=0"),
            (lambda: noam(0, 100), "d_model=0"),
            (lambda: noam(512, 0), "warmup=0"),
            (lambda: one_cycle(1.5), "pct_start=1.5"),
            (lambda: one_cycle(0.6, three_phase=True), "0 to 0.5 with three phases"),
            (lambda: one_cycle(div_factor=0), "div_factor=0"),
            (lambda: one_cycle(anneal_strategy="sine"), "'cos', 'linear'"),
            (lambda: one_cycle_momentum(high=-1), "high=-1"),
            (lambda: cyclic(0, 0.1), "up=0"),
            (lambda: cyclic(10, 0.1, mode="square"), "mode='square'"),
            (lambda: warm_restarts(), "expected one of them"),
            (lambda: warm_restarts(10, 3), "expected one of them"),
            (lambda: warm_restarts(0), "first=0"),
            (lambda: warm_restarts(10, mult=0.5), "mult=0.5"),
            (lambda: warm_restarts(cycles=0), "cycles=0"),
            (lambda: piecewise([]), "at least one pair"),
            (lambda: piecewise([(0, 1.0), 5]), "at least one pair"),
            (lambda: piecewise([(0, -1.0)]), "points[0]=-1.0"),
            (lambda: repeat(0.5), "expected a schedule"),
            (lambda: repeat(cosine(), times=0), "times=0"),
            (lambda: repeat(cosine(), period=0), "period=0"),
            (lambda: wsd(10, cosine()), "a factor with one"),
            (lambda: wsd(10, linear(0.1, 0.2, 5)), "a factor with one"),
            (lambda: wsd(10, linear(length=5), to=0.1), "write to= in the decay"),
            (lambda: from_function(0.5), "a function of the step"),
            (lambda: cosine(0.1) * linear(0.1, 0.2), "is a value"),
            (lambda: warmup(10) >> cosine(0.1), "is a factor"),
        ],
    )
    def test_at_the_call(self, make, words):
        with pytest.raises((ScheduleError, TimeUnitError)) as error:
            make()
        assert words in str(error.value)

    @pytest.mark.parametrize(
        ("schedule", "words"),
        [
            (warmup(2000), "lasts 2000 steps, but there are only 1000"),
            (warmup(2000) >> cosine(), "longer than the run"),
            (cosine(length="11 epochs"), "lasts 1100 steps"),
            (repeat(linear(length=400), times=3), "lasts 1200 steps"),
            (cosine() >> linear(), "each last for the rest of the run"),
            (piecewise([("50%", 1.0), (400, 0.5)]), "steps 500, 400"),
            (repeat(linear(length=0)), "no period"),
            (repeat(constant()), "no period"),
        ],
    )
    def test_for_a_run(self, schedule, words):
        with pytest.raises(PlanError) as error:
            schedule.bind(RUN)
        assert words in str(error.value)

    def test_without_a_run(self):
        with pytest.raises(ScheduleError, match="pass steps="):
            cosine()(5)
        with pytest.raises(TimeUnitError, match="share of the run"):
            warmup("10%")(5)
        with pytest.raises(TimeUnitError, match="steps_per_epoch"):
            exponential(0.9, "1 epochs")(5)
        with pytest.raises(ScheduleError, match="3 cycles"):
            warm_restarts(cycles=3)(5)
        with pytest.raises(ScheduleError, match="count from 0"):
            warmup(10)(-1)

    def test_a_function_that_fails_names_the_step(self):
        with pytest.raises(ScheduleError, match="at step 3: ZeroDivisionError"):
            from_function(lambda t: 1 / (3 - t) if t < 9 else 1)(np.arange(5))


def test_schedules_are_values():
    for schedule, _, _ in TABLE.values():
        assert isinstance(schedule, Schedule)
        assert schedule == schedule
        with pytest.raises(AttributeError):
            schedule.length = 3  # type: ignore[attr-defined]


def test_a_shape_without_length_goes_on_for_ever():
    class Saw(Shape):
        def shape(self, t, length):
            return 1.0 - (t % 100) / 200

    assert repr(Saw()) == "Saw()"
    assert Saw().kind == "factor"
    assert Saw()(50) == 0.75
    assert (warmup(10) >> Saw())(60, run=RUN) == 0.75

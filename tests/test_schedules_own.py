"""A user's own schedules, and pictures of schedules."""

import copy
import pickle
from dataclasses import dataclass

import numpy as np
import pytest

import lamina as lm
from lamina import schedules
from lamina._util.grammar import parse, to_source
from lamina._util.text import sparkline
from lamina.errors import ScheduleError
from lamina.schedules import (
    SCHEDULES,
    Shape,
    cosine,
    from_function,
    linear,
    register_schedule,
    warmup,
)
from lamina.schedules.duration import Run


@dataclass(frozen=True, repr=False)
class Teeth(Shape):
    """Teeth: from 1 down by `depth` in every `period`."""

    spans = ("period",)
    period: int | str
    depth: float = 0.5
    length: int | str | None = None

    def shape(self, t, length):
        period = float(self.span("period"))
        return 1.0 - self.depth * (t % period) / period


def slow_start(step):
    return min(1.0, step / 10) if step < 100 else 1.0


@pytest.fixture(autouse=True)
def restore_names():
    before = dict(SCHEDULES)
    yield
    SCHEDULES.clear()
    SCHEDULES.update(before)


def test_a_class_is_registered_bound_saved_and_read_back():
    register_schedule("teeth", Teeth)
    teeth = parse("teeth(10%, depth=0.25) >> cosine(length=100)", {**SCHEDULES}, "test")
    assert teeth.phases[0] == Teeth("10%", 0.25)
    assert repr(teeth.phases[0]) == "teeth('10%', 0.25)"
    assert parse(to_source(teeth, quote=False), SCHEDULES, "test") == teeth
    bound = Teeth("10%").bind(Run(1000))
    assert bound(50) == 0.75
    assert bound(np.arange(1000)).tolist() == [bound(k) for k in range(1000)]


def test_a_function_is_registered_and_read_back():
    made = register_schedule("slow_start", slow_start)
    assert register_schedule("slow_start", slow_start)() == made()
    schedule = made()
    assert repr(made()) == "slow_start()"
    assert made(length=50)(20) == 1.0
    assert schedule(5) == 0.5
    assert parse("slow_start(length=50)", SCHEDULES, "test") == made(length=50)
    assert (
        to_source(made(length=50) >> cosine(), quote=False) == "slow_start(length=50) >> cosine()"
    )


def test_a_registered_function_is_in_a_plan_as_toml():
    register_schedule("slow_start", slow_start)
    text = 'optimizer = "AdamW"\nlr = 0.001\nschedule = "slow_start(length=50%) >> cosine()"\n'
    plan = lm.Plan.from_toml(text)
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert plan.to_toml() == text


def test_own_schedules_survive_copies():
    registered = register_schedule("slow_start", slow_start)
    for schedule in (Teeth(10), registered(), from_function(slow_start)):
        assert copy.deepcopy(schedule) == schedule
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("name", "thing", "words"),
    [
        ("warmup", slow_start, "is taken"),
        ("no name", slow_start, "letters, digits"),
        ("true", slow_start, "letters, digits"),
        ("number", 0.5, "expected a subclass of Shape"),
        ("made", cosine(), "expected a subclass of Shape"),
        ("other", int, "not a schedule"),
    ],
)
def test_registration_refuses(name, thing, words):
    with pytest.raises(ScheduleError, match=words):
        register_schedule(name, thing)
    assert SCHEDULES.get(name) is not thing


def test_several_schedules_on_one_axis(tmp_path):
    pytest.importorskip("matplotlib")
    one, other = warmup("10%") >> cosine(), cosine(to=0.1)
    figure = one.plot(other, Teeth(100), steps=1000, path=tmp_path / "curves.png")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == [repr(one), repr(other), repr(Teeth(100))]
    x, y = axes.lines[0].get_data()
    np.testing.assert_array_equal(y, one(x, run=Run(1000)))
    assert (x[0], x[-1]) == (0, 999)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_plot_of_a_million_steps_is_sampled():
    pytest.importorskip("matplotlib")
    figure = schedules.step_decay(1000, 0.9).plot(steps=1_000_000)
    assert len(figure.axes[0].lines[0].get_data()[0]) == 2000


def test_the_length_to_show_is_the_longest():
    pytest.importorskip("matplotlib")
    figure = warmup(10).plot(cosine(length=50))
    assert figure.axes[0].lines[0].get_data()[0][-1] == 49
    with pytest.raises(ScheduleError, match="pass steps="):
        cosine().plot()
    with pytest.raises(ScheduleError, match="steps=0"):
        cosine().sparkline(0)


def test_sparkline():
    assert linear().sparkline(8) == "█▇▆▅▅▄▃▂"
    line = (warmup(50) >> cosine()).sparkline(1000, width=20)
    assert len(line) == 20
    assert line[0] == "▁"
    assert line[2] == "█"
    assert line[-1] == "▁"
    assert len(warmup(5).sparkline()) == 5


def test_sparkline_of_numbers():
    assert sparkline([0, 1, 2, 3, 2, 1, 0]) == "▁▃▆█▆▃▁"
    assert sparkline([5.0] * 3) == "███"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "█ █"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=30)) == 30

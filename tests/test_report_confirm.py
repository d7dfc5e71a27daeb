"""Planned against applied: agreement in one line, deviations by group and step."""

import numpy as np
import pytest

from lamina.preview.verify import confirm
from test_preview import Net, example


@pytest.fixture
def preview():
    return example().preview(Net(), steps=12)


def applied(preview, steps=12):
    return [
        {name: hyper["lr"] for name, hyper in preview.at(step).items()} for step in range(steps)
    ]


def test_what_was_planned_is_confirmed(preview):
    result = confirm(preview, applied(preview))
    assert str(result) == "applied as planned: 12 steps, 5 groups, largest deviation 0"
    assert result.agrees
    assert [row.steps for row in result.rows] == [12] * 5
    assert {row.deviation for row in result.rows} == {0.0}


def test_all_forms_of_a_record(preview):
    steps = applied(preview)
    arrays = {name: np.array([step[name] for step in steps]) for name in steps[0]}
    whole = [preview.at(step) for step in range(12)]
    assert confirm(preview, arrays) == confirm(preview, whole) == confirm(preview, steps)


def test_a_deviation_is_named(preview):
    steps = applied(preview)
    steps[7]["head.*"] += 0.25
    result = confirm(preview, steps)
    assert not result.agrees
    assert "'head.*' deviates by 0.25 at step 7" in result.verdict
    assert "in 1 of 5 groups" in result.verdict
    (wrong,) = [row for row in result.rows if not row.agrees]
    assert (wrong.group, wrong.step, wrong.deviation) == ("head.*", 7, 0.25)
    assert "head.*  deviates by 0.25 at step 7" in str(result).splitlines()[1]


def test_a_frozen_group_that_moved_is_a_deviation(preview):
    steps = applied(preview)
    steps[3]["embeddings.*"] = 1e-9
    assert not confirm(preview, steps).agrees


def test_missing_and_foreign_groups(preview):
    steps = applied(preview)
    for step in steps:
        del step["head.*"]
    missing = confirm(preview, steps)
    assert not missing.agrees
    assert "'head.*' was recorded for 0 of 12 steps" in missing.verdict
    foreign = confirm(preview, [{**step, "tail.*": 0.1} for step in applied(preview)])
    assert not foreign.agrees
    assert "'tail.*' is not in the plan" in foreign.verdict
    gap = applied(preview)
    del gap[5]["head.*"]
    assert not confirm(preview, gap).agrees


def test_a_shorter_run_says_so(preview):
    result = confirm(preview, applied(preview, 5))
    assert result.agrees
    assert "5 steps" in result.verdict
    assert "the plan was for 12 steps" in result.verdict


def test_a_resumed_run_is_compared_from_its_first_step(preview):
    rest = applied(preview)[8:]
    assert confirm(preview, rest, first=8).agrees
    assert not confirm(preview, rest, first=7).agrees


def test_no_record(preview):
    assert "0 steps" in confirm(preview, []).verdict

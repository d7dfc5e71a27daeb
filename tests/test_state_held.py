"""A held run that goes on: whether its schedules still fit the length that they were saved for."""

import logging

import pytest

import lamina as lm
from lamina.time import Run
from models import mlp, train
from test_state import through_a_file

COSINE = lm.Plan(lm.AdamW, lr=0.05, schedule=lm.cosine(to=0.01))


def held(plan=COSINE, first=10, at=4, second=20, more=0):
    """The state of a run of `first` steps that was held over `second` ones."""
    model = mlp()
    optimizer = plan.build(model, steps=first)
    train(model, optimizer, at)
    state = through_a_file(optimizer.state_dict())
    optimizer = plan.build(model, steps=second, resume=state, extend="hold")
    train(model, optimizer, more, first=at)
    return through_a_file(optimizer.state_dict())


def found(preview):
    return [finding.code for finding in preview.findings]


@pytest.mark.parametrize("strict", [False, True])
def test_a_held_state_loaded_by_hand_names_the_jumps(caplog, strict):
    other = COSINE.build(mlp(), steps=20)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        other.load_state_dict(held(), strict=strict)
    (record,) = caplog.records
    assert "lr of 'default' jumps from" in record.getMessage()
    load = other.last_load
    assert (load.saved_run, load.run) == (Run(20), Run(20))
    assert (load.saved_planned, load.planned) == (Run(10), Run(20))
    assert "schedules: of 10 steps, now of 20 steps" in str(load)


def test_hold_then_stretch_names_the_jumps_everywhere():
    state = held()
    optimizer = COSINE.build(mlp(), steps=20, resume=state, extend="stretch")
    preview = COSINE.preview(mlp(), steps=20, resume=state, extend="stretch")
    (told,) = optimizer.last_load.jumps
    assert told.startswith("lr of 'default' jumps from")
    assert found(preview) == ["value-jumps"]
    assert told in preview.findings[0].message
    assert "schedules fit the new length" in str(preview)


@pytest.mark.parametrize("extend", [None, "hold"])
def test_a_held_run_that_stays_held_names_none(caplog, extend):
    state = held(more=3)
    for steps in (20, 30) if extend else (20,):
        optimizer = COSINE.build(mlp(), steps=steps, resume=state, extend=extend)
        preview = COSINE.preview(mlp(), steps=steps, resume=state, extend=extend)
        assert optimizer.last_load.jumps == ()
        assert found(preview) == []
        assert "schedules are those of 10 steps" in str(preview)
    assert caplog.text == ""


def test_stretched_back_to_its_own_length_a_held_run_names_none():
    optimizer = COSINE.build(mlp(), steps=10, resume=held(), extend="stretch")
    assert optimizer.last_load.jumps == ()
    assert "schedules:" not in str(optimizer.last_load)

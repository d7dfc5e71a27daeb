"""A run that is stopped and goes on is the run itself: at every step, in every form of saving."""

import copy
import json
import pickle

import pytest
import torch

import lamina as lm
from models import backward, encoder, equal, mlp, same, weights
from test_state import through_a_file

LAYERS = (0, 1, 2, 3)
STEPS = 18
PLAN = lm.Plan(
    lm.AdamW,
    lr=0.02,
    weight_decay=0.05,
    schedule=lm.warmup("10%") >> lm.cosine(to=0.1),
    feedback=lm.plateau("loss", factor=0.5, patience=1),
    stop=lm.early_stop("loss", patience=9),
    clip_norm=1.0,
    rules=[
        lm.Rule(
            "encoder.layer.{depth}.*",
            lr=lm.by_depth(0.9),
            thaw=lm.top_down(every=3, start=2),
            rewarm=lm.warmup(2),
        ),
        lm.Rule("embeddings", thaw=lm.on_plateau("loss", patience=3)),
        lm.Rule("*.bias", weight_decay=0),
    ],
)


def advance(model, optimizer, first, last, losses=()):
    """Steps and reports; the loss that is reported stalls, so that feedback has something to do."""
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        optimizer.report(loss=1.0 if step > 4 else 2.0 - 0.1 * step)


def fresh():
    model = encoder(LAYERS)
    return model, PLAN.build(model, steps=STEPS)


@pytest.fixture(scope="module")
def straight():
    """The whole run: its last weights and state, and what was saved before every step."""
    model, optimizer = fresh()
    saved = []
    for step in range(STEPS):
        saved.append((weights(model), through_a_file(optimizer.state_dict())))
        advance(model, optimizer, step, step + 1)
    return weights(model), optimizer.state_dict(), saved


@pytest.mark.parametrize("at", range(STEPS))
def test_resume_in_every_stage_of_a_thaw_continues_bit_for_bit(straight, at):
    end, state, saved = straight
    kept, its_state = saved[at]
    model = encoder(LAYERS)
    model.load_state_dict(kept)
    if at % 2:
        optimizer = PLAN.build(model, steps=STEPS, resume=its_state)
    else:
        optimizer = PLAN.build(model, steps=STEPS)
        optimizer.load_state_dict(its_state, strict=True)
    assert optimizer.last_load.jumps == optimizer.last_load.new == ()
    advance(model, optimizer, at, STEPS)
    assert same(weights(model), end)
    assert equal(optimizer.state_dict(), state)


def test_the_run_goes_through_all_its_stages(straight):
    _, state, saved = straight
    begun = [sum(len(entry) > 1 for entry in its_state["state"].values()) for _, its_state in saved]
    assert len(set(begun)) >= 6  # the head, four layers, the embeddings
    feedback = json.loads(state["param_groups"][0]["feedback"])
    assert feedback["plateau of plan (loss, min)"]["changes"]


def test_canary_a_lost_count_of_updates_is_seen(straight):
    end, _, saved = straight
    kept, state = saved[9]
    state = copy.deepcopy(state)
    next(entry for entry in state["state"].values() if len(entry) > 1)["step"] += 1
    model = encoder(LAYERS)
    model.load_state_dict(kept)
    advance(model, PLAN.build(model, steps=STEPS, resume=state), 9, STEPS)
    assert not same(weights(model), end)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [0, 4, 9, 17])
def test_a_copy_continues_bit_for_bit(straight, at, how):
    end, state, _ = straight
    model, optimizer = fresh()
    advance(model, optimizer, 0, at)
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert equal(other.state_dict(), optimizer.state_dict())
    advance(twin, other, at, STEPS)
    assert same(weights(twin), end)
    assert equal(other.state_dict(), state)


def test_a_copy_of_a_loaded_optimizer_keeps_its_report():
    _, optimizer = fresh()
    optimizer.load_state_dict(fresh()[1].state_dict())
    assert copy.deepcopy(optimizer).last_load == optimizer.last_load
    assert pickle.loads(pickle.dumps(optimizer.last_load)) == optimizer.last_load


def test_float32_state_of_bfloat16_parameters_survives_every_way(tmp_path):
    plan = lm.Plan(lm.AdamW, lr=0.02)
    model = mlp(dtype=torch.bfloat16)
    optimizer = plan.build(model)
    advance_plain(model, optimizer, 2)
    for entry in optimizer.state.values():
        entry.update({key: value.float() for key, value in entry.items()})
    state = through_a_file(optimizer.state_dict())
    other = plan.build(mlp(dtype=torch.bfloat16))
    other.load_state_dict(state)
    for copied in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert equal(copied.state_dict(), optimizer.state_dict())
        kinds = {value.dtype for entry in copied.state.values() for value in entry.values()}
        assert kinds == {torch.float32}


def advance_plain(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

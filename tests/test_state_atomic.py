"""A load that fails at any stage leaves everything as it was; a canary plants one that does not."""

import copy
import json
import math

import pytest
import torch

import lamina as lm
from lamina.state import load
from models import encoder, equal, train

PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.warmup(2) >> lm.cosine(to=0.1),
    feedback=lm.plateau("loss", patience=1),
    stop=lm.early_stop("loss"),
    clip_norm=1.0,
    rules=[
        lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(every=3)),
        lm.Rule("embeddings", thaw=lm.on_plateau("loss")),
        lm.Rule("*.bias", weight_decay=0),
    ],
)


def running(steps=5):
    model = encoder()
    optimizer = PLAN.build(model, steps=20)
    train(model, optimizer, steps)
    optimizer.override(eps=1e-6)
    optimizer.report(loss=1.0)
    return model, optimizer


def picture(model, optimizer):
    """All that a load could change."""
    return {
        "state": {
            name: {key: (id(value), value.clone()) for key, value in optimizer.state[param].items()}
            for group in optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        },
        "groups": [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ],
        "published": copy.deepcopy(optimizer._published),
        "active": list(optimizer._freezer.active),
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "report": optimizer.last_load,
    }


def last(state):
    return state["param_groups"][-1]


def of_last(state):
    """The entry of the last parameter of the last group that has tensors."""
    return next(e for e in reversed(list(state["state"].values())) if len(e) > 1)


def seen(change):
    """Change what the first reaction has seen, which is saved as a text."""

    def apply(state):
        group = state["param_groups"][0]
        feedback = json.loads(group["feedback"])
        change(next(iter(feedback.values())))
        group["feedback"] = json.dumps(feedback)

    return apply


def every_clock(value):
    return lambda state: [group.update(clock=value) for group in state["param_groups"]]


STAGES = {
    "bad entry in the last group": lambda s: s["state"].update({last(s)["params"][-1]: 3}),
    "text in exp_avg": lambda s: of_last(s).update(exp_avg="x"),
    "integers in exp_avg": lambda s: of_last(s).update(exp_avg=of_last(s)["exp_avg"].long()),
    "another shape": lambda s: of_last(s).update(exp_avg_sq=torch.zeros(9)),
    "exp_avg lost": lambda s: of_last(s).pop("exp_avg"),
    "step lost": lambda s: of_last(s).pop("step"),
    "NaN step": lambda s: of_last(s).update(step=torch.tensor(math.nan)),
    "negative step": lambda s: of_last(s).update(step=-1),
    "half a step": lambda s: of_last(s).update(step=1.5),
    "step of many numbers": lambda s: of_last(s).update(step=torch.ones(3)),
    "groups are no list": lambda s: s.update(param_groups={"a": 1}),
    "a group is no dict": lambda s: s["param_groups"].append("x"),
    "params are no list": lambda s: last(s).update(params=3),
    "a tensor among the params": lambda s: last(s)["params"].append(torch.ones(1)),
    "clock of a wrong type": lambda s: last(s).update(clock="5"),
    "NaN clock": lambda s: last(s).update(clock=math.nan),
    "clocks that differ": lambda s: last(s).update(clock=9),
    "state is no dict": lambda s: s.update(state=[1]),
    "an index out of range": lambda s: s["state"].update({999: {}}),
    "an index twice": lambda s: last(s)["params"].__setitem__(0, 0),
    "a name twice": lambda s: last(s)["param_names"].__setitem__(0, "embeddings.weight"),
    "names and params of different number": lambda s: last(s)["param_names"].append("x"),
    "a name that is no text": lambda s: last(s)["param_names"].__setitem__(0, 3),
    "one parameter too many": lambda s: last(s)["params"].append(77),
    "an unreadable format": lambda s: last(s).update(format="new"),
    "a newer format": lambda s: last(s).update(format=99),
    "a malformed run": lambda s: s["param_groups"][0].update(run=[1, 2]),
    "overrides that cannot be read": lambda s: last(s).update(overrides="[[0"),
    "feedback that cannot be read": lambda s: s["param_groups"][0].update(feedback="{x}"),
    "feedback of a text": lambda s: s["param_groups"][0].update(feedback='"x"'),
    "overrides that are no list": lambda s: last(s).update(overrides=3),
    "an override without a step": lambda s: last(s).update(overrides=[{"lr": 1.0}]),
    "an override to a text": lambda s: last(s).update(overrides=[[0, {"lr": "high"}]]),
    "feedback that is no dict": lambda s: s["param_groups"][0].update(feedback=[1]),
    "feedback with an unknown key": seen(lambda f: f.update(more=1)),
    "feedback that lacks a key": seen(lambda f: f.pop("bad")),
    "feedback of a wrong type": seen(lambda f: f.update(bad="x")),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_state_changes_nothing(stage):
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    STAGES[stage](state)
    model, optimizer = running()
    optimizer.load_state_dict(optimizer.state_dict())
    before = picture(model, optimizer)
    with pytest.raises(lm.StateError):
        optimizer.load_state_dict(state)
    assert equal(picture(model, optimizer), before)
    train(model, optimizer, 1, first=5)
    assert optimizer.clock == 6


def test_canary_a_load_that_succeeds_is_seen_in_the_picture():
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    after = picture(model, optimizer)
    changed = {key for key in before if not equal(before[key], after[key])}
    assert changed == {"state", "groups", "published", "active", "flags", "modes", "report"} - (
        {"modes"} if before["modes"] == after["modes"] else set()
    )


def fails(*_, **__):
    raise RuntimeError("planted")


@pytest.mark.parametrize("part", ["match", "lived_of", "values_at"])
def test_a_failure_inside_changes_nothing(part, monkeypatch):
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(load, part, fails)
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.load_state_dict(other.state_dict())
    assert equal(picture(model, optimizer), before)


def test_a_failure_in_the_last_entry_changes_nothing(monkeypatch):
    _, other = running(8)
    model, optimizer = running()
    before, genuine, calls = picture(model, optimizer), load.own_entry, []

    def last_fails(*args):
        calls.append(1)
        return fails() if len(calls) == 15 else genuine(*args)

    with monkeypatch.context() as patch:
        patch.setattr(load, "own_entry", last_fails)
        with pytest.raises(RuntimeError, match="planted"):
            optimizer.load_state_dict(other.state_dict())
    assert len(calls) == 15
    assert equal(picture(model, optimizer), before)


def test_a_pre_hook_that_raises_changes_nothing():
    _, other = running(8)
    model, optimizer = running()
    before = picture(model, optimizer)
    handle = optimizer.register_load_state_dict_pre_hook(fails)
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.load_state_dict(other.state_dict())
    assert equal(picture(model, optimizer), before)
    handle.remove()
    saved = other.state_dict()
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state.update(param_groups=[]))
    with pytest.raises(lm.StateError):
        optimizer.load_state_dict(saved)
    assert saved["param_groups"]  # what a hook changes is not the caller's dict
    assert equal(picture(model, optimizer), before)


def test_a_schedule_that_fails_at_the_clock_changes_nothing():
    def falls(step):
        return 1.5 - 0.001 * step

    plan = lm.Plan(lm.SGD, lr=0.1, schedule=lm.function(falls))
    model = encoder()
    optimizer = plan.build(model)
    state = copy.deepcopy(optimizer.state_dict())
    every_clock(2000)(state)
    before = picture(model, optimizer)
    with pytest.raises(lm.ScheduleError, match="at step 2000"):
        optimizer.load_state_dict(state)
    assert equal(picture(model, optimizer), before)


def test_a_build_that_cannot_resume_gives_the_model_back():
    _, other = running(8)
    state = copy.deepcopy(other.state_dict())
    of_last(state).update(exp_avg="x")
    model = encoder()
    with pytest.raises(lm.StateError):
        PLAN.build(model, steps=20, resume=state)
    assert all(p.requires_grad for p in model.parameters())
    assert lm.Plan(lm.SGD, lr=0.1).build(model).findings == ()

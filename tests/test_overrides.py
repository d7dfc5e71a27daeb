"""`optimizer.override`: the sanctioned way to change what a plan gives, during a run."""

import copy
import logging

import pytest
from torch import nn

import lamina as lm
from models import mlp, same, train, weights

PLAN = lm.Plan(
    "SGD",
    lr=0.4,
    weight_decay=0.1,
    schedule=lm.constant(0.5),
    rules=[lm.Rule("head", lr=0.8), lm.Rule("head.bias", weight_decay=0, frozen=True)],
)


def built():
    model = mlp()
    return model, PLAN.build(model, steps=10)


def lrs(optimizer):
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def test_the_schedule_still_multiplies_an_override():
    _, optimizer = built()
    names = list(lrs(optimizer))
    optimizer.override(lr=0.2, rule=names[0])
    assert list(lrs(optimizer).values()) == [0.1, 0.4, 0.0]
    optimizer.override(lr=0.6)
    assert list(lrs(optimizer).values()) == [0.3, 0.3, 0.0]
    optimizer.override(lr=None)
    assert list(lrs(optimizer).values()) == [0.2, 0.4, 0.0]


def test_an_override_acts_on_the_next_step_and_is_no_foreign_write():
    model, optimizer = built()
    train(model, optimizer, 2)
    optimizer.override(lr=0.2, weight_decay=0.3)
    train(model, optimizer, 1, first=2)
    assert {hyper["lr"] for hyper in optimizer.applied.values()} == {0.1, 0.0}
    assert {hyper["weight_decay"] for hyper in optimizer.applied.values()} == {0.3}
    assert optimizer.clock == 3


@pytest.mark.parametrize("rule", ["head.weight", "body", "body | head.weight"])
def test_a_pattern_chooses_whole_groups(rule):
    _, optimizer = built()
    optimizer.override(momentum=0.9, rule=rule)
    chosen = [group["momentum"] == 0.9 for group in optimizer.param_groups]
    assert chosen == ["body" in rule, "head" in rule, False]


BAD = [
    ({"rule": "hed"}, {"lr": 1}, ["'hed'", "groups are", "'head'"]),
    ({"rule": "*.weight"}, {"lr": 1}, ["1 of the 2 parameters", "name the group"]),
    ({}, {}, ["nothing to change", "lr=1e-4"]),
    ({}, {"lr": -1}, ["lr=-1"]),
    ({}, {"lr": float("nan")}, ["lr=nan"]),
    ({}, {"lr": "0.1"}, ["lr='0.1'", "expected a number"]),
    ({}, {"lr": True}, ["lr=True", "expected a number"]),
    ({}, {"betas": 0.9}, ["SGD has no hyperparameter 'betas'"]),
    ({}, {"weight_deacy": 0.9}, ["Did you mean 'weight_decay'?"]),
]


@pytest.mark.parametrize(("where", "hyper", "words"), BAD)
def test_what_cannot_stand_changes_nothing(where, hyper, words):
    model, optimizer = built()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(lm.PlanError) as caught:
        optimizer.override(**where, **hyper)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert optimizer.state_dict() == before
    train(model, optimizer, 1)
    assert optimizer.clock == 1


def test_overrides_are_logged_explained_and_saved(caplog):
    model, optimizer = built()
    train(model, optimizer, 3)
    with caplog.at_level(logging.INFO, "lamina"):
        optimizer.override(lr=0.2, rule="body")
    assert "step 3: override" in caplog.text
    assert "'lr': 0.2" in caplog.text
    assert "override" in str(optimizer.explain("body.weight"))
    assert "override" not in str(optimizer.explain("head.weight"))
    twin, other = built()
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert lrs(other) == lrs(optimizer)
    train(model, optimizer, 3, first=3)
    train(twin, other, 3, first=3)
    assert same(weights(model), weights(twin))


def test_an_override_does_not_rewrite_the_past():
    model, optimizer = built()
    train(model, optimizer, 3)
    optimizer.override(lr=0.2, rule="body")
    assert "lr = 0.2\n" in str(optimizer.explain("body.weight", step=2))
    assert "lr = 0.1\n" in str(optimizer.explain("body.weight", step=3))


def test_a_frozen_group_stays_frozen():
    model, optimizer = built()
    optimizer.override(lr=0.2)
    before = weights(model)["head.bias"]
    train(model, optimizer, 2)
    assert same({"": weights(model)["head.bias"]}, {"": before})


def test_a_rule_whose_groups_differ_in_a_value_is_overridden_whole():
    values = {"a.weight": 1.0, "b.weight": 2.0}
    model = nn.ModuleDict({key: nn.Linear(2, 2, bias=False) for key in "ab"})
    rule = lm.Rule("*.weight", lr=lambda info: values[info.name])
    optimizer = lm.Plan(lm.SGD, lr=0.1, rules=[rule]).build(model)
    optimizer.override(lr=9.0, rule="*.weight")
    assert [group["lr"] for group in optimizer.param_groups] == [9.0, 9.0]
    optimizer.override(lr=3.0, rule="*.weight #2")
    assert [group["lr"] for group in optimizer.param_groups] == [9.0, 3.0]

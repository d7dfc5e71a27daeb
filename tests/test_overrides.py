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


def lbfgs():
    model = mlp()
    rules = [lm.Rule("head", lr=0.1)]
    return model, lm.Plan(lm.LBFGS, lr=1.0, rules=rules).build(model)


def test_one_search_has_one_setting():
    model, optimizer = lbfgs()
    with pytest.raises(lm.PlanError, match=r"max_iter in 1 of 2 groups.*leave out rule="):
        optimizer.override(max_iter=3, rule="head")
    assert {group["max_iter"] for group in optimizer.param_groups} == {20}
    optimizer.override(lr=0.2, rule="head")
    optimizer.override(max_iter=3)
    evaluations = []

    def closure():
        optimizer.zero_grad()
        evaluations.append(sum(p.square().sum() + p.exp().sum() for p in model.parameters()))
        evaluations[-1].backward()
        return evaluations[-1]

    optimizer.step(closure)
    assert len(evaluations) == 3
    with pytest.raises(lm.HyperparameterError, match="expected a whole number"):
        optimizer.override(max_iter=2.5)


OPTIONS = [
    *[("SGD", "nesterov"), ("SGD", "maximize"), ("RMSprop", "centered"), ("Adam", "amsgrad")],
    *[("Adam", "decoupled_weight_decay"), ("LBFGS", "line_search_fn"), ("AdamW", "state_dtype")],
    *[("NAdam", "decoupled_weight_decay"), ("Rprop", "maximize")],
]


@pytest.mark.parametrize("value", [1, 0, True, None])
@pytest.mark.parametrize(("optimizer", "option"), OPTIONS)
def test_what_chooses_a_variant_cannot_be_overridden(optimizer, option, value):
    built = lm.Plan(optimizer, lr=0.1).build(mlp())
    before = copy.deepcopy(built.state_dict())
    with pytest.raises(
        lm.PlanError, match=f"sets {option}, which chooses a variant of {optimizer}"
    ):
        built.override(**{option: value})
    assert built.state_dict() == before


def test_an_override_is_judged_beside_the_values_of_the_plan():
    momentum = lm.linear(0.5, to=0.9, length=4)
    model = mlp()
    optimizer = lm.Plan(lm.SGD, lr=0.1, momentum=momentum, nesterov=True).build(model, steps=8)
    train(model, optimizer, 2)
    with pytest.raises(lm.HyperparameterError, match=r"momentum=0\.7 and dampening=0\.5"):
        optimizer.override(dampening=0.5)

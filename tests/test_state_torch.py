"""States to and from torch's own optimizers, under plans and without; matching by position."""

import copy

import pytest
import torch
from torch import nn

import lamina as lm
from models import backward, equal, mlp, train, weights
from test_state import tensors, through_a_file

KINDS = [
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {"lr": 0.05, "amsgrad": True, "weight_decay": 0.01}),
    ("AdamW", {"lr": 0.05}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5}),
]
IDS = [name for name, _ in KINDS]


def torchs(name, params, **hyper):
    """torch's optimizer, in its plain loop."""
    return getattr(torch.optim, name)(params, foreach=False, **hyper)


def planned(name, model, **hyper):
    return lm.Plan(getattr(lm, name), **hyper).build(model)


def copied(model):
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    return twin


def assert_close(one, other):
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("name", "hyper"), KINDS, ids=IDS)
def test_a_plan_continues_from_torch(name, hyper, named):
    model = mlp()
    params = model.named_parameters() if named else model.parameters()
    theirs = torchs(name, params, **hyper)
    train(model, theirs, 4)
    twin = copied(model)
    mine = planned(name, twin, **hyper)
    mine.load_state_dict(through_a_file(theirs.state_dict()), strict=True)
    report = mine.last_load
    assert report.matched_by == ("names" if named else "positions")
    assert ("matched by position" in str(report)) is not named
    assert report.hyperparameters == ()
    counted = name != "SGD"  # which keeps no count of updates
    assert mine.clock == (4 if counted else 0)
    assert report.clock_from == ("steps" if counted else "nothing")
    train(model, theirs, 4, first=4)
    train(twin, mine, 4, first=4)
    assert_close(twin, model)


@pytest.mark.parametrize(("name", "hyper"), KINDS, ids=IDS)
def test_torch_continues_from_a_plan(name, hyper):
    model = mlp()
    mine = planned(name, model, **hyper)
    train(model, mine, 4)
    twin = copied(model)
    theirs = torchs(name, twin.parameters(), **hyper)
    theirs.load_state_dict(through_a_file(mine.torch_state_dict()))
    train(model, mine, 4, first=4)
    train(twin, theirs, 4, first=4)
    assert_close(twin, model)
    back = planned(name, copied(twin), **hyper)
    back.load_state_dict(theirs.state_dict(), strict=True)
    assert equal({k: v for k, v in tensors(back).items() if name != "SGD"}, _tensors(name, theirs))


def _tensors(name, theirs):
    if name == "SGD":
        return {}
    names = theirs.param_groups[0]["param_names"]
    params = theirs.param_groups[0]["params"]
    return {
        each: {key: value.clone() for key, value in theirs.state[param].items()}
        for each, param in zip(names, params, strict=True)
    }


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("name", "hyper"), KINDS, ids=IDS)
def test_the_drop_in_exchanges_states_with_torch_as_torch_does(name, hyper, there):
    model = mlp()
    kinds = [getattr(lm.optim, name), getattr(torch.optim, name)]
    first, second = kinds if there else kinds[::-1]
    one = first(model.parameters(), **hyper)
    train(model, one, 4)
    twin = copied(model)
    other = second(twin.parameters(), lr=123.0)
    other.load_state_dict(through_a_file(one.state_dict()))
    assert other.param_groups[0]["lr"] == hyper["lr"]  # the saved one, as in torch
    train(model, one, 4, first=4)
    train(twin, other, 4, first=4)
    assert_close(twin, model)


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, lm.optim.LBFGS])
def test_lbfgs_continues_from_torch_and_back(kind):
    def advance(model, optimizer, step):
        def closure():
            optimizer.zero_grad()
            return backward(model, step)

        optimizer.step(closure)

    model = mlp()
    theirs = kind(model.parameters(), lr=0.5, max_iter=4)
    for step in range(3):
        advance(model, theirs, step)
    twin = copied(model)
    mine = lm.Plan(lm.LBFGS, lr=0.5, max_iter=4).build(twin)
    mine.load_state_dict(through_a_file(theirs.state_dict()))
    assert len(mine.last_load.kept) == 4
    third = copied(model)
    back = kind(third.parameters(), lr=0.5, max_iter=4)
    back.load_state_dict(through_a_file(mine.torch_state_dict()))
    for step in range(3, 5):
        for each, its in ((model, theirs), (twin, mine), (third, back)):
            advance(each, its, step)
    assert_close(twin, model)
    assert_close(third, model)


def test_parts_that_never_trained_begin_anew_in_torch():
    model = mlp()
    plan = lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("body", frozen=True)])
    mine = plan.build(model)
    train(model, mine, 2)
    twin = copied(model)
    groups = [{"params": list(twin.body.parameters())}, {"params": list(twin.head.parameters())}]
    theirs = torch.optim.AdamW(groups, foreach=False)
    theirs.load_state_dict(mine.torch_state_dict())
    assert [len(group["params"]) for group in theirs.param_groups] == [2, 2]
    assert set(theirs.param_groups[0]) >= {"param_names", "foreach", "capturable", "maximize"}
    assert not {"clock", "feedback", "name", "run"} & set(theirs.param_groups[0])
    train(twin, theirs, 1, first=2)
    assert float(theirs.state[twin.body.weight]["step"]) == 1
    assert float(theirs.state[twin.head.weight]["step"]) == 3


def test_canary_without_the_helper_torch_stumbles_over_parts_that_never_trained():
    model = mlp()
    with pytest.warns(lm.LaminaWarning, match="nothing-trains"):
        mine = lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("*", frozen=True)]).build(model)
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(mine.state_dict())
    mine.release()
    with pytest.raises(KeyError, match="exp_avg"):
        train(model, theirs, 1)


def test_several_optimizers_are_not_one_of_torchs():
    plan = lm.Plan(lm.AdamW, lr=0.1, rules=[lm.Rule("head", optimizer=lm.SGD, lr=0.1)])
    with pytest.raises(lm.StateError, match="AdamW and SGD"):
        plan.build(mlp()).torch_state_dict()


# ----------------------------------------------------------------------------------- by position


def unnamed(model, groups=None):
    optimizer = torch.optim.AdamW(groups or model.parameters(), lr=0.05)
    train(model, optimizer, 2)
    return optimizer.state_dict()


def test_positions_are_those_of_the_model_whatever_the_plans_groups():
    model = mlp()
    state = unnamed(model)
    plan = lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("*.bias", weight_decay=0)])
    optimizer = plan.build(mlp())
    optimizer.load_state_dict(state)
    for place, (name, _) in enumerate(model.named_parameters()):
        assert torch.equal(tensors(optimizer)[name]["exp_avg"], state["state"][place]["exp_avg"])
    expected = {("weight_decay", 0.01, 0)}
    rows = optimizer.last_load.hyperparameters
    assert {(row.key, row.saved, row.now) for row in rows} == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["param_groups"][0]["params"].append(4), "5 parameters where the model has 4"),
        (lambda s: s["param_groups"][0]["params"].reverse(), "number 0 is 'body.weight'"),
        (lambda s: s["param_groups"].append(dict(s["param_groups"][0])), "number 0 twice"),
    ],
)
def test_positions_that_do_not_fit_are_refused_with_the_reason(change, words):
    state = copy.deepcopy(unnamed(mlp()))
    change(state)
    optimizer = lm.Plan(lm.AdamW, lr=0.05).build(mlp())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(lm.StateError, match=words):
        optimizer.load_state_dict(state)
    assert equal(optimizer.state_dict(), before)


def test_a_common_grouping_by_decay_is_refused_where_shapes_tell():
    model = mlp()
    parts = [[p for p in model.parameters() if p.ndim > 1], [model.body.bias, model.head.bias]]
    state = unnamed(model, [{"params": part} for part in parts])
    with pytest.raises(lm.StateError, match="named_parameters"):
        lm.Plan(lm.AdamW, lr=0.05).build(mlp()).load_state_dict(state)


def test_names_in_some_groups_only_are_refused():
    model = mlp()
    state = copy.deepcopy(unnamed(model))
    state["param_groups"].append({**state["param_groups"][0], "params": [7], "param_names": ["x"]})
    with pytest.raises(lm.StateError, match="in all groups or in none"):
        lm.Plan(lm.AdamW, lr=0.05).build(mlp()).load_state_dict(state)
    with pytest.raises(lm.StateError, match="no parameter names"):
        lm.Plan(lm.AdamW, lr=0.05).build(mlp()).load_state_dict(
            unnamed(mlp()), renamed={"a": "body"}
        )


def test_names_under_a_wrapper_are_clean():
    model = mlp()
    wrapped = nn.DataParallel(model)
    theirs = torch.optim.AdamW(wrapped.named_parameters(), lr=0.05)
    train(model, theirs, 2)
    optimizer = lm.Plan(lm.AdamW, lr=0.05).build(mlp())
    optimizer.load_state_dict(theirs.state_dict(), strict=True)
    assert optimizer.last_load.kept[0] == "body.weight"


def test_torchs_state_of_another_algorithm_is_not_kept():
    model = mlp()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, theirs, 2)
    for kind in (lm.AdamW, lm.RMSprop, lm.LARS):
        optimizer = lm.Plan(kind, lr=0.1).build(mlp())
        with pytest.warns(lm.LaminaWarning, match="of another optimizer"):
            optimizer.load_state_dict(theirs.state_dict())
        assert len(optimizer.last_load.restarted) == 4
        assert all(set(entry) == {"step"} for entry in tensors(optimizer).values())


def test_a_momentum_that_came_without_a_count_is_saved_again():
    model = mlp()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, theirs, 2)
    optimizer = lm.Plan(lm.SGD, lr=0.1, momentum=0.9).build(mlp())
    optimizer.load_state_dict(theirs.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict(), strict=True)
    assert equal(optimizer.state_dict(), before)
    assert "momentum_buffer" in tensors(optimizer)["body.weight"]

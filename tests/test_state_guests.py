"""States that torch's own load understands: numbers for tensors, factors, nothing to keep."""

import copy
import pickle

import lion_pytorch
import pytest
import torch
from torch import nn

import lamina as lm
from models import equal

WITH_STEP = ["NAdam", "Adagrad", "RAdam", "Adamax", "Adadelta", "Rprop", "ASGD"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 5, generator=generator, dtype=torch.float64)

        def closure(x=x):
            optimizer.zero_grad()
            loss = (model(x) - 1).pow(2).sum()
            loss.backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS) or "LBFGS" in str(type(optimizer)):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def trained(kind, **settings):
    model = net()
    optimizer = kind(model.parameters(), **settings)
    train(model, optimizer, range(3))
    return model, copy.deepcopy(optimizer.state_dict())


def plain(state):
    """Numbers where torch has tensors of one number, as its older versions saved them."""
    for entry in state["state"].values():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                entry[key] = value.item()


@pytest.mark.parametrize("name", WITH_STEP)
def test_numbers_in_a_guests_state_load_as_in_torch(name):
    kind = getattr(torch.optim, name)
    before, state = trained(kind, lr=0.01)
    plain(state)
    models = []
    for planned in (False, True):
        model = net()
        model.load_state_dict(before.state_dict())
        if planned:
            optimizer = lm.Plan(kind, lr=0.01).build(model)
        else:
            optimizer = kind(model.parameters(), lr=0.01)
        given = copy.deepcopy(state)
        optimizer.load_state_dict(given)
        train(model, optimizer, range(3, 6))
        assert all(
            type(v) is not torch.Tensor or v.ndim
            for e in given["state"].values()
            for v in e.values()
        )
        models.append(dict(model.named_parameters()))
    assert equal(*models)


def test_torchs_adafactor_loads_by_position():
    kind = torch.optim.Adafactor
    before, state = trained(kind, lr=0.01)
    assert any("row_var" in entry for entry in state["state"].values())
    models = []
    for planned in (False, True):
        model = net()
        model.load_state_dict(before.state_dict())
        if planned:
            optimizer = lm.Plan(kind, lr=0.01).build(model, resume=copy.deepcopy(state))
            assert optimizer.last_load.matched_by == "positions"
            assert len(optimizer.last_load.kept) == 4
        else:
            optimizer = kind(model.parameters(), lr=0.01)
            optimizer.load_state_dict(copy.deepcopy(state))
        train(model, optimizer, range(3, 6))
        models.append(dict(model.named_parameters()))
    assert equal(*models)


@pytest.mark.parametrize(
    "shape", [(7, 1), (7, 5), (1, 7, 5), (35,), (5, 1), (7,), (2, 7), (7, 2), (5, 7, 5)], ids=str
)
def test_a_value_of_another_parameter_is_refused_by_position(shape):
    """The weight is of 7 times 5, the bias of 7: a factor has some of these sizes, in order.

    Of those that may be a factor, only one has a shape with which the next step works.
    """
    state = trained(torch.optim.Adafactor, lr=0.01)[1]
    state["state"][0]["row_var"] = torch.ones(shape)
    optimizer = lm.Plan(torch.optim.Adafactor, lr=0.01).build(net())
    if shape == (7, 1):
        optimizer.load_state_dict(state)
        train(net(), optimizer, range(1))
        return
    factor = shape in [(7, 5), (5, 1), (7,)]
    reason = "next step would fail" if factor else r"position number 0 is '0\.weight'"
    with pytest.raises(lm.StateError, match=reason):
        optimizer.load_state_dict(state)


def test_every_two_states_that_changed_places_are_told_apart():
    for kind in (torch.optim.NAdam, torch.optim.Adafactor, torch.optim.Adamax):
        for one in range(4):
            for other in range(one):
                state = trained(kind, lr=0.01)[1]
                entries = state["state"]
                entries[one], entries[other] = entries[other], entries[one]
                with pytest.raises(lm.StateError, match="by position"):
                    lm.Plan(kind, lr=0.01).build(net()).load_state_dict(state)


@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_torchs_sgd_without_momentum_has_nothing_to_lose(names, momentum):
    model = net()
    given = model.named_parameters() if names else model.parameters()
    theirs = torch.optim.SGD(given, lr=0.01)
    train(model, theirs, range(3))
    mine = net()
    mine.load_state_dict(model.state_dict())
    optimizer = lm.Plan(lm.SGD, lr=0.01, momentum=momentum).build(mine)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    assert len(optimizer.last_load.kept) == 4
    assert optimizer.last_load.new == ()
    theirs.param_groups[0]["momentum"] = momentum
    for each, by in ((model, theirs), (mine, optimizer)):
        train(each, by, range(3, 6))
    pairs = [dict(each.named_parameters()) for each in (model, mine)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-16)


def test_a_momentum_that_is_not_there_is_still_new():
    model = net()
    state = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9).state_dict()
    optimizer = lm.Plan(lm.SGD, lr=0.01, momentum=0.9).build(model)
    with pytest.raises(lm.StateError, match=r"not in the state: 0\.weight"):
        optimizer.load_state_dict(state, strict=True)


@pytest.mark.parametrize(("limit", "rows"), [(None, 0), (7, 1)])
def test_the_evaluations_that_torchs_lbfgs_writes_out_are_the_plans_default(limit, rows):
    model = net()
    theirs = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, max_eval=limit)
    train(model, theirs, range(2))
    mine = net()
    optimizer = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3).build(mine)
    optimizer.load_state_dict(theirs.state_dict())
    changed = optimizer.last_load.hyperparameters
    assert [(row.key, row.saved, row.now) for row in changed] == [("max_eval", 7, 3)] * rows
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.last_load.hyperparameters == ()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("kind", [lion_pytorch.Lion, torch.optim.NAdam])
def test_a_copy_of_a_plan_has_what_its_guests_keep_for_themselves(copied, kind):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).double()
    plan = lm.Plan(kind, lr=0.01, rules=[lm.Rule("2", weight_decay=0.1)])
    optimizer = plan.build(model)
    train(model, optimizer, range(2))
    other, its = copied((model, optimizer))
    for each, by in ((model, optimizer), (other, its)):
        train(each, by, range(2, 4))
    assert equal(dict(model.named_parameters()), dict(other.named_parameters()))
    guests = [list(dict.fromkeys(by._guests._of.values())) for by in (optimizer, its)]
    assert [len(found) for found in guests] == [1, 1]
    assert guests[0][0] is not guests[1][0]
    assert vars(guests[0][0]).keys() == vars(guests[1][0]).keys()
    assert guests[1][0].param_groups[0] is its.param_groups[0]


@pytest.mark.parametrize("old", ["module.0", "0", "_orig_mod.0", "module._orig_mod.0"])
def test_renamed_takes_names_as_they_stand_in_the_checkpoint(old):
    model = net()
    optimizer = lm.Plan(lm.Adam, lr=0.01).build(model)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    now = nn.ModuleDict({"first": model[0], "2": model[2]})
    loaded = lm.Plan(lm.Adam, lr=0.01).build(now)
    loaded.load_state_dict(state, strict=True, renamed={old: "first"})
    assert loaded.state[model[0].weight]["exp_avg"].equal(
        optimizer.state[model[0].weight]["exp_avg"]
    )
    with pytest.raises(lm.StateError, match=r"'0' of the saved state is given twice"):
        loaded.load_state_dict(state, renamed={old: "first", "module.module.0": None})

"""States that go through a folder of torch.distributed.checkpoint on one process, and come back."""

from __future__ import annotations

import copy

import pytest
import torch

import lamina as lm
from models import Tied, backward, equal, mlp, train

#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

BODY = lm.Rule("body", thaw=[1, 6], freeze=4, rewarm=lm.warmup(2))
PLANS = {
    "AdamW": lm.Plan(lm.AdamW, lr=0.01, rules=[BODY]),
    "SGD": lm.Plan(lm.SGD, lr=0.01, momentum=0.9, schedule=lm.linear(to=0.1), rules=[BODY]),
    "dropped": lm.Plan(lm.RMSprop, lr=0.01, rules=[BODY], frozen_state="drop"),
    "later": lm.Plan(lm.LAMB, lr=0.01, rules=[lm.Rule("body", thaw=7)]),
    "guest": lm.Plan(torch.optim.NAdam, lr=0.01, rules=[BODY]),
    "guest, later": lm.Plan(torch.optim.NAdam, lr=0.01, rules=[lm.Rule("body", thaw=7)]),
    "reactions": lm.Plan(
        lm.Adam,
        lr=0.01,
        feedback=lm.plateau("loss", patience=0),
        stop=lm.early_stop("loss", patience=9),
        rules=[lm.Rule("body", thaw=lm.on_plateau("loss", patience=0))],
    ),
}


def save(model, optimizer, folder):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(state, checkpoint_id=folder)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("steps", [0, 5])
def test_a_state_comes_back_as_it_was(tmp_path, name, steps):
    model = mlp()
    optimizer = PLANS[name].build(model, steps=9)
    train(model, optimizer, steps)
    if name == "reactions":
        for loss in (1.0, 2.0, 3.0):
            optimizer.report(loss=loss)
    optimizer.override(lr=0.5, rule="default")
    optimizer.override(lr=None)
    save(model, optimizer, tmp_path)
    twin = copy.deepcopy(model)
    other = PLANS[name].build(twin, steps=9)
    report = lm.load_distributed(other, tmp_path)
    assert report is other.last_load
    assert equal(other.state_dict(), optimizer.state_dict())
    train(model, optimizer, 4, first=steps)
    train(twin, other, 4, first=steps)
    assert equal(dict(twin.named_parameters()), dict(model.named_parameters()))


def test_a_tied_parameter_is_found_by_any_of_its_names(tmp_path):
    model = Tied().double()
    optimizer = lm.Plan(lm.AdamW, lr=0.1).build(model)
    train(model, optimizer, 2)
    save(model, optimizer, tmp_path)
    other = lm.Plan(lm.AdamW, lr=0.1).build(copy.deepcopy(model))
    lm.load_distributed(other, tmp_path)
    assert equal(other.state_dict(), optimizer.state_dict())


def test_lbfgs_comes_back_too(tmp_path):
    model = mlp()
    plan = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3)
    optimizer = plan.build(model)

    def stepped(net, chosen, step):
        def closure():
            chosen.zero_grad()
            return backward(net, step)

        chosen.step(closure)

    for step in range(3):
        stepped(model, optimizer, step)
    save(model, optimizer, tmp_path)
    twin = copy.deepcopy(model)
    other = plan.build(twin)
    lm.load_distributed(other, tmp_path)
    stepped(model, optimizer, 3)
    stepped(twin, other, 3)
    assert equal(dict(twin.named_parameters()), dict(model.named_parameters()))


def test_a_state_of_another_shape_changes_nothing(tmp_path):
    model = mlp()
    optimizer = PLANS["AdamW"].build(model, steps=9)
    train(model, optimizer, 3)
    save(model, optimizer, tmp_path)
    wider = mlp()
    wider.head = torch.nn.Linear(4, 3).double()
    other = PLANS["AdamW"].build(wider, steps=9)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=r"head.weight.* \(2, 4\).*\(3, 4\)"):
        lm.load_distributed(other, tmp_path)
    assert equal(other.state_dict(), before)


def test_what_torch_reads_into_a_new_optimizer_is_refused(tmp_path):
    from torch.distributed import checkpoint

    model = mlp()
    optimizer = PLANS["AdamW"].build(model, steps=9)
    train(model, optimizer, 3)
    checkpoint.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path)
    other = PLANS["AdamW"].build(copy.deepcopy(model), steps=9)
    hollow = {"optimizer": other.state_dict()}
    checkpoint.load(hollow, checkpoint_id=tmp_path)
    with pytest.raises(
        lm.StateError, match=r"counts 2 updates but has no exp_avg.*load_distributed"
    ):
        other.load_state_dict(hollow["optimizer"])
    assert other.clock == 0

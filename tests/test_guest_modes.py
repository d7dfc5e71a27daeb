"""Schedule-free guests: what is frozen takes no part in their train and eval modes."""

import copy

import pytest
import torch
from torch import nn

import lamina as lm

schedulefree = pytest.importorskip("schedulefree")
KINDS = [schedulefree.AdamWScheduleFree, schedulefree.SGDScheduleFree]
STEPS = 14
WINDOWS = [{"freeze": 5}, {"thaw": 5}, {"freeze": 4, "thaw": 9}, {"thaw": [2, 9], "freeze": 6}]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()


def plan(kind, **rule):
    return lm.Plan(kind, lr=0.1, rules=[lm.Rule("0.*", **rule)])


def backward(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    (model(x) - 1).square().mean().backward()


def one(model, optimizer, step):
    backward(model, step)
    optimizer.step()
    optimizer.zero_grad()


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", WINDOWS)
@pytest.mark.parametrize("frozen_state", ["keep", "drop"])
def test_modes_change_nothing_of_what_is_frozen_and_little_of_the_rest(kind, rule, frozen_state):
    """The truth: the same run without a change of modes, which the guest undoes up to rounding."""
    model, plain = small(), small()
    rule = {**rule, "frozen_state": frozen_state} if "freeze" in rule else rule
    optimizer = plan(kind, **rule).build(model, steps=STEPS, audit=True)
    other = plan(kind, **rule).build(plain, steps=STEPS)
    optimizer.train()
    other.train()
    for step in range(STEPS):
        before = values(model)
        optimizer.eval()
        moved = {name for name, value in values(model).items() if not value.equal(before[name])}
        assert not {name for name in moved if name.startswith("0.") and not optimizer.active["0.*"]}
        assert step < 2 or {"1.weight", "1.bias"} <= moved
        optimizer.train()
        if not optimizer.active["0.*"]:
            assert values(model)["0.weight"].equal(before["0.weight"])
        one(model, optimizer, step)
        one(plain, other, step)
    optimizer.eval()
    other.eval()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    if optimizer.active["0.*"]:
        assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_a_thaw_equals_the_guest_alone_over_a_group_added_then(kind):
    """torch's own way to thaw; the counters of the group are those of the run, as documented."""
    model, alone = small(), small()
    optimizer = plan(kind, thaw=4).build(model, steps=STEPS)
    theirs = kind(alone[1].parameters(), lr=0.1)
    optimizer.train()
    theirs.train()
    for step in range(STEPS):
        if step == 4:
            theirs.add_param_group({"params": alone[0].parameters()})
            ours = optimizer.param_groups[0]
            kept = {key: ours[key] for key in ("k", "weight_sum", "lr_max", "train_mode")}
            theirs.param_groups[1].update(kept)
            assert kept["train_mode"]
        one(model, optimizer, step)
        backward(alone, step)
        theirs.step()
        alone.zero_grad()
        if step % 3 == 0:
            for each in (optimizer, theirs):
                each.eval()
                each.train()
    optimizer.eval()
    theirs.eval()
    for mine, its in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", WINDOWS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_run_saved_in_any_mode_goes_on_with_the_same_bits(kind, rule, mode):
    model = small()
    optimizer = plan(kind, **rule).build(model, steps=STEPS, audit=True)
    for step in range(STEPS):
        getattr(optimizer, mode)()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.train()
        twin = small()
        twin.load_state_dict(saved[0])
        resumed = plan(kind, **rule).build(twin, steps=STEPS, audit=True, resume=saved[1])
        resumed.train()
        one(model, optimizer, step)
        one(twin, resumed, step)
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        for mine, theirs in zip(optimizer.param_groups, resumed.param_groups, strict=True):
            assert mine["train_mode"] == theirs["train_mode"]


def test_what_a_load_finds_frozen_in_eval_mode_is_brought_along_at_its_thaw():
    """Its weights are averages (x) then, and training goes on from others (y)."""
    kind = KINDS[0]
    model = small()
    optimizer = lm.Plan(kind, lr=0.1, rules=[lm.Rule("0.*", weight_decay=0.1)]).build(model)
    optimizer.train()
    for step in range(5):
        one(model, optimizer, step)
    training = values(model)["0.weight"]
    optimizer.eval()
    average = values(model)["0.weight"]
    later = plan(kind, thaw=7).build(model, steps=STEPS, audit=True, resume=optimizer.state_dict())
    later.train()
    for step in (5, 6):
        assert values(model)["0.weight"].equal(average)
        one(model, later, step)
    torch.testing.assert_close(values(model)["0.weight"], training, rtol=1e-12, atol=1e-12)
    assert later.param_groups[0]["train_mode"]


def test_a_step_in_eval_mode_is_refused_by_the_guest_as_alone():
    model = small()
    optimizer = plan(KINDS[0], freeze=1).build(model, steps=STEPS)
    optimizer.train()
    one(model, optimizer, 0)
    optimizer.eval()
    with pytest.raises(Exception, match="not in train mode"):
        one(model, optimizer, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen_in", ["train", "eval"])
@pytest.mark.parametrize("thawed_in", ["train", "eval"])
def test_what_is_frozen_by_hand_goes_along_with_the_modes(kind, frozen_in, thawed_in):
    model = small()
    optimizer = lm.Plan(kind, lr=0.1).build(model, steps=STEPS)
    optimizer.train()
    for step in range(3):
        one(model, optimizer, step)
    training = values(model)
    getattr(optimizer, frozen_in)()
    lm.freeze(model, "0")
    optimizer.eval()
    averaged = values(model)
    optimizer.train()
    one(model, optimizer, 3)
    getattr(optimizer, thawed_in)()
    lm.thaw(model, "0")
    for mode, wanted in (("eval", averaged), ("train", training)):
        getattr(optimizer, mode)()
        for name in ("0.weight", "0.bias"):
            assert not averaged[name].allclose(training[name])
            assert values(model)[name].allclose(wanted[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_loads_into_joined_groups_in_the_mode_of_what_trained(kind, mode):
    model = small()
    optimizer = plan(kind, frozen=True).build(model, steps=STEPS)
    optimizer.train()
    for step in range(4):
        one(model, optimizer, step)
    training = values(model)
    getattr(optimizer, mode)()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = small()
    other.load_state_dict(saved[0])
    joined = lm.Plan(kind, lr=0.1).build(other, steps=STEPS, resume=saved[1])
    joined.train()
    for name, value in values(other).items():
        assert value.allclose(training[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_weights_in_different_modes_is_refused(kind):
    model = small()
    optimizer = plan(kind, freeze=3).build(model, steps=STEPS)
    optimizer.train()
    for step in range(5):
        one(model, optimizer, step)
    optimizer.eval()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = small()
    other.load_state_dict(saved[0])
    with pytest.raises(lm.StateError, match=r"'default' joins .* in different modes.*train\(\)"):
        lm.Plan(kind, lr=0.1).build(other, steps=STEPS, resume=saved[1])
    optimizer.train()
    training, saved = values(model), copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(training)
    joined = lm.Plan(kind, lr=0.1).build(other, steps=STEPS, resume=saved)
    joined.train()
    assert all(value.equal(training[name]) for name, value in values(other).items())

"""torch.distributed.checkpoint's state dicts, in one process: nothing is lost, nothing steps."""

import contextlib
import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import lamina as lm
from models import backward, equal, mlp, same, train, weights
from test_state import tensors

PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.warmup(3) >> lm.cosine(to=0.1),
    feedback=lm.plateau("loss", patience=0),
    rules=[
        lm.Rule("body", thaw=4, lr=lm.times(0.5)),
        lm.Rule("head.bias", weight_decay=0),
    ],
)
MOMENTUM = lm.Plan(lm.SGD, lr=0.05, momentum=0.9, dampening=0.5, rules=[lm.Rule("body", thaw=4)])
STAGES = [0, 2, 4, 6]


def built(plan=PLAN, at=0):
    model = mlp()
    optimizer = plan.build(model, steps=20)
    train(model, optimizer, at)
    if plan is PLAN and at:
        optimizer.report(loss=1.0)
        optimizer.report(loss=1.0)
    return model, optimizer


def options(flat):
    return StateDictOptions(flatten_optimizer_state_dict=flat)


#: torch says so of what is meant here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def never_steps(monkeypatch):
    """The optimizer must not step while torch gets or sets a state; `train` may."""
    monkeypatch.setattr(
        "torch.distributed.checkpoint.state_dict._init_optim_state", watched(monkeypatch)
    )


def watched(monkeypatch):
    from torch.distributed.checkpoint import state_dict

    genuine = state_dict._init_optim_state

    def init(optimizer):
        def refused(*_, **__):
            raise AssertionError("torch stepped the optimizer")

        with monkeypatch.context() as patch:
            patch.setattr(type(optimizer), "step", refused)
            genuine(optimizer)

    return init


def assert_continues(first, second, at):
    """Both go on alike, bit by bit, to the end of the run."""
    (model, optimizer), (twin, other) = first, second
    twin.load_state_dict(model.state_dict())
    for net, its in (first, second):
        train(net, its, 19 - at, first=at)
        if its.resolved.reactions:
            its.report(loss=0.5)
        train(net, its, 1, first=19)
    assert same(weights(model), weights(twin))
    assert equal(tensors(optimizer), tensors(other))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("at", STAGES)
@pytest.mark.parametrize("plan", [PLAN, MOMENTUM])
def test_a_state_goes_out_and_in_with_frozen_and_thawed_parts(plan, at, flat):
    model, optimizer = built(plan, at)
    before, flags = weights(model), [p.requires_grad for p in model.parameters()]
    kept = tensors(optimizer)
    state = get_optimizer_state_dict(model, optimizer, options=options(flat))
    assert same(weights(model), before)
    assert equal(tensors(optimizer), kept)
    assert [p.requires_grad for p in model.parameters()] == flags
    twin, other = built(plan)
    with other.receiving():
        set_optimizer_state_dict(twin, other, copy.deepcopy(state), options=options(flat))
    assert other.clock == at
    assert equal(tensors(other), kept)
    assert other.param_groups[0]["feedback"] == optimizer.param_groups[0]["feedback"]
    assert [p.requires_grad for p in twin.parameters()] == flags
    assert other.last_load.new == other.last_load.dropped == ()
    assert same(weights(twin), weights(mlp()))
    assert_continues((model, optimizer), (twin, other), at)


@pytest.mark.parametrize("at", STAGES)
def test_model_and_optimizer_together(at):
    model, optimizer = built(at=at)
    weights_state, state = get_state_dict(model, optimizer)
    weights_state, state = copy.deepcopy((weights_state, state))
    twin, other = built()
    with other.receiving():
        set_state_dict(twin, other, model_state_dict=weights_state, optim_state_dict=state)
    assert_continues((model, optimizer), (twin, other), at)


@pytest.mark.parametrize("plan", [PLAN, MOMENTUM])
@pytest.mark.parametrize("at", STAGES)
def test_a_checkpoint_in_files(at, plan, tmp_path):
    model, optimizer = built(plan, at)
    twin, other = built(plan)
    through_files((model, optimizer), (twin, other), tmp_path)
    assert other.clock == at
    assert_continues((model, optimizer), (twin, other), at)


@pytest.mark.parametrize("at", STAGES)
def test_a_full_state_with_overrides_and_reports_that_the_fresh_one_lacks(at):
    model, optimizer = built(at=at)
    optimizer.override(eps=1e-5)
    full = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=full))
    twin, other = built()
    with other.receiving():
        set_optimizer_state_dict(twin, other, state, options=full)
    for key in ("overrides", "feedback"):
        assert other.param_groups[0][key] == optimizer.param_groups[0][key]
    assert_continues((model, optimizer), (twin, other), at)


def test_without_room_the_loss_is_an_error_and_changes_nothing():
    cases = [
        (PLAN, 6, False, "frozen while it loads"),
        (PLAN, 2, True, "no exp_avg and no exp_avg_sq"),
        (MOMENTUM, 2, True, "no momentum_buffer"),
    ]
    for plan, at, flat, words in cases:
        model, optimizer = built(plan, at)
        state = get_optimizer_state_dict(model, optimizer, options=options(flat))
        twin, other = built(plan)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(lm.StateError, match=words):
            set_optimizer_state_dict(twin, other, state, options=options(flat))
        assert equal(other.state_dict(), before)


def test_its_state_by_name_loads_without_torchs_help():
    model, optimizer = built(at=6)
    state = get_optimizer_state_dict(model, optimizer)
    twin, other = built()
    other.load_state_dict(state, strict=True)
    assert_continues((model, optimizer), (twin, other), 6)


def test_another_grouping_loads_too():
    model, optimizer = built(at=6)
    state = get_optimizer_state_dict(model, optimizer)
    twin, other = built(lm.Plan(lm.AdamW, lr=0.05))
    set_optimizer_state_dict(twin, other, state)
    assert equal(tensors(other), tensors(optimizer))
    assert other.clock == 6


def test_a_model_with_more_parameters_is_torchs_error_unless_strict_is_off():
    model, optimizer = built(lm.Plan(lm.AdamW, lr=0.05), at=2)
    state = get_optimizer_state_dict(model, optimizer)
    larger = mlp()
    larger.add_module("more", torch.nn.Linear(2, 2).double())
    other = lm.Plan(lm.AdamW, lr=0.05).build(larger)
    with pytest.raises(RuntimeError, match=r"more\.weight"):
        set_optimizer_state_dict(larger, other, copy.deepcopy(state))
    with pytest.warns(lm.LaminaWarning, match=r"not in the state: more\.weight"):
        set_optimizer_state_dict(larger, other, state, options=StateDictOptions(strict=False))
    assert other.last_load.new == ("more.weight", "more.bias")
    assert len(other.last_load.kept) == 4


@pytest.mark.parametrize(
    "plan",
    [lm.Plan(lm.SGD, lr=0.1), lm.Plan(torch.optim.NAdam, lr=0.1), lm.Plan(lm.LBFGS, lr=0.1)],
)
def test_an_optimizer_without_tensors_is_not_stepped_either(plan):
    model, optimizer = built(plan)
    before = copy.deepcopy(optimizer.state_dict())
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.clock == 0
    assert equal(optimizer.state_dict(), before)
    assert same(weights(model), weights(mlp()))
    assert all(p.grad is None for p in model.parameters())


def test_canary_torch_steps_an_optimizer_with_empty_state():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(AssertionError, match="stepped"):
        get_optimizer_state_dict(model, optimizer)


def test_room_is_taken_back_where_nothing_was_loaded():
    model, optimizer = built(at=2)
    before = copy.deepcopy(optimizer.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    with optimizer.receiving():
        assert all(p.requires_grad for p in model.parameters())
        assert all("exp_avg" in entry for entry in optimizer.state.values())
    assert equal(optimizer.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ZeroDivisionError), optimizer.receiving():
        raise ZeroDivisionError
    assert equal(optimizer.state_dict(), before)
    train(model, optimizer, 1, first=2)
    assert optimizer.clock == 3


MOVING = {
    "SGD": lm.Plan(lm.SGD, lr=0.05, momentum=lm.linear(0.0, 0.9), dampening=0.5),
    "RMSprop": lm.Plan(lm.RMSprop, lr=0.01, momentum=lm.linear(0.0, 0.9)),
    "LARS": lm.Plan(lm.LARS, lr=0.05, momentum=lm.linear(0.0, 0.9)),
    "overridden": lm.Plan(lm.SGD, lr=0.05, dampening=0.5),
}
KEEP_NO_STATE = lm.Plan(torch.optim.SGD, lr=0.05)
GUESTS = {
    "NAdam": lm.Plan(torch.optim.NAdam, lr=0.05),
    "a later NAdam": lm.Plan(
        lm.AdamW, lr=0.05, rules=[lm.Rule("body", thaw=2, optimizer=torch.optim.NAdam, lr=0.05)]
    ),
    "SGD, momentum": lm.Plan(torch.optim.SGD, lr=0.05, momentum=lm.linear(0.0, 0.9)),
}


def through_files(source, target, folder, receiving=True):
    """What a trainer does: save, read in place, set."""
    (model, optimizer), (twin, other) = source, target
    dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    with other.receiving() if receiving else contextlib.nullcontext():
        state = get_optimizer_state_dict(twin, other)
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"o": state}, checkpoint_id=folder, planner=planner)
        set_optimizer_state_dict(twin, other, state)


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("at", [0, 1, 6])
def test_a_momentum_that_begins_at_zero_comes_back(name, at, tmp_path):
    model, optimizer = built(MOVING[name], at)
    if name == "overridden" and at > 1:
        optimizer.override(momentum=0.9)
        train(model, optimizer, 1, first=at)
        at += 1
    twin, other = built(MOVING[name])
    through_files((model, optimizer), (twin, other), tmp_path)
    assert equal(tensors(other), tensors(optimizer))
    assert any("momentum_buffer" in entry for entry in tensors(other).values()) == (at > 1) or (
        name == "RMSprop"
    )
    assert_continues((model, optimizer), (twin, other), at)


@pytest.mark.parametrize("receiving", [True, False])
@pytest.mark.parametrize("name", GUESTS)
def test_the_state_of_a_guest_is_not_lost_in_silence(name, receiving, tmp_path):
    source, (twin, other) = built(GUESTS[name], 6), built(GUESTS[name])
    words = "empty after 6 steps|frozen while it loads" if not receiving else "empty after 6 steps"
    with pytest.raises(lm.StateError, match=f"({words}).*load_distributed"):
        through_files(source, (twin, other), tmp_path, receiving)
    assert (other.clock, other.last_load) == (0, None)  # dcp.load itself wrote into its tensors
    lm.load_distributed(other, tmp_path, "o")
    assert_continues(source, (twin, other), 6)


def test_the_memory_of_lbfgs_is_not_lost_in_silence(tmp_path):
    plan = lm.Plan(lm.LBFGS, lr=0.5, max_iter=3)
    model, optimizer = built(plan)
    optimizer.step(lambda: closure(model, optimizer))
    twin, other = built(plan)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lm.StateError, match=r"empty after 1 steps.*load_distributed"):
        through_files((model, optimizer), (twin, other), tmp_path)
    assert equal(other.state_dict(), before)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    del state["state"]["body.weight"]["d"]
    with pytest.raises(lm.StateError, match="empty after 1 steps"):
        other.load_state_dict(state)
    lm.load_distributed(other, tmp_path, "o")
    assert equal(other.state_dict(), optimizer.state_dict())
    converged = lm.Plan(lm.LBFGS, tolerance_grad=1e9)
    model, optimizer = built(converged)
    optimizer.step(lambda: closure(model, optimizer))
    built(converged)[1].load_state_dict(get_optimizer_state_dict(model, optimizer))


def closure(model, optimizer):
    optimizer.zero_grad()
    return backward(model, 0)


@pytest.mark.parametrize("receiving", [True, False])
@pytest.mark.parametrize(
    ("plan", "at"),
    [
        (KEEP_NO_STATE, 6),
        (GUESTS["SGD, momentum"], 1),  # the only step so far had none
        (GUESTS["NAdam"], 0),
        (
            lm.Plan(torch.optim.NAdam, lr=0.05, rules=[lm.Rule("body", thaw=8)]),
            0,
        ),
        (
            lm.Plan(
                lm.SGD,
                lr=0.05,
                rules=[
                    lm.Rule(
                        "body",
                        optimizer=torch.optim.NAdam,
                        lr=0.05,
                        thaw=1,
                        freeze=3,
                        frozen_state="drop",
                    )
                ],
            ),
            4,
        ),
    ],
)
def test_what_has_no_state_by_right_still_loads(plan, at, receiving, tmp_path):
    source, target = built(plan, at), built(plan)
    through_files(source, target, tmp_path, receiving)
    assert target[1].clock == at
    assert equal(tensors(target[1]), tensors(source[1]))
    assert_continues(source, target, at)


def test_a_parameter_without_gradients_beside_others_has_no_state_by_right():
    model, optimizer = built(GUESTS["NAdam"])
    for step in range(3):
        backward(model, step)
        model.head.bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
    twin, other = built(GUESTS["NAdam"])
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    assert equal(tensors(other), tensors(optimizer))


def test_canary_room_that_was_not_read_is_told_from_a_momentum(monkeypatch, tmp_path):
    monkeypatch.setattr("lamina.state.schema._unread", lambda key, value: False)
    with pytest.raises(AssertionError, match="assert False"):
        test_a_momentum_that_begins_at_zero_comes_back("SGD", 1, tmp_path)

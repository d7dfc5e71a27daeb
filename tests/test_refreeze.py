"""What becomes of an optimizer's state when its parameters freeze again: kept, or dropped."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import lamina as lm
from models import equal, mlp, same, weights

STEPS = 9
#: the body trains in [1, 3), [4, 6) and from 7 on
TURNS = {"thaw": [1, 4, 7], "freeze": [3, 6]}
TRAINS = [False, True, True, False, True, True, False, True, True]
COUNTS = [0, 1, 0, 0, 1, 0, 0, 1, 2]  # updates in this window, after each step
ALGORITHMS = {
    "AdamW": (lm.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "Adam, amsgrad": (lm.Adam, {"lr": 0.01, "amsgrad": True}),
    "SGD": (lm.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.5}),
    "RMSprop": (lm.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "Muon": (lm.Muon, {"lr": 0.01}),
    "LAMB": (lm.LAMB, {"lr": 0.01}),
    "guest": (torch.optim.NAdam, {"lr": 0.01}),
}


def planned(name: str, state: str = "drop", clip: float | None = None) -> lm.Plan:
    optimizer, hyper = ALGORITHMS[name]
    return lm.Plan(
        "SGD",
        lr=0.1,
        clip_norm=clip,
        nonfinite="skip",
        nonfinite_check="all",
        rules=[
            lm.Rule("body", **TURNS, frozen_state=state),
            lm.Rule("body.weight", optimizer=optimizer, **hyper),
        ],
    )


def gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()


def take(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_thaw_after_a_drop_equals_an_optimizer_built_then(name):
    model, reference = mlp(), mlp()
    optimizer = planned(name).build(model, steps=STEPS)
    make, hyper = ALGORITHMS[name]
    head = lm.SGD(reference.head.parameters(), lr=0.1)
    for step in range(STEPS):
        if TRAINS[step] and not TRAINS[step - 1]:
            body = [make([reference.body.weight], **hyper), lm.SGD([reference.body.bias], lr=0.1)]
        take(model, optimizer, range(step, step + 1))
        gradients(reference, step)
        for each in (head, *(body if TRAINS[step] else ())):
            each.step()
        reference.zero_grad()
        assert same(weights(model), weights(reference)), step
        count = int(optimizer.state.get(model.body.weight, {}).get("step", 0))
        assert count == COUNTS[step]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_thaw_after_a_keep_goes_on(name):
    model, reference = mlp(), mlp()
    optimizer = planned(name, "keep").build(model, steps=STEPS)
    make, hyper = ALGORITHMS[name]
    head = lm.SGD(reference.head.parameters(), lr=0.1)
    body = [make([reference.body.weight], **hyper), lm.SGD([reference.body.bias], lr=0.1)]
    for step in range(STEPS):
        take(model, optimizer, range(step, step + 1))
        gradients(reference, step)
        for each in (head, *(body if TRAINS[step] else ())):
            each.step()
        reference.zero_grad()
        assert same(weights(model), weights(reference)), step
    assert int(optimizer.state[model.body.weight].get("step", 6)) == sum(TRAINS)


def held(optimizer: torch.optim.Optimizer, param: torch.Tensor) -> list[weakref.ref]:
    """Weak references to the state tensors of a parameter, its count aside."""
    entry = optimizer.state[param]
    return [weakref.ref(tensor) for key, tensor in entry.items() if key != "step"]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("state", ["keep", "drop"])
def test_a_drop_frees_the_tensors(name, state):
    model = mlp()
    optimizer = planned(name, state, clip=1.0).build(model, steps=STEPS)
    take(model, optimizer, range(2))
    tensors = held(optimizer, model.body.weight)
    assert tensors
    assert all(tensor() is not None for tensor in tensors)
    take(model, optimizer, range(2, 3))
    assert all((tensor() is None) == (state == "drop") for tensor in tensors)
    take(model, optimizer, range(3, 5))
    assert held(optimizer, model.body.weight)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "guest"])
@pytest.mark.parametrize("cut", [0, 2, 3, 4, 6])
def test_a_run_saved_anywhere_goes_on_bit_for_bit(name, cut):
    model = mlp()
    optimizer = planned(name).build(model, steps=STEPS)
    take(model, optimizer, range(cut))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(model)
    other = planned(name).build(resumed, steps=STEPS)
    other.load_state_dict(saved)
    take(model, optimizer, range(cut, STEPS))
    take(resumed, other, range(cut, STEPS))
    assert same(weights(model), weights(resumed))
    assert equal(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_a_state_dict_taken_before_the_freeze_is_not_changed_by_it():
    model = mlp()
    optimizer = planned("AdamW").build(model, steps=STEPS)
    take(model, optimizer, range(2))
    taken = optimizer.state_dict()
    keys = [list(entry) for entry in taken["state"].values()]
    take(model, optimizer, range(2, 3))
    assert [list(entry) for entry in taken["state"].values()] == keys


def test_state_of_a_plan_that_kept_it_is_dropped_when_it_is_loaded_frozen():
    model = mlp()
    optimizer = planned("AdamW", "keep").build(model, steps=STEPS)
    take(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(model)
    other = planned("AdamW", "drop").build(resumed, steps=STEPS)
    other.load_state_dict(saved)
    assert list(other.state[resumed.body.weight]) == ["step"]
    assert int(other.state[resumed.body.weight]["step"]) == 0


def test_a_skipped_step_closes_no_window():
    model = mlp()
    optimizer = planned("AdamW", clip=1.0).build(model, steps=STEPS)
    take(model, optimizer, range(2))
    gradients(model, 2)
    model.body.weight.grad[0, 0] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    assert (optimizer.skipped, optimizer.clock) == (1, 2)
    assert "exp_avg" in optimizer.state[model.body.weight]
    take(model, optimizer, range(2, 3))
    assert "exp_avg" not in optimizer.state[model.body.weight]


def test_a_guest_resumes_with_a_part_that_has_not_thawed_yet():
    model = mlp()
    optimizer = planned("guest", "keep").build(model, steps=STEPS)
    saved = copy.deepcopy(optimizer.state_dict())
    other = planned("guest", "keep").build(model, steps=STEPS)
    other.load_state_dict(saved)
    take(model, other, range(3))
    assert "exp_avg" in other.state[model.body.weight]


def test_torchs_checkpoint_of_a_guest_that_never_stepped_takes_no_step():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = mlp()
    optimizer = lm.Plan(torch.optim.NAdam, lr=0.1).build(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert optimizer.clock == 0
    assert all(param.grad is None for param in model.parameters())
    optimizer.load_state_dict(state)
    take(model, optimizer, range(1))
    assert optimizer.clock == 1


def test_it_cascades_and_is_shown():
    rules = [
        lm.Rule("*", freeze=4, frozen_state="drop"),
        lm.Rule("head", frozen_state="keep"),
    ]
    plan = lm.Plan("SGD", lr=0.1, rules=rules)
    preview = plan.preview(mlp(), steps=8)
    assert {row.group: row.thaw for row in preview.rows} == {
        "*": "until step 4, state dropped",
        "* + head": "until step 4",
    }
    assert "frozen_state = drop" in str(preview.explain("body.bias"))
    assert "head  'keep'  ->  'keep'" in str(preview.explain("head.bias"))
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert 'frozen_state = "drop"' in plan.to_toml()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lm.Rule("a", frozen_state="reset"), ["frozen_state='reset'", "'keep' or 'drop'"]),
        (lambda: lm.Rule("a", frozen_state=True), ["frozen_state=True", "'keep' or 'drop'"]),
        (
            lambda: lm.Plan("LBFGS", frozen_state="drop").build(mlp()),
            ["LBFGS keeps one history", "frozen_state='drop'"],
        ),
        (
            lambda: lm.Plan(torch.optim.Adagrad, lr=1, frozen_state="drop").build(mlp()),
            ["Adagrad makes its state when it is built", "frozen_state='keep'"],
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(lm.PlanError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_canary_state_that_survives_is_found(monkeypatch):
    monkeypatch.setattr(lm.Optimizer, "_drop_states", lambda self, before: None)
    with pytest.raises(AssertionError):
        test_a_thaw_after_a_drop_equals_an_optimizer_built_then("SGD")
    with pytest.raises(AssertionError):
        test_a_drop_frees_the_tensors("SGD", "drop")

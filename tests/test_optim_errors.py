"""Bad input to the optimizers of `lamina.optim`: errors name the parameter and change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina.errors import HyperparameterError, PlanError, StateError
from reference.dropin import CASES

NAMES = sorted({case.name for case in CASES})


def matrix(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((3, 2), value))


def step(optimizer, *params) -> None:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


# ---------------------------------------------------------------------------------------- bad input


def bad_groups():
    shared = matrix()
    twice = {"params": [shared, matrix(), shared]}
    named = {"params": [("encoder.weight", shared), ("decoder.weight", shared)]}
    return [
        (twice, r"number 2 is the same tensor as number 0; it would be updated twice"),
        (named, r"'decoder.weight' is the same tensor as 'encoder.weight'"),
        ({"params": [matrix() * 2]}, r"number 0 is not a leaf tensor"),
        ({"params": [("a", matrix()), ("b", matrix() + 1)]}, r"\('a', 'b'\): 'b' is not a leaf"),
        ({"params": [matrix(), 3.0]}, "number 1 is a float; expected a tensor"),
        ({"params": [matrix()], "lr": -1.0}, r"group 0 \(number 0\): .* was given lr=-1.0"),
        ({"lr": 0.1}, "expected a dict such as"),
        ([matrix()], "expected a dict such as"),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_bad_groups_name_the_parameter(name):
    for group, words in bad_groups():
        optimizer = getattr(optim, name)([matrix()], lr=0.1)
        if isinstance(group, dict) and isinstance(group.get("params", [0])[0], tuple):
            optimizer = getattr(optim, name)([("first", matrix())], lr=0.1)
        with pytest.raises(PlanError, match=words.replace("group 0", "group 1")):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_in_two_groups_is_named(name):
    shared = matrix()
    groups = [{"params": [matrix(), shared]}, {"params": [shared]}]
    words = "group 1 .*number 0 is the same tensor as number 1 of parameter group 0"
    with pytest.raises(PlanError, match=words):
        getattr(optim, name)(groups, lr=0.1)
    groups = [
        {"params": [("encoder.weight", shared)]},
        {"params": [("decoder.weight", shared)]},
    ]
    with pytest.raises(PlanError, match=r"'decoder.weight' is the same tensor as 'enc"):
        getattr(optim, name)(groups, lr=0.1)


def test_combinations_are_checked_for_added_groups():
    optimizer = optim.SGD([matrix()], lr=0.1, momentum=0.9, nesterov=True)
    with pytest.raises(HyperparameterError, match=r"group 1 .*nesterov=True with momentum=0"):
        optimizer.add_param_group({"params": [matrix()], "momentum": 0.0})
    assert len(optimizer.param_groups) == 1


def test_muon_is_for_matrices():
    net = nn.Linear(2, 3)
    with pytest.raises(PlanError, match=r"'bias' has shape \(3,\), and Muon is for matrices"):
        optim.Muon(net.named_parameters())
    with pytest.raises(PlanError, match="is complex"):
        optim.Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("prefer", [None, False], ids=["fast", "readable"])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (3, 8, 5), (4, 2, 3, 3, 3), (2, 1, 1, 1)])
def test_muon_takes_a_convolution_as_the_matrix_of_its_first_dimension(shape, adjust, prefer):
    torch.manual_seed(0)
    start = torch.randn(shape)
    filters = nn.Parameter(start.clone())
    matrix = nn.Parameter(start.flatten(1).clone())
    if len(shape) == 4:
        filters.data = filters.data.to(memory_format=torch.channels_last)
    how = {"lr": 0.02, "adjust_lr_fn": adjust}
    ours = optim.Muon([filters], foreach=prefer, **how)
    theirs = torch.optim.Muon([matrix], **how)
    for _ in range(5):
        grad = torch.randn(shape)
        filters.grad, matrix.grad = grad.clone(), grad.flatten(1).clone()
        ours.step()
        theirs.step()
        # a last digit that differs may become one of bfloat16 in the iteration
        close = {"rtol": 1e-2, "atol": 1e-3} if prefer is False else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(filters.detach().flatten(1), matrix.detach(), **close)
    state = ours.state[filters]["momentum_buffer"]
    assert state.shape == shape
    twin = nn.Parameter(filters.detach().clone())
    resumed = optim.Muon([twin], foreach=prefer, **how)
    resumed.load_state_dict(ours.state_dict())
    filters.grad, twin.grad = grad.clone(), grad.clone()
    ours.step()
    resumed.step()
    assert torch.equal(filters, twin)


def test_muon_trains_the_convolutions_of_a_plan():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    rule = lm.Rule("ndim<2", optimizer=lm.AdamW, lr=1e-3)
    optimizer = lm.Plan(lm.Muon, lr=0.02, rules=[rule]).build(net, steps=3)
    before = [param.detach().clone() for param in net.parameters()]
    net(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, net.parameters()))


def test_torch_still_says_what_it_says():
    with pytest.raises(TypeError, match="iterable of Tensors"):
        optim.SGD(matrix())
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.SGD([])
    with pytest.raises(TypeError, match="ordered collections"):
        optim.SGD([{"params": {matrix()}}])


# --------------------------------------------------------------------------------- loading a state


def test_a_state_that_does_not_fit_changes_nothing():
    first, second, third = matrix(), matrix(), nn.Parameter(torch.ones(5))
    saver = optim.Adam([third], lr=0.5)
    step(saver, third)
    optimizer = optim.Adam([first], lr=0.1)
    step(optimizer, first)
    with pytest.raises(StateError, match=r"exp_avg of parameter number 0 has shape \(5,\)"):
        optimizer.load_state_dict(saver.state_dict())
    with pytest.raises(StateError, match=r"groups of sizes \[1\].*sizes \[1, 1\]"):
        optim.Adam([{"params": first}, {"params": second}]).load_state_dict(saver.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.state[first]["exp_avg"].shape == (3, 2)


def test_an_older_state_keeps_the_keys_of_the_live_groups():
    param = matrix()
    optimizer = optim.Adam([{"params": [param], "layer": "head"}], state_dtype="float64")
    saved = torch.optim.Adam([param], lr=0.5).state_dict()
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["layer"], group["state_dtype"], group["lr"]) == ("head", "float64", 0.5)
    assert group["params"][0] is param


def test_a_loaded_state_is_a_copy():
    param = matrix()
    optimizer = optim.Adam([param])
    step(optimizer, param)
    saved = optimizer.state_dict()
    mean = saved["state"][0]["exp_avg"].clone()
    other = optim.Adam([param])
    other.load_state_dict(saved)
    step(other, param)
    assert torch.equal(saved["state"][0]["exp_avg"], mean)


def test_load_hooks_run():
    param, seen = matrix(), []
    optimizer = optim.SGD([param], lr=0.1)

    def halve(_, state):
        state = {**state, "param_groups": [{**g, "lr": g["lr"] / 2} for g in state["param_groups"]]}
        seen.append("pre")
        return state

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert seen == ["pre", "post"]


def test_step_counts_of_old_checkpoints():
    param = matrix()
    optimizer = optim.Adam([param])
    step(optimizer, param)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = 7
    optimizer.load_state_dict(saved)
    step(optimizer, param)
    assert float(optimizer.state[param]["step"]) == 8.0


# ------------------------------------------------------------------------------------ what a group
# may say of its implementation, and options that are as good as True and False


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"differentiable": True, "foreach": True}, "differentiable=True goes by the rule"),
        ({"fused": True, "foreach": True}, "fused and foreach cannot both be True"),
    ],
)
def test_a_group_asks_for_what_an_optimizer_may(given, words):
    with pytest.raises(HyperparameterError, match=rf"group 0 \(number 0\): {words}"):
        optim.Adam([{"params": [matrix()], **given}])
    optimizer = optim.Adam([matrix()], foreach=True)
    given = {key: value for key, value in given.items() if key != "foreach"}
    with pytest.raises(HyperparameterError, match=rf"group 1 \(number 0\): {words}"):
        optimizer.add_param_group({"params": [matrix()], **given})
    assert len(optimizer.param_groups) == 1


OPTIONS = [
    ("Adam", ["amsgrad", "maximize", "decoupled_weight_decay"], {}),
    ("AdamW", ["amsgrad", "maximize"], {}),
    ("SGD", ["nesterov", "maximize"], {"momentum": 0.9}),
    ("RMSprop", ["centered", "maximize"], {}),
    ("Muon", ["nesterov"], {}),
]


@pytest.mark.parametrize("given", [0, 1, np.True_, np.False_])
@pytest.mark.parametrize("how", ["optimizer", "group", "by hand", "plan"])
@pytest.mark.parametrize(("name", "keys", "more"), OPTIONS)
def test_numbers_that_stand_for_true_and_false(name, keys, more, how, given):
    def trained(value):
        torch.manual_seed(0)
        param, chosen = nn.Parameter(torch.ones(3, 2)), dict.fromkeys(keys, value)
        kind = getattr(optim, name)
        if how == "optimizer":
            optimizer = kind([param], **chosen, **more)
        elif how == "group":
            optimizer = kind([{"params": [param], **chosen}], **more)
        elif how == "plan":
            model = nn.ParameterDict({"one": param})
            optimizer = lm.Plan(name, lr=1e-3, **chosen, **more).build(model)
        else:
            optimizer = kind([param], **dict.fromkeys(keys, bool(value)), **more)
            optimizer.param_groups[0].update(chosen)
        for _ in range(3):
            param.grad = torch.randn(3, 2)
            optimizer.step()
        return param, optimizer

    param, optimizer = trained(given)
    assert torch.equal(param, trained(bool(given))[0])
    if how != "by hand":  # where the user's own values stay, as in torch
        kept = [optimizer.param_groups[0][key] for key in keys]
        assert all(type(value) in (bool, int) for value in kept)


def test_numpy_numbers_become_pythons_so_that_checkpoints_load():
    betas = tuple(np.array([0.8, 0.9]))
    optimizer = optim.Adam([matrix()], lr=np.float32(0.5), betas=betas, eps=np.float64(1e-6))
    [group] = optimizer.param_groups
    for each in (group, optimizer.defaults):
        assert type(each["lr"]) is float
        assert each["betas"] == (0.8, 0.9)
        assert {type(value) for value in (*each["betas"], each["eps"])} == {float}

"""The interface of `torch.optim`: names, signatures, groups, closures, hooks and options."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina.errors import HyperparameterError, PlanError
from lamina.kernels import choose
from reference.dropin import CASES, STEPPERS

NAMES = sorted({case.name for case in CASES})
steppers = pytest.mark.parametrize("case", STEPPERS, ids=str)


def matrix(value: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full((3, 2), value))


def step(optimizer, *params) -> None:
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


def closure_of(*params):
    def closure():
        loss = sum(param.square().sum() for param in params if param.requires_grad)
        for param in params:
            param.grad = None
        loss.backward()
        return loss

    return closure


# --------------------------------------------------------------------------- names and signatures


def test_everything_of_torch_is_there():
    assert set(torch.optim.__all__) <= set(optim.__all__)
    for name in optim.__all__:
        assert hasattr(optim, name)
    for name in set(torch.optim.__all__) - set(NAMES) - {"lr_scheduler"}:
        assert getattr(optim, name) is getattr(torch.optim, name)


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(torch.optim, name)])
def test_signatures_begin_with_those_of_torch(name):
    ours, theirs = (
        inspect.signature(getattr(where, name)).parameters for where in (optim, torch.optim)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    for key in theirs:
        assert ours[key].default == theirs[key].default
        assert ours[key].kind == theirs[key].kind
    for key in list(ours)[len(theirs) :]:
        assert ours[key].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("name", [*NAMES, "Adagrad", "NAdam", "SparseAdam", "Adafactor"])
def test_plans_may_name_them(name):
    assert lm.Plan(name, lr=0.1) == lm.Plan(getattr(optim, name), lr=0.1)


# ------------------------------------------------------------------------------------------ groups


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forms_of_groups(case):
    params = [matrix() for _ in range(4)]
    optimizer = case.make(
        params=[{"params": params[0]}, {"params": iter(params[1:3]), "lr": 0.5}], lr=0.25
    )
    optimizer.add_param_group({"params": params[3], "name": "added"})
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5, 0.25]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2, 1]
    optimizer.step(closure_of(*params))
    assert all(bool((param != 1).all()) for param in params)


@steppers
def test_a_group_may_come_after_steps(case):
    first, second, alone = matrix(), matrix(), matrix()
    optimizer = case.make([first], lr=0.1, **case.options)
    fresh = case.make([alone], lr=0.1, **case.options)
    step(optimizer, first)
    optimizer.add_param_group({"params": [second]})
    step(optimizer, first, second)
    step(fresh, alone)
    assert torch.equal(second, alone)  # its own bias correction, from its own first step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_any_gradient_nothing_happens(case):
    frozen, unused = matrix().requires_grad_(False), matrix()
    optimizer = case.make([frozen, unused], lr=0.1)
    optimizer.step(lambda: torch.tensor(1.0))
    if case.name != "LBFGS":
        optimizer.step()
    assert torch.equal(frozen, torch.ones(3, 2))
    assert torch.equal(unused, torch.ones(3, 2))


@steppers
def test_one_learning_rate_tensor_is_not_shared_by_groups(case):
    lr = torch.tensor(0.1)
    params = [matrix() for _ in range(4)]
    groups = [{"params": params[0]}, {"params": params[1]}, {"params": params[2], "lr": lr}]
    optimizer = case.make(groups, lr=lr)
    optimizer.param_groups[0]["lr"].fill_(5.0)
    optimizer.add_param_group({"params": params[3]})
    values = [float(group["lr"]) for group in optimizer.param_groups]
    assert values == pytest.approx([5.0, 0.1, 0.1, 0.1])
    assert optimizer.param_groups[0]["lr"] is lr  # the caller's own, as in torch


def test_the_given_dicts_are_left_alone():
    groups = [{"params": [matrix()]}, {"params": [matrix()], "lr": 0.5}]
    optim.SGD(groups, lr=0.1)
    assert [sorted(group) for group in groups] == [["params"], ["lr", "params"]]


def test_names():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = optim.AdamW(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in net.named_parameters()]
    saved = optimizer.state_dict()["param_groups"][0]["param_names"]
    assert saved == optimizer.param_groups[0]["param_names"]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [matrix()]})


# ------------------------------------------------------------------------------- closures and hooks


@steppers
def test_closures_and_hooks(case):
    param = matrix()
    optimizer = case.make([param], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(param.sum().item()))
    optimizer.register_step_post_hook(lambda *_: seen.append(param.sum().item()))

    def closure():
        assert torch.is_grad_enabled()
        return closure_of(param)()

    with torch.no_grad():
        assert optimizer.step(closure).item() == 6.0
    assert seen == [6.0, param.sum().item()]
    assert seen[1] < 6.0
    assert not param.grad.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_subclass_may_override_step(name):
    calls = []

    class Mine(getattr(optim, name)):
        def step(self, closure=None):
            calls.append(1)
            return super().step(closure)

    param = matrix()
    optimizer = Mine([param], lr=0.1)
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    optimizer.step(closure_of(param))
    assert calls == [1]
    assert hooked
    assert param.sum().item() < 6.0


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("name", "options", "kernel"),
    [
        ("AdamW", {}, "native"),
        ("AdamW", {"fused": True}, "fused"),
        ("AdamW", {"foreach": True}, "native"),  # there is no foreach form of it
        ("AdamW", {"foreach": False}, "readable"),
        ("AdamW", {"fused": False}, "readable"),
        ("SGD", {"fused": True}, "fused"),
        ("RMSprop", {"foreach": True}, "foreach"),
        ("RMSprop", {"foreach": False}, "readable"),
        ("LAMB", {"foreach": True}, "foreach"),
        ("LARS", {"foreach": False}, "readable"),
    ],
)
def test_foreach_and_fused_choose_the_kernel(name, options, kernel):
    param = matrix()
    optimizer = getattr(optim, name)([param], **options)
    param.grad = torch.ones_like(param)
    [batch] = optimizer._collect(optimizer.param_groups)
    assert choose(batch)[0].name == kernel
    optimizer.step()
    assert param.sum().item() < 6.0


def test_what_is_refused_is_named():
    with pytest.raises(HyperparameterError, match=r"Adam: differentiable=True.*fused=True"):
        optim.Adam([matrix()], differentiable=True, fused=True)
    with pytest.raises(HyperparameterError, match=r"LARS has no differentiable form; SGD"):
        optim.LARS([{"params": [matrix()], "differentiable": True}])
    with pytest.raises(HyperparameterError, match="fused and foreach"):
        optim.SGD([matrix()], foreach=True, fused=True)
    optimizer, param = optim.Adam([("head", given := matrix())], capturable=True), given
    with pytest.raises(PlanError, match=r"capturable=True needs an accelerator.*'head' is on the"):
        step(optimizer, param)
    assert torch.equal(param, torch.ones(3, 2))


@steppers
@pytest.mark.parametrize("asked", [torch.float32, "float32", "torch.float32"])
def test_state_dtype(case, asked):
    param = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = case.make([param], lr=0.1, **case.options, state_dtype=asked)
    for _ in range(2):
        step(optimizer, param)
        entry = optimizer.state[param]
        assert {value.dtype for value in entry.values()} == {torch.float32}
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(HyperparameterError, match="state_dtype='int8'"):
        case.make([param], state_dtype="int8")


def test_sparse_gradients():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = optim.SGD(table.parameters(), lr=1.0, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.tensor([1, 3])).sum().backward()
        optimizer.step()
    torch.testing.assert_close(before[1] - table.weight[1], torch.full((2,), 2.9))
    assert torch.equal(before[0], table.weight[0])
    with pytest.raises(PlanError, match=r"AdamW cannot update .*sparse"):
        optim.AdamW(table.parameters()).step()


def test_no_warning_comes_from_a_scheduler_of_torch():
    param = matrix()
    optimizer = optim.SGD([param], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step(optimizer, param)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)

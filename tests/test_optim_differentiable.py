"""differentiable=True: the update is recorded by autograd, wherever torch has it."""

import copy
import math

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina.errors import HyperparameterError, PlanError

CASES = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("AdamW", {"weight_decay": 0.1}),
]
TARGET = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


@pytest.fixture
def double():
    """Torch corrects the bias in its default dtype, where it can be differentiated."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def begin(values=(0.5, 0.2, -0.4)):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def train(cls, start, steps=2, **hyper):
    """The weights after some steps, as a function of the first ones and the hyperparameters."""
    param = start.clone()
    optimizer = cls([param], differentiable=True, **hyper)
    for _ in range(steps):
        copied = param.clone()
        loss = ((copied - TARGET).abs() ** 2 * (copied.real.sin() + 2)).sum()
        (param.grad,) = torch.autograd.grad(loss, copied, create_graph=True)
        optimizer.step()
    return param.clone()


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_gradients_through_steps_are_those_of_finite_differences(name, hyper):
    def weights(start, lr):
        return train(getattr(optim, name), start, lr=lr, **hyper)

    assert torch.autograd.gradcheck(weights, (begin(), number(0.05)))


@pytest.mark.parametrize(("name", "hyper"), CASES)
def test_one_step_has_torchs_values_and_gradients(name, hyper, double):
    rows = []
    for module in (torch.optim, optim):
        start = begin()
        weights = train(getattr(module, name), start, steps=1, lr=0.05, **hyper)
        rows.append([weights.detach()])
        if name != "SGD" or "momentum" not in hyper:  # torch detaches SGD's first buffer
            rows[-1] += torch.autograd.grad(weights.square().sum(), start)
    torch.testing.assert_close(*rows, rtol=1e-12, atol=1e-14)


def test_through_betas_and_complex_parameters():
    def by_betas(first, second):
        return train(optim.Adam, begin(), lr=0.05, betas=(first, second))

    assert torch.autograd.gradcheck(by_betas, (number(0.8), number(0.9)))
    start = torch.tensor([0.5 + 0.1j, 0.2 - 0.3j, -0.4j], requires_grad=True).to(torch.complex128)
    start = start.detach().requires_grad_()

    def by_start(start):
        return torch.view_as_real(train(optim.Adam, start, lr=0.05))

    assert torch.autograd.gradcheck(by_start, (start,))


def test_groups_with_and_without_it_in_one_optimizer():
    first, plain = begin(), nn.Parameter(torch.ones(2))
    param = first.clone()
    groups = [{"params": [param]}, {"params": [plain], "differentiable": False}]
    optimizer = optim.SGD(groups, lr=0.1, momentum=0.9, differentiable=True)
    param.grad = param.clone() * 2
    plain.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(
        torch.autograd.grad(param.sum(), first)[0], torch.full_like(first, 0.8)
    )
    assert plain.tolist() == pytest.approx([0.9, 0.9])
    assert plain.is_leaf


def test_a_learning_rate_shared_by_groups_gets_its_gradient_from_all():
    lr = number(0.1)
    params = [begin((1.0,)).clone(), begin((2.0,)).clone()]
    optimizer = optim.SGD([{"params": [each]} for each in params], lr=lr, differentiable=True)
    for each in params:
        each.grad = torch.full((1,), 3.0, dtype=torch.float64)
    optimizer.step()
    assert torch.autograd.grad(sum(params).sum(), lr)[0].item() == pytest.approx(-6.0)


def test_a_leaf_is_refused_by_name_and_a_plan_says_where_it_is_possible():
    leaf = nn.Parameter(torch.ones(2))
    optimizer = optim.Adam([("head", leaf)], differentiable=True)
    leaf.grad = torch.ones(2)
    with pytest.raises(PlanError, match=r"cannot update 'head', a leaf.*param\.clone\(\)"):
        optimizer.step()
    for plan in (
        lm.Plan(lm.AdamW, lr=0.1, differentiable=True),
        lm.Plan(torch.optim.Adam, lr=0.1, rules=[lm.Rule("*", differentiable=True)]),
    ):
        with pytest.raises(HyperparameterError, match=r"lamina\.optim\.AdamW\(params, differ"):
            plan.build(nn.Linear(2, 2), steps=3)


# --------------------------------------------------------------- other options that torch takes


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("options", [{}, {"foreach": False}])
@pytest.mark.parametrize(
    "betas",
    [
        (torch.tensor(0.8), torch.tensor(0.99)),
        (torch.tensor([0.8]), torch.tensor([0.99])),
        torch.tensor([0.8, 0.99]),
        (torch.tensor(0.8), 0.99),
    ],
)
def test_betas_may_be_tensors(name, options, betas):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    theirs = getattr(torch.optim, name)([params[0]], betas=(0.8, 0.99))
    ours = getattr(optim, name)([params[1]], betas=betas, **options)
    for step in range(5):
        for param, optimizer in zip(params, (theirs, ours), strict=True):
            param.grad = torch.tensor([0.1, -1.0, 3.0]) * math.cos(step)
            optimizer.step()
        if step == 2:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    torch.testing.assert_close(*params, rtol=2e-6, atol=0)


def test_betas_of_several_numbers_are_refused():
    with pytest.raises(HyperparameterError, match=r"betas\[0\]=tensor"):
        optim.Adam([nn.Parameter(torch.ones(1))], betas=(torch.ones(2) / 2, 0.9))
    with pytest.raises(HyperparameterError, match="expected 2 numbers"):
        optim.Adam([nn.Parameter(torch.ones(1))], betas=torch.ones(3) / 2)


@pytest.mark.parametrize("key", ["tolerance_grad", "tolerance_change"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_tolerances_of_lbfgs_may_be_infinite(key, search):
    rows = []
    for module in (torch.optim, optim):
        param = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = module.LBFGS([param], lr=0.1, line_search_fn=search, **{key: math.inf})

        def closure(optimizer=optimizer, param=param):
            optimizer.zero_grad()
            loss = (param**4).sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        rows.append([losses, param.tolist(), optimizer.state[param]["func_evals"]])
    assert rows[1] == rows[0]
    with pytest.raises(HyperparameterError, match="tolerance_grad=-inf"):
        optim.LBFGS([nn.Parameter(torch.ones(1))], tolerance_grad=-math.inf)

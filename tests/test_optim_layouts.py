"""Memory that changes under the optimizer: layouts, dtypes, sparse gradients that become dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina.kernels import choose
from lamina.optim.updates import _move_to
from reference.runner import assert_close

LAST, FIRST = torch.channels_last, torch.contiguous_format
ROWS = [
    *[("SGD", {}), ("SGD", {"momentum": 0.9}), ("RMSprop", {"momentum": 0.5})],
    *[("Adam", {}), ("AdamW", {"amsgrad": True})],
]


def torchs(name):
    return lambda params, **options: getattr(torch.optim, name)(params, foreach=True, **options)


def convolved(make, change, steps=6):
    """Weights of a convolution whose memory is changed in the middle of the run."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3).double(), torch.randn(2, 3, 6, 6).double()
    before, after = change
    model.to(memory_format=before)
    optimizer = make(model)
    for step in range(steps):
        if step == steps // 2:
            model.to(memory_format=after)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [param.detach().clone(memory_format=FIRST) for param in model.parameters()], optimizer


@pytest.mark.parametrize("change", [(LAST, FIRST), (FIRST, LAST)])
@pytest.mark.parametrize(("name", "options"), ROWS)
def test_a_model_may_change_its_memory_format(name, options, change):
    mine, optimizer = convolved(
        lambda model: getattr(optim, name)(model.parameters(), lr=0.05, **options), change
    )
    theirs, _ = convolved(
        lambda model: torchs(name)(model.parameters(), lr=0.05, **options), change
    )
    assert_close(mine, theirs, 1e-13)
    [batch] = optimizer._collect(optimizer.param_groups)
    assert choose(batch)[0].name != "readable"  # the state followed, so that no speed is lost


def test_a_planned_model_may_change_its_memory_format():
    make = lm.Plan(lm.AdamW, lr=0.05, clip_norm=1.0).build
    moved, _ = convolved(make, (LAST, FIRST))
    stayed, _ = convolved(make, (FIRST, FIRST))
    assert_close(moved, stayed, 1e-13)


@pytest.mark.parametrize("prefer", [{}, {"foreach": False}])
@pytest.mark.parametrize("transposed", [0, 1, 3])
def test_one_gradient_in_another_layout(prefer, transposed):
    params = [nn.Parameter(torch.ones(3, 4).double()) for _ in range(2)]
    mine = optim.SGD(params[:1], lr=0.1, momentum=0.9, **prefer)
    theirs = torch.optim.SGD(params[1:], lr=0.1, momentum=0.9, foreach=False)
    generator = torch.Generator().manual_seed(0)
    for step in range(5):
        grad = torch.randn(3, 4, generator=generator).double()
        params[0].grad = grad.t().contiguous().t() if step == transposed else grad
        params[1].grad = grad.clone()
        mine.step()
        theirs.step()
    assert_close(params[:1], params[1:], 1e-14)


SPARSE = [[1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]]


def rows_of(make, order, dtypes, sparse):
    """Weights after gradients that lie in one row each; some of the last one's are sparse."""
    params = [nn.Parameter(torch.ones(4, 2, dtype=dtype)) for dtype in dtypes]
    optimizer = make(params)
    for step, is_sparse in enumerate(order):
        for param in params:
            param.grad = torch.zeros_like(param)
            param.grad[step % 4] = step + 1.0
        if is_sparse and sparse:
            param.grad = param.grad.to_sparse(1)
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("order", SPARSE)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float64], [torch.float32, torch.float64, torch.float64], [torch.complex128]],
)
def test_sparse_gradients_may_become_dense_and_dense_ones_sparse(order, nesterov, dtypes):
    make = lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=nesterov)  # noqa: E731
    theirs = lambda params: torch.optim.SGD(  # noqa: E731
        params, lr=0.1, momentum=0.9, nesterov=nesterov, foreach=False
    )
    found = rows_of(make, order, dtypes, sparse=True)
    for one, other in zip(found, rows_of(theirs, order, dtypes, sparse=False), strict=True):
        tolerance = 1e-6 if one.dtype is torch.float32 else 1e-14
        pair = [torch.view_as_real(each) if each.is_complex() else each for each in (one, other)]
        assert_close(pair[:1], pair[1:], tolerance)


@pytest.mark.parametrize(("name", "options"), [*ROWS, ("LAMB", {}), ("LARS", {})])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_may_change_its_dtype(name, options, dtype):
    """As with `state_dtype`: the state keeps its dtype, the update is rounded once."""

    def trained(start, end):
        torch.manual_seed(0)
        weights, grads = torch.randn(5, 3), torch.randn(4, 5, 3).bfloat16().float()
        model = nn.ParameterList([weights.to(torch.bfloat16).to(start)])
        optimizer = getattr(optim, name)(
            model.parameters(), lr=0.01, state_dtype=torch.float32, **options
        )
        for step in range(4):
            if step == 2:
                model.to(end)
            model[0].grad = grads[step].to(model[0].dtype)
            optimizer.step()
        return model[0].detach(), optimizer

    moved, optimizer = trained(torch.float32, dtype)
    stayed, _ = trained(torch.float32, torch.float32)
    assert moved.dtype is dtype
    assert_close([moved.float()], [stayed], 2e-2 if dtype is torch.bfloat16 else 2e-6)
    [entry] = optimizer.state.values()
    assert {value.dtype for value in entry.values()} == {torch.float32}
    assert entry["step"] == 4


def test_lbfgs_follows_a_model_to_another_dtype():
    def trained(change):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(9, 3)
        optimizer = optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            inputs = x.to(model.weight.dtype)
            loss = (model(inputs) - inputs[:, :2].sin()).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        model.to(change)
        return float(optimizer.step(closure).detach()), float(closure().detach()), model

    before, after, model = trained(torch.float64)
    stayed, last, _ = trained(torch.float32)
    assert before == pytest.approx(stayed, rel=1e-5)
    assert after == pytest.approx(last, rel=1e-3)
    assert after < before
    assert model.weight.dtype is torch.float64


def test_state_follows_a_model_to_another_device():
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = optim.RMSprop([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    # Here meta stands for an accelerator; a step refuses it, as it has no data.
    entry = optimizer.state[param]
    _move_to(torch.empty(3, 2, device="meta"), entry, optimizer.algorithm)
    assert entry["square_avg"].is_meta
    assert entry["step"] == 1


def test_a_parameter_of_another_size_is_refused_before_anything_changes():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    optimizer = optim.AdamW([("first", params[0]), ("second", params[1])])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = params[0].detach().clone()
    params[1].grad = None
    params[1].data = torch.ones(2, 5)
    params[1].grad = torch.ones(2, 5)
    with pytest.raises(lm.MismatchError, match=r"'second' has shape \(2, 5\).*exp_avg_sq \(2, 2\)"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["step"] == 1

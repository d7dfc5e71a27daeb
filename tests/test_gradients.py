"""Gradient operations per scope, against scalar re-writes, and gradients that are not finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.gradients import operations as ops


def model_with_gradients(seed=0, dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).to(dtype)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def applied_gradients(rules, **settings) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The gradients as they reached the weights (SGD with lr 1), and as they were computed."""
    model = model_with_gradients()
    raw = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = lm.Plan(lm.SGD, lr=1.0, rules=rules, **settings).build(model)
    optimizer.step()
    after = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return {name: before[name] - after[name] for name in raw}, raw


def norm_of(arrays, p=2.0) -> float:
    numbers = [abs(float(x)) for array in arrays for x in np.ravel(array)]
    return max(numbers) if math.isinf(p) else sum(x**p for x in numbers) ** (1 / p)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_each_scope_is_clipped_by_its_own_norm(p):
    got, raw = applied_gradients(
        [lm.Rule("1.*", gradients=ops.clip_norm(0.3, p)), lm.Rule("2.*", gradients=None)],
        gradients=ops.clip_norm(0.7, p),
    )
    for names, limit in ((["0.weight", "0.bias"], 0.7), (["1.weight", "1.bias"], 0.3)):
        norm = norm_of([raw[name] for name in names], p)
        factor = min(1.0, limit / (norm + 1e-6))
        assert factor < 1
        for name in names:
            np.testing.assert_allclose(got[name], raw[name] * factor, rtol=1e-12)
    for name in ("2.weight", "2.bias"):
        np.testing.assert_allclose(got[name], raw[name], rtol=1e-12)


def test_equal_thresholds_of_two_rules_stay_apart():
    got, raw = applied_gradients(
        [lm.Rule("0.*", clip_norm=0.5), lm.Rule("1.* | 2.*", clip_norm=0.5)]
    )
    assert norm_of([got["0.weight"], got["0.bias"]]) == pytest.approx(0.5, rel=1e-5)
    others = [value for name, value in got.items() if not name.startswith("0.")]
    assert norm_of(others) == pytest.approx(0.5, rel=1e-5)
    assert norm_of([v for k, v in raw.items() if k.startswith("0.")]) > 0.5


def test_operations_run_in_the_stated_order():
    chain = [ops.clip_value(0.5), ops.scale_gradients(0.1), ops.clip_norm(0.05)]
    got, raw = applied_gradients([], gradients=chain)
    wanted = {name: np.clip(value, -0.5, 0.5) * 0.1 for name, value in raw.items()}
    factor = min(1.0, 0.05 / (norm_of(wanted.values()) + 1e-6))
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value * factor, rtol=1e-6)
    other, _ = applied_gradients([], gradients=chain[::-1])
    assert not np.allclose(other["0.weight"], got["0.weight"])


def test_each_parameter_by_its_own_norm():
    got, raw = applied_gradients([], gradients=ops.clip_param_norm(0.2))
    for name, value in raw.items():
        factor = min(1.0, 0.2 / (norm_of([value]) + 1e-6))
        np.testing.assert_allclose(got[name], value * factor, rtol=1e-12)


def test_adaptive_clipping_by_unit():
    model = model_with_gradients()
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    got, raw = applied_gradients([], gradients=ops.agc(0.05, eps=1e-3))
    for name, grad in raw.items():
        rows = range(len(grad)) if grad.ndim > 1 else [slice(None)]
        for row in rows:
            limit = 0.05 * max(norm_of([weights[name][row]]), 1e-3)
            factor = min(1.0, limit / norm_of([grad[row]]))
            np.testing.assert_allclose(got[name][row], grad[row] * factor, rtol=1e-9)


def test_a_function_of_ones_own_sees_what_it_changes():
    seen = []

    def signs(grads, infos):
        seen.extend(info.name for info in infos)
        return [grad.sign() for grad in grads]

    got, raw = applied_gradients([lm.Rule("1.*", gradients=signs)])
    assert seen == ["1.weight", "1.bias"]
    np.testing.assert_array_equal(got["1.weight"], np.sign(raw["1.weight"]))
    np.testing.assert_allclose(got["0.weight"], raw["0.weight"], rtol=1e-12)


def test_a_threshold_can_be_a_schedule():
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = lm.Plan(lm.SGD, lr=1.0, clip_norm=lm.linear(1.0, 0.5)).build(model, steps=10)
    for step in range(10):
        before = float(model.weight.detach())
        model.weight.grad = torch.tensor([[100.0]], dtype=torch.float64)
        optimizer.step()
        assert before - float(model.weight.detach()) == pytest.approx(1 - 0.05 * step, rel=1e-6)


def test_the_norm_of_each_scope_can_be_read():
    model = model_with_gradients()
    raw = [p.grad.numpy().copy() for p in model.parameters()]
    optimizer = lm.Plan(lm.SGD, lr=1.0, clip_norm=0.1).build(model)
    optimizer.step()
    assert float(optimizer.norms["plan"]) == pytest.approx(norm_of(raw), rel=1e-9)


def test_clipping_leaves_the_gradients_themselves_alone():
    model = model_with_gradients()
    raw = [p.grad.clone() for p in model.parameters()]
    lm.Plan(lm.SGD, lr=1.0, clip_norm=0.1).build(model).step()
    for param, grad in zip(model.parameters(), raw, strict=True):
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operation", [ops.clip_norm(1.0), ops.clip_param_norm(1.0), ops.agc(0.1)])
def test_a_nonfinite_gradient_is_named_and_reaches_no_weight(operation, bad):
    model = model_with_gradients()
    model[1].weight.grad[0, 0] = bad
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lm.Plan(lm.AdamW, lr=1.0, gradients=operation).build(model)
    with pytest.raises(lm.NonFiniteError, match=r"gradient of '1\.weight' .* at step 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert optimizer.clock == 0
    assert all(float(entry["step"]) == 0 for entry in optimizer.state.values())


def test_a_bad_step_can_be_skipped_and_counted():
    model = model_with_gradients()
    optimizer = lm.Plan(lm.SGD, lr=1.0, clip_norm=1.0, nonfinite="skip").build(model)
    before = [p.detach().clone() for p in model.parameters()]
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert (optimizer.skipped, optimizer.clock) == (1, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    model[0].bias.grad[0] = 0.0
    optimizer.step()
    assert (optimizer.skipped, optimizer.clock) == (1, 1)


def test_without_a_norm_gradients_are_looked_at_unless_that_is_declined():
    for check, raises in (("norms", False), ("all", True)):
        model = model_with_gradients()
        model[2].bias.grad[0] = math.nan
        plan = lm.Plan(lm.SGD, lr=1.0, nonfinite_check=check)
        if raises:
            optimizer = plan.build(model)
        else:
            with pytest.warns(lm.LaminaWarning, match="gradients-unchecked"):
                optimizer = plan.build(model)
        if raises:
            with pytest.raises(lm.NonFiniteError, match=r"2\.bias"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.clock == 1


def test_the_stale_gradient_of_a_frozen_tensor_is_in_no_norm():
    model = model_with_gradients()
    raw = [p.grad.numpy().copy() for name, p in model.named_parameters() if name[0] != "0"]
    optimizer = lm.Plan(lm.SGD, lr=1.0, clip_norm=0.1, rules=[lm.Rule("0.*", frozen=True)]).build(
        model
    )
    model[0].weight.grad = torch.full_like(model[0].weight, 1e6)
    optimizer.step()
    assert float(optimizer.norms["plan"]) == pytest.approx(norm_of(raw), rel=1e-9)
    assert model[0].weight.grad is None


def test_sparse_gradients_are_clipped_by_their_values():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = lm.Plan(lm.SGD, lr=1.0, clip_norm=0.5).build(embedding)
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 1, 3])).sum().backward()
    grad = embedding.weight.grad.to_dense().clone()
    optimizer.step()
    factor = min(1.0, 0.5 / (float(grad.norm()) + 1e-6))
    torch.testing.assert_close(before - embedding.weight.detach(), grad * factor)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.Rule("*", clip_norm=-1.0), "at least 0"),
        (lambda: lm.Rule("*", clip_norm=0), "clip every gradient away"),
        (lambda: lm.Rule("*", clip_norm=lm.cosine()), "is a factor"),
        (lambda: lm.Rule("*", gradients=3), "expected gradient operations"),
        (lambda: lm.Rule("*", gradients=ops.agc(), clip_norm=1.0), "one setting"),
        (lambda: ops.clip_norm(math.nan), "finite number above 0"),
        (lambda: ops.clip_norm(1.0, p=0), "p=0"),
        (lambda: ops.clip_value(-1.0), "finite number above 0"),
        (lambda: ops.scale_gradients(-1.0), "at least 0"),
        (lambda: lm.Plan(lm.SGD, nonfinite="ignore"), "'raise' or 'skip'"),
        (lambda: lm.Plan(lm.SGD, nonfinite_check="some"), "'norms' or 'all'"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(lm.PlanError, match=message):
        make()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda grads, infos: grads[:-1], "returned 5; expected one for each"),
        (lambda grads, infos: [grad.sum() for grad in grads], "expected a tensor of shape"),
        (lambda grads, infos: [0.0 for _ in grads], "returned float for"),
    ],
)
def test_a_function_that_returns_something_else_is_named(function, message):
    model = model_with_gradients()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = lm.Plan(lm.SGD, lr=1.0, gradients=function).build(model)
    with pytest.raises(lm.PlanError, match=message):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_operations_go_to_toml_and_back():
    plan = lm.Plan(
        lm.SGD,
        lr=0.1,
        gradients=[ops.clip_value(0.5), ops.clip_norm(1.0, p=math.inf)],
        rules=[lm.Rule("0.*", gradients=None), lm.Rule("1.*", gradients=ops.agc(0.02))],
    )
    assert lm.Plan.from_toml(plan.to_toml()) == plan

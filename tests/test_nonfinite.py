"""A NaN or infinite gradient never reaches a weight, whatever the optimizer, policy and dtype."""

import math
import warnings

import pytest
import torch
from torch import nn

import lamina as lm

OPTIMIZERS = ["SGD", "RMSprop", "Adam", "AdamW", "LAMB", "LARS", "LayerAdaptiveAdam", "Muon"]
BAD = [math.nan, math.inf, -math.inf]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).to(dtype)


def give_gradients(model, bad=None):
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.5)
    if bad is not None:
        model[1].weight.grad[1, 2] = bad


def snapshot(model, optimizer):
    state = [
        value.clone()
        for param in model.parameters()
        for value in optimizer.state[param].values()
        if isinstance(value, torch.Tensor)
    ]
    return [param.detach().clone() for param in model.parameters()] + state


def alike(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


@pytest.mark.filterwarnings("ignore:updates-round-away")  # LARS takes a thousandth of lr
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [{}, {"clip_norm": 1.0}, {"gradients": lm.scale_gradients(0.5)}])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_bad_gradient_reaches_a_weight(name, clip, dtype):
    for bad in BAD:
        for policy in ("raise", "skip"):
            model = network(dtype)
            optimizer = lm.Plan(name, lr=0.5, nonfinite=policy, **clip).build(model)
            give_gradients(model)
            optimizer.step()
            before = snapshot(model, optimizer)
            give_gradients(model, bad)
            if policy == "raise":
                with pytest.raises(lm.NonFiniteError, match=r"'1\.weight'"):
                    optimizer.step()
            else:
                optimizer.step()
            assert alike(before, snapshot(model, optimizer))
            assert (optimizer.clock, optimizer.skipped) == (1, int(policy == "skip"))
            give_gradients(model)
            optimizer.step()
            assert optimizer.clock == 2
            assert all(torch.isfinite(param).all() for param in model.parameters())


def test_a_function_may_repair_gradients_before_they_are_looked_at():
    def repair(grads, infos):
        return [torch.nan_to_num(grad) for grad in grads]

    for more in ([], [lm.clip_norm(1.0)]):
        model = network()
        optimizer = lm.Plan("SGD", lr=0.1, gradients=[repair, *more]).build(model)
        give_gradients(model, math.nan)
        optimizer.step()
        assert optimizer.clock == 1
        assert all(torch.isfinite(param).all() for param in model.parameters())


@pytest.mark.parametrize("bad", BAD)
def test_a_limit_on_values_makes_infinite_gradients_finite_but_not_nan(bad):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1, gradients=lm.clip_value(1.0)).build(model)
    give_gradients(model, bad)
    before = model[1].weight[1, 2].item()
    if math.isnan(bad):
        with pytest.raises(lm.NonFiniteError, match=r"'1\.weight'"):
            optimizer.step()
    else:
        optimizer.step()
        moved = before - 0.1 * math.copysign(1.0, bad)
        assert model[1].weight[1, 2].item() == pytest.approx(moved, rel=1e-6)


def test_finite_gradients_whose_norm_overflows_are_taken():
    model = network()
    optimizer = lm.Plan("SGD", lr=1e-30).build(model)
    give_gradients(model)
    model[0].weight.grad.fill_(1e30)
    optimizer.step()
    assert optimizer.clock == 1


def test_a_guest_is_kept_from_bad_gradients_too():
    model = network()
    optimizer = lm.Plan(torch.optim.Adagrad, lr=0.1).build(model)
    give_gradients(model, math.nan)
    before = snapshot(model, optimizer)
    with pytest.raises(lm.NonFiniteError, match=r"'1\.weight'"):
        optimizer.step()
    assert alike(before[:2], snapshot(model, optimizer)[:2])


def test_frozen_parts_are_not_looked_at():
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("1", frozen=True)]).build(model)
    give_gradients(model, math.nan)
    optimizer.step()
    assert optimizer.clock == 1


def test_the_check_can_be_declined_and_then_a_finding_says_so():
    plan = lm.Plan("SGD", lr=0.1, nonfinite_check="norms")
    assert "gradients-unchecked" in [f.code for f in plan.preview(network(), steps=3).findings]
    assert not lm.Plan("SGD", lr=0.1).preview(network(), steps=3).findings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = plan.build(model := network())
    give_gradients(model, math.nan)
    optimizer.step()
    assert math.isnan(model[1].weight[1, 2].item())

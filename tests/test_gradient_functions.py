"""Clipping by hand: torch's results where torch is right, per pattern, and never NaN."""

import math

import pytest
import torch
from torch import nn

from lamina.errors import (
    HyperparameterError,
    LaminaWarning,
    NonFiniteError,
    PatternError,
    PlanError,
)
from lamina.gradients.clip import clip_grad_norm_, clip_grad_value_
from lamina.model.freeze import freeze
from models import Tied, backward, encoder, mlp
from processes import end_group


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def pair(dtype=torch.float64):
    """Two equal models with equal gradients, large enough to clip."""
    models = []
    for _ in range(2):
        model = encoder(dtype=dtype)
        backward(model)
        for param in model.parameters():
            param.grad.mul_(100)
        models.append(model)
    return models


FORMS = {
    "module": lambda model: model,
    "generator": lambda model: model.parameters(),
    "list": lambda model: list(model.parameters()),
    "named": lambda model: model.named_parameters(),
    "group": lambda model: {"params": list(model.parameters()), "lr": 1.0},
}


# ------------------------------------------------------------------------------ as torch's results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf, "inf"])
@pytest.mark.parametrize("limit", [0.0, 0.3, 1e6, math.inf])
def test_norm_clipping_equals_torch(form, p, limit):
    ours, theirs = pair()
    norm = clip_grad_norm_(FORMS[form](ours), limit, p)
    expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit, p)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(grads(ours), grads(theirs))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_norm_clipping_equals_torch_bit_for_bit_in_float32(foreach):
    ours, theirs = pair(torch.float32)
    norm = clip_grad_norm_(ours.parameters(), 0.7, foreach=foreach)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.7))
    assert all(torch.equal(g, grads(theirs)[n]) for n, g in grads(ours).items())


@pytest.mark.parametrize("form", FORMS)
def test_value_clipping_equals_torch(form):
    ours, theirs = pair()
    assert clip_grad_value_(FORMS[form](ours), 0.2) is None
    torch.nn.utils.clip_grad_value_(theirs.parameters(), 0.2)
    torch.testing.assert_close(grads(ours), grads(theirs), rtol=0, atol=0)
    assert max(float(g.abs().max()) for g in grads(ours).values()) == 0.2


def test_a_bare_tensor_with_a_gradient_set_by_hand():
    x = torch.zeros(2)
    x.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm_(x, 1.0) == 5.0
    torch.testing.assert_close(x.grad, torch.tensor([0.6, 0.8]))
    clip_grad_value_(x, 0.7)
    torch.testing.assert_close(x.grad, torch.tensor([0.6, 0.7]))


def test_gradients_are_changed_in_place():
    model = mlp()
    backward(model)
    kept = model.body.weight.grad
    clip_grad_norm_(model, 1e-3)
    clip_grad_value_(model, 1e-4)
    assert model.body.weight.grad is kept
    assert float(kept.abs().max()) <= 1e-4


def test_no_gradients_have_norm_zero():
    assert clip_grad_norm_(mlp(), 1.0) == 0.0
    assert clip_grad_norm_([], 1.0) == 0.0
    assert clip_grad_norm_(torch.zeros(2), 1.0) == 0.0


def test_a_generator_that_was_used_up_is_told():
    parameters = mlp().parameters()
    list(parameters)
    with pytest.warns(LaminaWarning, match="generator of parameters is empty") as told:
        clip_grad_norm_(parameters, 1.0)
    assert told[0].filename == __file__


def test_low_precision_has_an_exact_norm():
    x = torch.zeros(1000, dtype=torch.bfloat16)
    x.grad = torch.ones(1000, dtype=torch.bfloat16)
    other = torch.zeros(1, dtype=torch.float32)
    other.grad = torch.full((1,), 7.0)
    norm = clip_grad_norm_([x, other], 1.0)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(math.sqrt(1049), rel=4e-3)
    assert x.grad.dtype == torch.bfloat16


# --------------------------------------------------------------------------- where torch goes wrong


def test_a_tensor_given_twice_counts_once():
    model = Tied().double()
    backward(model)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    twice = [*model.parameters(), model.decoder.weight]
    norm = clip_grad_norm_(twice, expected / 2)
    assert float(norm) == pytest.approx(expected)
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert after == pytest.approx(expected / 2, rel=1e-5)


def test_the_stale_gradient_of_a_frozen_part_does_not_count():
    model = mlp()
    backward(model)
    freeze(model, "body")
    model.body.weight.grad = torch.full_like(model.body.weight, 1e3)
    expected = math.sqrt(sum(float(p.grad.square().sum()) for p in model.head.parameters()))
    assert float(clip_grad_norm_(model, 1e6)) == pytest.approx(expected)
    assert float(clip_grad_norm_(model, {"*": 1e6})["*"]) == pytest.approx(expected)
    clip_grad_value_(model, 1.0)
    assert float(model.body.weight.grad.max()) == 1e3


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_clipping_a_nonfinite_gradient_names_it_and_changes_none(bad):
    model = encoder()
    backward(model)
    model.encoder.layer["1"].dense.bias.grad[1] = bad
    before = grads(model)
    with pytest.warns(LaminaWarning, match=r"of 'encoder.layer.1.dense.bias' is NaN or") as told:
        norm = clip_grad_norm_(model, 1.0)
    assert told[0].filename == __file__
    assert not math.isfinite(float(norm))
    with pytest.raises(NonFiniteError, match=r"'encoder\.layer\.1\.dense\.bias'.*no gradient was"):
        clip_grad_norm_(model, 1.0, error_if_nonfinite=True)
    with pytest.warns(LaminaWarning, match=r"of parameter 6 of shape \(3,\) is NaN"):
        clip_grad_norm_(model.parameters(), 1.0)
    torch.testing.assert_close(grads(model), before, equal_nan=True)


def test_an_overflowing_norm_names_the_largest():
    model = mlp(dtype=torch.float32)
    backward(model)
    model.head.bias.grad.fill_(3e38)
    with pytest.warns(LaminaWarning, match=r"overflows, the largest is that of 'head.bias'"):
        clip_grad_norm_(model, 1.0)
    assert float(model.head.bias.grad[0]) == pytest.approx(3e38)


# ----------------------------------------------------------------------------------- by pattern


def test_each_pattern_has_its_own_norm_and_limit():
    ours, theirs = pair()
    norms = clip_grad_norm_(ours, {"encoder.layer.*": 1.0, "*.1.*": 2.0, "classifier": 0.5})
    named = dict(theirs.named_parameters())
    first = [p for n, p in named.items() if n.startswith("encoder.layer") and ".1." not in n]
    parts = [
        ("encoder.layer.*", first, 1.0),
        ("*.1.*", [p for n, p in named.items() if ".1." in n], 2.0),
        ("classifier", list(theirs.classifier.parameters()), 0.5),
    ]
    for key, params, limit in parts:
        expected = torch.nn.utils.clip_grad_norm_(params, limit)
        torch.testing.assert_close(norms[key], expected)
    assert list(norms) == [key for key, _, _ in parts]
    torch.testing.assert_close(grads(ours), grads(theirs))


def test_values_by_pattern():
    model, _ = pair()
    before = grads(model)
    clip_grad_value_(model, {"classifier": 0.1, "classifier.bias": 0.01})
    after = grads(model)
    assert float(after["classifier.weight"].abs().max()) == 0.1
    assert float(after["classifier.bias"].abs().max()) == 0.01
    assert torch.equal(after["embeddings.weight"], before["embeddings.weight"])


def test_a_bad_pattern_leaves_the_others_finite():
    model, _ = pair()
    model.embeddings.weight.grad[0, 0] = math.inf
    with pytest.warns(LaminaWarning, match=r"embeddings\.weight"):
        norms = clip_grad_norm_(model, {"embeddings": 1.0, "classifier": 1.0})
    assert math.isinf(norms["embeddings"])
    left = torch.stack([p.grad.norm() for p in model.classifier.parameters()]).norm()
    assert float(left) == pytest.approx(1.0, rel=1e-5)
    before = grads(model)
    with pytest.raises(NonFiniteError):
        clip_grad_norm_(model, {"classifier": 0.1, "embeddings": 1.0}, error_if_nonfinite=True)
    assert torch.equal(grads(model)["classifier.bias"], before["classifier.bias"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: clip_grad_norm_(m, -1.0), HyperparameterError, "max_norm=-1.0.*at least 0"),
        (lambda m: clip_grad_norm_(m, math.nan), HyperparameterError, "max_norm=nan"),
        (lambda m: clip_grad_value_(m, -1), HyperparameterError, "clip_value=-1"),
        (lambda m: clip_grad_norm_(m, {"head": -1}), HyperparameterError, "max_norm=-1"),
        (lambda m: clip_grad_norm_(m, 1.0, 0), HyperparameterError, "norm_type=0.*above 0"),
        (lambda m: clip_grad_norm_(m, {"haed": 1}), PatternError, "'haed' matches none of the 4"),
        (lambda m: clip_grad_norm_(m.parameters(), {"head": 1}), PlanError, "pass the module"),
        (lambda m: clip_grad_norm_([1.0], 1.0), PlanError, r"parameters\[0\] is 1.0 \(float\)"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(call, error, message):
    model = mlp()
    backward(model)
    before = grads(model)
    with pytest.raises(error, match=message):
        call(model)
    assert all(torch.equal(g, before[n]) for n, g in grads(model).items())


# ---------------------------------------------------------------------------- other kinds of tensor


def sparse_model():
    model = nn.Embedding(5, 2, sparse=True)
    model(torch.tensor([1, 1, 3])).sum().backward()
    return model


def test_sparse_gradients_add_up_before_they_are_clipped():
    model = sparse_model()
    assert not model.weight.grad.is_coalesced()
    norm = clip_grad_norm_(model, 1.0)
    assert float(norm) == pytest.approx(math.sqrt(2 * 4 + 2 * 1))
    assert float(model.weight.grad.to_dense().norm()) == pytest.approx(1.0, rel=1e-5)
    model = sparse_model()
    clip_grad_value_(model, 1.5)
    assert model.weight.grad.is_sparse
    assert model.weight.grad.to_dense()[[1, 3]].tolist() == [[1.5, 1.5], [1.0, 1.0]]


def test_complex_gradients():
    x = torch.zeros(2, dtype=torch.complex64)
    x.grad = torch.tensor([3 + 4j, 0])
    assert clip_grad_norm_(x, 1.0) == 5.0
    torch.testing.assert_close(x.grad[0], torch.tensor(0.6 + 0.8j))
    clip_grad_value_(x, 0.7)
    torch.testing.assert_close(x.grad[0], torch.tensor(0.6 + 0.7j))


def test_sharded_gradients_from_two_meshes(tmp_path):
    from torch.distributed import init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        tensors = []
        for shape in ((1,), (1, 1)):
            mesh = init_device_mesh("cpu", shape)
            place = [Shard(0)] * len(shape)
            x = distribute_tensor(torch.zeros(2), mesh, place).requires_grad_()
            x.grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, place)
            tensors.append(x)
        plain = torch.zeros(2, requires_grad=True)
        plain.grad = torch.tensor([3.0, 4.0])
        norm = clip_grad_norm_([*tensors, plain], 1.0)
        assert float(norm) == pytest.approx(math.sqrt(75))
        for x in (*tensors, plain):
            whole = x.grad.full_tensor() if x is not plain else x.grad
            torch.testing.assert_close(whole, torch.tensor([3.0, 4.0]) / math.sqrt(75))
        clip_grad_value_([*tensors, plain], 0.4)
        assert float(tensors[1].grad.full_tensor().max()) == pytest.approx(0.4)
    finally:
        end_group()

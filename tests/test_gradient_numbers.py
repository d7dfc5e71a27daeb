"""Norms and factors where numbers are small, large, narrow, mixed, complex, empty or made up."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.algorithms.base import times
from lamina.gradients.clip import clip_grad_norm_, clip_grad_value_
from lamina.gradients.norms import each_norm, finite, total_norm

HALVES = [torch.float16, torch.bfloat16]


def parameters(*grads: torch.Tensor) -> nn.ParameterList:
    model = nn.ParameterList([nn.Parameter(torch.zeros_like(grad)) for grad in grads])
    for param, grad in zip(model, grads, strict=True):
        param.grad = grad
    return model


def moved(grads, gradients, **settings) -> tuple[list[torch.Tensor], lm.Optimizer]:
    """What SGD with lr 1 takes from weights of 0: the gradients as the operations left them."""
    model = parameters(*grads)
    optimizer = lm.Plan(lm.SGD, lr=1.0, gradients=gradients, **settings).build(model)
    optimizer.step()
    return [-param.detach() for param in model], optimizer


def exact(grad: torch.Tensor, limit: float, p: float = 2.0) -> torch.Tensor:
    """The clipped gradient in float64, then rounded once."""
    wide = grad.double()
    norm = torch.linalg.vector_norm(wide, p)
    return (wide * min(1.0, limit / (float(norm) + 1e-6))).to(grad.dtype)


# ----------------------------------------------------------------------------------- narrow floats


@pytest.mark.parametrize("operation", [lm.clip_param_norm(1.0), lm.agc(0.1), lm.clip_norm(1.0)])
def test_many_finite_float16_gradients_take_the_step(operation):
    grads = [torch.full((8, 8), 300.0, dtype=torch.float16) for _ in range(30)]  # norms sum to 72e3
    _, optimizer = moved(grads, operation, nonfinite="skip")
    assert (optimizer.skipped, optimizer.clock) == (0, 1)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e9])
@pytest.mark.parametrize("kind", [lm.clip_norm, lm.clip_param_norm])
@pytest.mark.parametrize("more", [[], [lm.clip_value(1e9)]])
def test_16_bit_gradients_are_clipped_to_the_last_digit(dtype, p, limit, kind, more):
    grad = (torch.arange(1.0, 1001.0) * 60).to(dtype)
    (got,), _ = moved([grad], [kind(limit, p), *more])
    wanted = exact(grad, limit, p).double()
    step = torch.finfo(dtype).eps  # a unit in the last place, relative; and the least number
    allowed = (step * wanted.abs()).clamp(min=torch.finfo(dtype).smallest_normal * step)
    assert bool(((got.double() - wanted).abs() <= allowed).all())


def test_a_factor_too_small_for_float16_is_not_lost():
    grad = torch.full((3,), 300.0, dtype=torch.float16)
    wanted = torch.full((3,), 3e-5, dtype=torch.float16)
    assert torch.equal(times(grad, torch.tensor(1e-7)), wanted)
    for more in ([], [lm.clip_value(1.0)]):
        (got,), _ = moved([grad.clone()], [lm.scale_gradients(1e-7), *more])
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", HALVES)
def test_clipping_16_bit_gradients_by_hand(dtype):
    x = torch.zeros(10_000, dtype=dtype)
    x.grad = torch.full_like(x, 1000.0)
    kept = x.grad
    norm = clip_grad_norm_(x, 1e-3)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(1e5, rel=1e-5)
    assert x.grad is kept
    assert torch.equal(kept, torch.full_like(kept, 1e-5))


def test_a_16_bit_norm_has_the_digits_of_float32():
    grad = torch.ones(1049, dtype=torch.bfloat16)
    assert float(total_norm([grad, torch.ones(1)])) == pytest.approx(math.sqrt(1050), rel=1e-6)


@pytest.mark.filterwarnings("ignore:gradients-unchecked")  # so that infinity comes through
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1e5, 1e50, 1e300])
def test_a_limit_beyond_the_dtype_changes_nothing(dtype, limit):
    grad = torch.tensor([60000.0, -math.inf, 3.0], dtype=dtype)
    wanted = grad.clone() if limit > torch.finfo(dtype).max else grad.clamp(-limit, limit)
    x = torch.zeros_like(grad)
    x.grad = grad.clone()
    clip_grad_value_(x, limit)
    assert torch.equal(x.grad, wanted)
    (got,), _ = moved([grad], lm.clip_value(limit), nonfinite_check="norms")
    assert torch.equal(got, wanted)


# ------------------------------------------------------------------------------------ mixed, large


@pytest.mark.parametrize("order", [1, -1])
def test_a_norm_of_several_dtypes_is_that_of_the_widest(order):
    def grads():
        return [torch.ones(1), torch.full((1,), 1e60, dtype=torch.float64)][::order]

    mine, theirs = parameters(*grads()), parameters(*grads())
    norm = clip_grad_norm_(mine, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert (norm.dtype, float(norm)) == (torch.float64, 1e60)
    assert float(expected) == 1e60
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))
    got, optimizer = moved(grads(), lm.clip_norm(1.0))
    assert float(optimizer.norms["plan"]) == 1e60
    assert [float(value) for value in got][::order] == [0.0, 1.0]


def test_a_factor_keeps_the_digits_of_the_widest_gradient():
    for grads in ([torch.ones(1), torch.ones(1).double()], [torch.ones(1, dtype=torch.complex128)]):
        got, _ = moved(grads, [lm.scale_gradients(0.1)])
        assert got[-1].item() == 0.1


def test_finite_norms_are_not_added_up():
    large = [torch.tensor(3e38), torch.tensor(3e38)]
    assert finite(large)
    assert finite(large[:1])
    for bad in (math.nan, math.inf):
        assert not finite([*large, torch.tensor(bad)])
        assert not finite([torch.tensor(bad)])
    grads = [torch.full((2,), 3e38), torch.full((2,), -3e38)]
    got, _ = moved(grads, lm.clip_param_norm(1.0, math.inf))
    assert [float(value[0]) for value in got] == pytest.approx([1.0, -1.0])


def test_a_norm_that_overflows_is_not_called_a_bad_gradient():
    grads = [torch.full((2,), 1e22), torch.full((2,), 3e38)]
    with pytest.raises(lm.NonFiniteError, match=r"every gradient is finite.*overflows.* '1'"):
        moved(grads, lm.clip_norm(1.0))
    grads[1].fill_(1e30)
    grow = [lambda grads, infos: [grads[0] * 3e16, *grads[1:]], lm.clip_norm(1.0)]
    with pytest.raises(lm.NonFiniteError, match=r"every gradient is finite.*overflows.* '0'"):
        moved(grads, grow)


# ------------------------------------------------------------------------- empty, complex, lazy


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_what_has_no_numbers_has_norm_zero(p):
    sparse = torch.zeros(4, 2).to_sparse(1)
    for empty in (torch.empty(0), torch.empty(0, 3, dtype=torch.complex64), sparse):
        assert [float(norm) for norm in each_norm([empty, torch.tensor([-3.0])], p)] == [0, 3]
        for gradients in (lm.clip_norm(1.0, p), lm.clip_param_norm(1.0, p)):
            got, _ = moved([torch.tensor([-3.0])], gradients)
            assert float(got[0]) == pytest.approx(-1.0)
        model = parameters(empty)
        lm.Plan(lm.SGD, lr=1.0, gradients=lm.clip_norm(1.0, p)).build(model).step()
        assert float(clip_grad_norm_(model, 1.0, p)) == 0.0


LAZY = {
    "conjugate": lambda: torch.tensor([3 + 4j, -1 + 0j]).conj(),
    "negative": lambda: torch.complex(torch.zeros(2), torch.tensor([3.0, -4.0])).conj().imag,
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_gradients_that_are_views_not_computed_yet(lazy, p):
    def plain():
        return LAZY[lazy]().resolve_conj().resolve_neg().clone()

    assert LAZY[lazy]().is_conj() or LAZY[lazy]().is_neg()
    by_hand = (lambda x: clip_grad_norm_(x, 1.0, p), lambda x: clip_grad_value_(x, 2.0))
    for clip in by_hand:
        x, y = torch.zeros_like(plain()), torch.zeros_like(plain())
        x.grad, y.grad = LAZY[lazy](), plain()
        kept = x.grad
        assert clip(x) == clip(y)
        assert x.grad is kept
        assert torch.equal(x.grad, y.grad)
        assert not torch.equal(x.grad, plain())
    for gradients in (lm.clip_norm(1.0, p), lm.clip_value(2.0), lm.clip_param_norm(1.0, p)):
        (one,), _ = moved([LAZY[lazy]()], gradients)
        (other,), _ = moved([plain()], gradients)
        assert torch.equal(one, other)


def test_the_gradient_of_a_conjugate_is_clipped():
    x = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    (x.conj() * torch.tensor([1 + 1j, 2j])).real.sum().backward()
    clip_grad_value_(x, 0.5)
    assert torch.equal(x.grad, torch.tensor([0.5 + 0.5j, 0.5j]))


def test_both_parts_of_sparse_complex_numbers_are_clipped():
    sparse = torch.tensor([3 + 4j, 0, 1j]).to_sparse()
    (got,), _ = moved([sparse], lm.clip_value(2.0))
    assert torch.equal(got.to_dense(), torch.tensor([2 + 2j, 0, 1j]))


# -------------------------------------------------------------------------- functions, arguments


def spoil(index):
    """A function that makes one gradient NaN, as a new tensor."""
    return lambda grads, infos: [g * math.nan if i == index else g for i, g in enumerate(grads)]


@pytest.mark.parametrize("more", [[], [lm.clip_value(1.0)], [lm.clip_param_norm(0.1)]])
def test_a_function_that_makes_a_nan_is_named_with_the_right_parameter(more):
    grads = [torch.ones(2) for _ in range(3)]
    chain = [lambda grads, infos: grads, spoil(1), lm.clip_norm(1.0), *more]
    with pytest.raises(lm.NonFiniteError, match=r"spoil.*returned NaN .* for '1' at step 0, whose"):
        moved(grads, chain)


def test_what_a_function_returns_is_looked_at_without_any_norm():
    model = nn.Linear(2, 1)
    before = copy.deepcopy(model.state_dict())
    plan = lm.Plan("SGD", lr=0.1, gradients=[spoil(1), lm.scale_gradients(2.0)])
    optimizer = plan.build(model)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(lm.NonFiniteError, match=r"spoil.*returned NaN .* for 'bias' at step 0"):
        optimizer.step()
    assert optimizer.clock == 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("algorithm", ["SGD", torch.optim.SGD])
def test_a_small_factor_of_16_bit_gradients_reaches_guests_in_full(algorithm):
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    model = nn.ParameterList([weight])
    plan = lm.Plan(algorithm, lr=1.0, gradients=[lm.clip_norm(1e-3)])
    optimizer = plan.build(model)
    weight.grad = torch.full_like(weight, 400.0)
    optimizer.step()
    assert torch.allclose(weight.detach().float(), torch.full((4,), -5e-4), rtol=1e-3)


def test_a_function_may_have_spoiled_a_gradient_in_place():
    def in_place(grads, infos):
        grads[2].fill_(math.inf)
        return grads

    with pytest.raises(lm.NonFiniteError, match=r"'2' that apply\(.*in_place\) returned is NaN or"):
        moved([torch.ones(2) for _ in range(3)], [in_place, lm.clip_norm(1.0)])
    bad = [torch.ones(2), torch.tensor([1.0, math.nan])]
    with pytest.raises(lm.NonFiniteError, match=r"gradient of '1' is NaN"):
        moved(bad, [lambda grads, infos: [2 * g for g in grads], lm.clip_norm(1.0)])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda grads, infos: None, r"returned nothing \(None\); expected the list"),
        (lambda grads, infos: grads[0], "returned a Parameter|returned a Tensor"),
        (lambda grads, infos: {"0": grads[0]}, "returned a dict"),
        (lambda grads, infos: 3, "returned a int"),
        (lambda grads, infos: [g.long() for g in grads], "whole numbers for '0'; expected"),
        (lambda grads, infos: [g + 1j for g in grads], "complex numbers for '0'.*real numbers"),
        (lambda grads, infos: [g.to("meta") for g in grads], "a tensor on meta for '0'"),
    ],
)
def test_a_function_that_returns_no_gradients_is_named(function, message):
    for more in ([], [lm.clip_norm(1.0)]):
        with pytest.raises(lm.PlanError, match=message):
            moved([torch.ones(2)], [function, *more])


def test_a_function_may_return_any_iterable_of_gradients():
    (got,), _ = moved([torch.ones(2)], lambda grads, infos: (2 * g for g in grads))
    assert torch.equal(got, torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lm.clip_norm(1, p="inf"), r"p='inf'; expected a number above 0, or float\('inf'"),
        (lambda: lm.clip_norm(1, p=None), "p=None"),
        (lambda: lm.clip_norm(1, p=True), "p=True"),
        (lambda: lm.clip_norm(1, p=math.nan), "p=nan"),
        (lambda: lm.clip_param_norm(1, p="2"), "clip_param_norm was given p='2'"),
        (lambda: lm.agc(0.1, eps="x"), "agc was given eps='x'"),
        (lambda: lm.agc(0.1, eps=-1), "agc was given eps=-1"),
        (lambda: lm.agc(0.1, eps=math.inf), "agc was given eps=inf"),
        (lambda: clip_grad_norm_(nn.Linear(1, 1), None), "max_norm=None"),
        (lambda: clip_grad_norm_(nn.Linear(1, 1), {"*": None}), "max_norm=None"),
        (lambda: clip_grad_norm_(nn.Linear(1, 1), 1.0, "x"), "norm_type='x'"),
        (lambda: clip_grad_norm_(nn.Linear(1, 1), 1.0, None), "norm_type=None"),
        (lambda: clip_grad_norm_(None, 1.0), "parameters=None: expected a tensor, tensors"),
        (lambda: clip_grad_value_(nn.Linear(1, 1), "x"), "clip_value='x'"),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(make, message):
    with pytest.raises(lm.PlanError, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    assert lm.clip_norm(np.float32(0.5), p=np.int64(3)) == lm.clip_norm(0.5, 3)
    assert repr(lm.clip_norm(np.float32(0.5), p=np.float64(3))) == "clip_norm(0.5, 3.0)"
    assert repr(lm.agc(np.float64(0.5), eps=np.float32(0.25))) == "agc(0.5, 0.25)"
    plan = lm.Plan(lm.SGD, lr=1.0, gradients=[lm.clip_value(np.float32(0.5))])
    assert lm.Plan.from_toml(plan.to_toml()) == plan

"""What every algorithm promises, driven by one table: the paper's numbers, and torch's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lamina.algorithms import ALGORITHMS, METHODS
from lamina.algorithms.adam import Adam
from lamina.algorithms.base import check_number
from lamina.errors import HyperparameterError
from lamina.kernels.native import kernel as native_kernel
from reference.runner import (
    DTYPES,
    assert_close,
    hypers,
    run_lamina,
    run_scalar,
    run_torch,
    start,
)
from reference.table import IN_PAPER, IN_TORCH, ROWS

rows = pytest.mark.parametrize("row", ROWS, ids=str)
in_torch = pytest.mark.parametrize("row", IN_TORCH, ids=str)
in_paper = pytest.mark.parametrize("row", IN_PAPER, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def _kernels(request, monkeypatch):
    """The default kernels with Numba and without it; the readable rule is the same for both."""
    if request.param == "torch":
        if "readable" in request.node.name:
            pytest.skip("the rule as written needs no kernel")
        monkeypatch.setattr(native_kernel, "unavailable", lambda: "Numba is not installed")


pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------- the numbers


@in_paper
def test_rule_equals_the_paper(row):
    oracle = run_scalar(row)
    assert_close(run_lamina(row, torch.float64, "readable"), oracle, 1e-12)
    assert_close(run_lamina(row, torch.float64, None), oracle, 1e-12)


@in_torch
@dtypes
@pytest.mark.parametrize("prefer", ["readable", None])
def test_equals_torch(row, dtype, prefer):
    dtype, tolerance = getattr(torch, dtype), DTYPES[dtype]
    how = {} if row.name == "Muon" else {"foreach": False}
    if row.name == "Muon" and prefer == "readable":
        tolerance = 1e-2  # a last digit that differs becomes one of bfloat16
    assert_close(run_lamina(row, dtype, prefer), run_torch(row, dtype, **how), tolerance)


@in_paper
@pytest.mark.parametrize("prefer", ["readable", None])
def test_float32_is_near_the_paper(row, prefer):
    assert_close(run_lamina(row, torch.float32, prefer), run_scalar(row), 1e-5)


@in_paper
def test_bfloat16(row):
    """A few of its roundings (2^-8 each) from the truth; at most one between the kernels."""
    readable, default = (run_lamina(row, torch.bfloat16, kind, 20) for kind in ("readable", None))
    # a trust ratio asks for steps that are a share of the weights: many are near one rounding
    assert_close(readable, run_scalar(row, 20), 1e-1 if row.whole else 4e-2)
    assert_close(default, readable, 2**-8)


@rows
@pytest.mark.parametrize("prefer", ["readable", None])
@dtypes
def test_scale_multiplies_the_gradients(row, prefer, dtype):
    dtype, tolerance = getattr(torch, dtype), DTYPES[dtype]

    class Scaled(type(ALGORITHMS[row.name])):
        def update(self, param, grad, state, step, hyper):
            return super().update(param, 0.375 * grad, state, step, hyper)

    if row.name == "Muon" and prefer == "readable":
        tolerance = 1e-2
    elif row.whole:
        tolerance *= 2  # a sum over the tensor rounds in another order
    given = run_lamina(row, dtype, prefer, scale=torch.tensor(0.375))
    assert_close(given, run_lamina(row, dtype, "readable", algorithm=Scaled()), tolerance)


# -------------------------------------------------------------------------------------- the canary


class NoBiasCorrection(Adam):
    def update(self, param, grad, state, step, hyper):
        return super().update(param, grad, state, 10**6, hyper)


class WrongSign(Adam):
    def update(self, param, grad, state, step, hyper):
        change, state = super().update(param, grad, state, step, hyper)
        return -change, state


class SlightlyWrongBeta(Adam):
    def update(self, param, grad, state, step, hyper):
        beta1, beta2 = hyper["betas"]
        return super().update(param, grad, state, step, {**hyper, "betas": (beta1 + 1e-5, beta2)})


@pytest.mark.parametrize("planted", [NoBiasCorrection(), WrongSign(), SlightlyWrongBeta()])
def test_canary_a_planted_error_is_seen(planted):
    row = next(row for row in ROWS if row.name == "Adam")
    given = run_lamina(row, torch.float32, "readable", algorithm=planted)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(given, run_torch(row, torch.float32), DTYPES["float32"])
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(given, run_scalar(row), DTYPES["float32"])


# ---------------------------------------------------------------------------------------- the rule


@rows
def test_update_is_pure(row):
    algorithm, hyper = ALGORITHMS[row.name], hypers(row)[0]
    param = start(row, torch.float32)[0][0]
    grad = torch.ones_like(param)
    state = algorithm.init(param, hyper)
    for step in (1, 2):
        before = copy.deepcopy((param, grad, state, hyper))
        change, new = algorithm.update(param, grad, state, step, hyper)
        for old, now in zip(before[:2], (param, grad), strict=True):
            assert torch.equal(old, now)
        assert before[2].keys() == state.keys()
        assert all(torch.equal(before[2][key], state[key]) for key in state)
        assert before[3] == hyper
        pointers = [t.data_ptr() for t in (param, grad, change, *state.values(), *new.values())]
        assert len(set(pointers)) == len(pointers)
        state = new


@in_torch
def test_state_has_the_keys_of_torch(row):
    [param] = [torch.nn.Parameter(torch.ones(3, 1))]
    param.grad = torch.ones(3, 1)
    optimizer = row.torch_class([param], **row.options)
    optimizer.step()
    theirs = {key for key, value in optimizer.state[param].items() if value is not None}

    algorithm, hyper = ALGORITHMS[row.name], hypers(row)[0]
    state = algorithm.init(param.detach(), hyper)
    _, state = algorithm.update(param.detach(), param.grad, state, 1, hyper)
    assert set(state) == theirs - {"step"}


@pytest.mark.parametrize("name", sorted({*(row.name for row in IN_TORCH), "LBFGS"}))
def test_defaults_are_those_of_torch(name):
    algorithm = METHODS[name]
    theirs = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(1, 1))]).defaults
    theirs = {key: None if key == "max_eval" else value for key, value in theirs.items()}
    assert algorithm.defaults == {key: theirs[key] for key in algorithm.defaults}
    how = {"foreach", "capturable", "differentiable", "fused"}  # of the machine, not of the rule
    assert theirs.keys() - algorithm.defaults.keys() <= how


@pytest.mark.parametrize("name", METHODS)
def test_every_hyperparameter_is_a_number_or_an_option(name):
    algorithm = METHODS[name]
    numeric = algorithm.defaults.keys() - algorithm.options
    assert set(algorithm.options) <= algorithm.defaults.keys()
    assert algorithm.limits.keys() <= numeric
    assert {*algorithm.counts, *algorithm.unbounded} <= numeric
    for key, default in algorithm.defaults.items():
        assert (key in numeric) is not (key in algorithm.choices or isinstance(default, bool))
    algorithm.check(algorithm.defaults)


@pytest.mark.parametrize("name", METHODS)
def test_algorithms_are_plain_values(name):
    algorithm = METHODS[name]
    assert repr(algorithm) == name
    assert type(pickle.loads(pickle.dumps(algorithm))) is type(algorithm)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("SGD", {"lr": -1.0}, "SGD was given lr=-1.0; expected a number, 0 <= lr, finite."),
        ("SGD", {"lr": float("nan")}, "lr=nan"),
        ("SGD", {"lr": float("inf")}, "lr=inf"),
        ("SGD", {"lr": "0.1"}, "lr='0.1'"),
        ("SGD", {"lr": True}, "lr=True"),
        ("SGD", {"lr": torch.ones(2)}, "expected a number"),
        ("SGD", {"momentum": -0.1}, "momentum"),
        ("SGD", {"dampening": float("inf")}, "expected a number, dampening, finite"),
        ("SGD", {"weight_decay": -1}, "weight_decay"),
        ("SGD", {"nesterov": True}, "momentum > 0"),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening 0"),
        ("SGD", {"maximize": "yes"}, "maximize='yes'; expected True or False"),
        ("SGD", {"momentun": 0.9}, "Did you mean 'momentum'"),
        ("RMSprop", {"alpha": -0.1}, "alpha"),
        ("RMSprop", {"eps": -1e-8}, "eps"),
        ("Adam", {"betas": (0.9, 1.0)}, r"betas\[1\]=1.0; expected a number, 0 <= betas\[1\] < 1"),
        ("Adam", {"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        ("Adam", {"betas": 0.9}, r"expected 2 numbers, as in \(0.9, 0.999\)"),
        ("Adam", {"betas": (0.9,)}, "expected 2 numbers"),
        ("AdamW", {"decoupled_weight_decay": False}, "Use Adam"),
        ("AdamW", {"momentum": 0.9}, "AdamW has no hyperparameter 'momentum'"),
        ("Muon", {"ns_steps": 2.5}, "ns_steps=2.5; expected a whole number"),
        ("Muon", {"ns_steps": 100}, "1 <= ns_steps < 100"),
        ("Muon", {"ns_coefficients": (1, 2)}, "expected 3 numbers"),
        ("Muon", {"adjust_lr_fn": "orignal"}, "None, 'original', .* Did you mean 'original'"),
        ("LARS", {"trust_coefficient": -1}, "trust_coefficient=-1"),
        ("LAMB", {"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ("LayerAdaptiveAdam", {"eps": -1}, "eps=-1"),
        ("LBFGS", {"max_iter": 0}, "1 <= max_iter"),
        ("LBFGS", {"max_eval": 0.5}, "max_eval"),
        ("LBFGS", {"history_size": 2.5}, "whole number"),
        ("LBFGS", {"line_search_fn": "strong-wolfe"}, "Did you mean 'strong_wolfe'"),
    ],
)
def test_out_of_range(name, hyper, words):
    with pytest.raises(HyperparameterError, match=words):
        METHODS[name].check(hyper)


@pytest.mark.parametrize("value", [0, 0.5, torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_in_range(value):
    check_number("SGD", "lr", value)

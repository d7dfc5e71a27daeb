"""What every optimizer of `lamina.optim` promises to a training loop, driven by two tables."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lamina import optim
from reference.dropin import CASES, STEPPERS, Problem
from reference.runner import DTYPES, assert_close, gradient, run_scalar, run_torch, start
from reference.table import IN_PAPER, IN_TORCH

cases = pytest.mark.parametrize("case", CASES, ids=str)
steppers = pytest.mark.parametrize("case", STEPPERS, ids=str)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(case, problem, **options):
    return case.make(problem.net.parameters(), lr=case.net, **case.options, **options)


# ---------------------------------------------------------------------------- equal to the oracles


def drop_in(row, dtype, layout, steps, **kind):
    """The parameters after some steps of the optimizer, built as a user would."""
    given = [[nn.Parameter(param) for param in params] for params in start(row, dtype)]
    params = [param for group in given for param in group]
    changes = [{}, row.second]
    if layout == "two groups":
        groups = [{"params": ps, **each} for ps, each in zip(given, changes, strict=True)]
    elif layout == "added":
        groups = given[0]
    elif layout == "one tensor each":
        groups = [
            {"params": param, **each}
            for ps, each in zip(given, changes, strict=True)
            for param in ps
        ]
    else:
        groups = [
            {"params": [(f"{i}.{j}", param) for j, param in enumerate(ps)], **each}
            for i, (ps, each) in enumerate(zip(given, changes, strict=True))
        ]
    optimizer = getattr(optim, row.name)(params=groups, **row.options, **kind)
    if layout == "added":
        optimizer.add_param_group({"params": (param for param in given[1]), **row.second})
    for t in range(1, steps + 1):
        for place, param in enumerate(params):
            param.grad = gradient(param, place, t)
        optimizer.step()
    return [param.detach() for param in params]


LAYOUTS = ["two groups", "added", "one tensor each", "named"]


@pytest.mark.parametrize("row", IN_TORCH, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_in_every_layout(row, dtype):
    dtype, tolerance = getattr(torch, dtype), DTYPES[dtype]
    kind = {} if row.name == "Muon" else {"foreach": False}
    oracle = run_torch(row, dtype, 10, **kind)
    for layout in LAYOUTS:
        assert_close(drop_in(row, dtype, layout, 10), oracle, tolerance)


@pytest.mark.parametrize("row", [row for row in IN_PAPER if row.torch_class is None], ids=str)
def test_equals_the_paper_in_every_layout(row):
    exact = run_scalar(row, 10)
    for layout in LAYOUTS:
        assert_close(drop_in(row, torch.float64, layout, 10), exact, 1e-12)


@pytest.mark.parametrize("row", IN_PAPER, ids=str)
def test_float32_state_of_bfloat16_parameters(row):
    """One rounding of the weights in a step is all that is lost."""
    exact = run_scalar(row, 10)
    given = drop_in(row, torch.bfloat16, "two groups", 10, state_dtype=torch.float32)
    assert all(param.dtype is torch.bfloat16 for param in given)
    assert_close(given, exact, 4e-2)


# ------------------------------------------------------------------------------------- convergence


@cases
def test_converges_on_rosenbrock(case):
    steps = 60 if case.name == "LBFGS" else 1000
    param = nn.Parameter(torch.tensor([[-1.2, 1.0]]))
    optimizer = case.make([param], lr=case.rosenbrock, **case.options)

    def closure():
        optimizer.zero_grad()
        x, y = param[0]
        loss = 100 * (y - x * x) ** 2 + (1 - x) ** 2
        loss.backward()
        return loss

    for t in range(steps):
        if case.name != "LBFGS":
            optimizer.param_groups[0]["lr"] = case.rosenbrock * (1 - t / steps)
        last = optimizer.step(closure)
    assert last.item() < 0.2  # from 24.2


@cases
def test_converges_on_a_network(case):
    problem = Problem(case, torch.float32)
    losses = problem.train(build(case, problem), 100)
    assert losses[-1] < 0.03 * losses[0]


# ------------------------------------------------------------------------------- state and copying


def reloaded(optimizer, problem, case):
    """A new optimizer of other values, with the saved state read back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = case.make(problem.net.parameters(), lr=case.net * 3, **case.options)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@cases
def test_saving_in_the_middle_changes_nothing(case):
    straight, broken = Problem(case), Problem(case)
    straight.train(build(case, straight), 8)
    optimizer = build(case, broken)
    broken.train(optimizer, 3)
    again = reloaded(optimizer, broken, case)
    broken.train(again, 5)
    for a, b in zip(broken.weights(), straight.weights(), strict=True):
        assert torch.equal(a, b)


@cases
@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_go_on_equally(case, copied):
    problem = Problem(case)
    optimizer = build(case, problem)
    problem.train(optimizer, 3)
    both = (problem, optimizer)
    twin, its_optimizer = (
        copy.deepcopy(both) if copied == "deepcopy" else pickle.loads(pickle.dumps(both))
    )
    problem.train(optimizer, 3)
    twin.train(its_optimizer, 3)
    for a, b in zip(twin.weights(), problem.weights(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("case", [case for case in CASES if case.torch_class], ids=str)
@pytest.mark.parametrize("to_torch", [True, False])
def test_checkpoints_of_torch(case, to_torch):
    ours, theirs = Problem(case), Problem(case)
    mine = build(case, ours)
    its = case.torch_class(theirs.net.parameters(), lr=case.net, **case.options)
    ours.train(mine, 3)
    theirs.train(its, 3)
    if to_torch:
        changed = case.torch_class(ours.net.parameters(), lr=1.0)
        changed.load_state_dict(mine.state_dict())
        ours.train(changed, 4)
        theirs.train(its, 4)
    else:
        changed = case.make(theirs.net.parameters(), lr=1.0)
        changed.load_state_dict(its.state_dict())
        theirs.train(changed, 4)
        ours.train(mine, 4)
    assert_close(ours.weights(), theirs.weights(), 1e-12)


@cases
def test_no_garbage_grows(case):
    problem = Problem(case)
    optimizer = build(case, problem)
    problem.train(optimizer, 5)
    if case.name == "LBFGS":
        optimizer.param_groups[0]["history_size"] = 3
        problem.train(optimizer, 5)
    counts = []
    for _ in range(3):
        problem.train(optimizer, 10)
        gc.collect()
        objects = gc.get_objects()
        counts.append((len(objects), sum(type(each) is torch.Tensor for each in objects)))
        del objects  # or it would keep this round's gradients
    assert counts[2][1] <= counts[0][1]
    assert counts[2][0] - counts[1][0] < 30  # the test's own numbers


# -------------------------------------------------------------------------------- inside a trainer


@steppers
def test_overflow_under_a_grad_scaler_leaves_everything(case):
    problem, plain = Problem(case, torch.float32), Problem(case, torch.float32)
    optimizer, its = build(case, problem), build(case, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    for t in range(6):
        optimizer.zero_grad()
        loss = problem.loss() * (torch.inf if t in (0, 3) else 1.0)
        scaler.scale(loss).backward()
        before = copy.deepcopy((problem.weights(), optimizer.state_dict()["state"]))
        scaler.step(optimizer)
        scaler.update()
        if t in (0, 3):
            after = (problem.weights(), optimizer.state_dict()["state"])
            torch.testing.assert_close(after, before, rtol=0, atol=0)
        else:
            plain.train(its, 1)
    assert_close(problem.weights(), plain.weights(), 1e-2 if case.name == "Muon" else 1e-5)


@cases
def test_a_compiled_step_equals_the_eager_one(case):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager, compiled = Problem(case), Problem(case)
    optimizer, its = build(case, compiled), build(case, eager)

    def closure():
        optimizer.zero_grad()
        loss = compiled.loss()
        loss.backward()
        return loss.detach()  # dynamo warns of any tensor with a graph that crosses its breaks

    @torch.compile(backend=counter)
    def train_step():
        if case.name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()

    for t in range(30):
        for each in (optimizer, its):
            if case.name != "LBFGS":
                each.param_groups[0]["lr"] = case.net * (1 - t / 30)
        train_step()
        eager.train(its, 1)
    assert counter.frame_count <= 2
    assert_close(compiled.weights(), eager.weights(), 1e-12)
    assert optimizer.param_groups[0]["lr"] == its.param_groups[0]["lr"]
    if case.name != "LBFGS":
        assert all(float(entry["step"]) == 30 for entry in optimizer.state.values())

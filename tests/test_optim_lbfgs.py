"""L-BFGS: torch's algorithm without groups, one with a learning rate for each part with them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import lamina as lm
from lamina import optim
from lamina.algorithms.lbfgs import Memory
from lamina.algorithms.line_search import Point, strong_wolfe
from lamina.errors import HyperparameterError, NonFiniteError, PlanError


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Fit:
    """A small regression that counts and records its evaluations."""

    def __init__(self, make, seed=0, dtype=torch.float64, groups=None, **options):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
        self.x, self.y = torch.randn(30, 4, dtype=dtype), torch.randn(30, 1, dtype=dtype)
        params = self.net.parameters() if groups is None else groups(self.net)
        self.optimizer = make(params, **options)
        self.losses: list[float] = []
        self.without: list[nn.Parameter] = []

    def closure(self):
        self.optimizer.zero_grad()
        loss = (self.net(self.x) - self.y).square().mean()
        loss.backward()
        for param in self.without:
            param.grad = None
        self.losses.append(loss.item())
        return loss

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.step(self.closure)
        return self

    def weights(self):
        return [param.detach().clone() for param in self.net.parameters()]


def halves(net, first=1.0, second=1.0):
    return [
        {"params": net[0].parameters(), "lr": first},
        {"params": net[2].parameters(), "lr": second},
    ]


OPTIONS = [
    {},
    {"lr": 0.3, "max_iter": 7},
    {"line_search_fn": "strong_wolfe"},
    {"line_search_fn": "strong_wolfe", "history_size": 3, "lr": 0.5, "max_eval": 9},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("groups", [None, halves])
def test_equal_learning_rates_are_torch(options, groups):
    theirs = Fit(torch.optim.LBFGS, **options).train(4)
    if groups is not None:
        lr = options.get("lr", 1)
        groups = lambda net: halves(net, lr, lr)  # noqa: E731
    ours = Fit(optim.LBFGS, groups=groups, **options).train(4)
    assert len(ours.losses) == len(theirs.losses) > 10
    assert ours.losses[:10] == pytest.approx(theirs.losses[:10], rel=1e-14)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-9)


@pytest.mark.parametrize("options", OPTIONS)
def test_canary_another_scaling_is_seen(options, monkeypatch):
    learn = Memory.learn

    def wrong(self, grad, scale, size):
        learn(self, grad, scale, size)
        self.H_diag *= 1.0001

    monkeypatch.setattr(Memory, "learn", wrong)
    theirs = Fit(torch.optim.LBFGS, **options).train(1)
    ours = Fit(optim.LBFGS, **options).train(1)
    assert ours.losses[:9] != pytest.approx(theirs.losses[:9], rel=1e-12)


def dense_direction(memory, grad, scale):
    """-H g with H built as a matrix by the BFGS update (Nocedal and Wright 2006, equation 6.17)."""
    eye = torch.eye(grad.numel(), dtype=grad.dtype)
    inverse = memory.H_diag * torch.diag(scale)
    for y, s, ro in zip(memory.old_dirs, memory.old_stps, memory.ro, strict=True):
        left = eye - ro * torch.outer(s, y)
        inverse = left @ inverse @ left.T + ro * torch.outer(s, s)
    return inverse, -inverse @ grad


def test_directions_are_those_of_the_matrix_and_go_downhill():
    """Against the update written with matrices; a direction multiplied afterwards may go uphill."""
    torch.manual_seed(0)
    uphill = 0
    for _ in range(200):
        scale = torch.tensor([1.0, 1.0, 1e-3, 1e-6, 1e-3, 1.0], dtype=torch.float64)
        memory = Memory(d=torch.zeros(6, dtype=torch.float64), t=1.0)
        hessian = torch.randn(6, 6, dtype=torch.float64)
        hessian = hessian @ hessian.T + 0.1 * torch.eye(6, dtype=torch.float64)
        memory.prev_flat_grad = torch.randn(6, dtype=torch.float64)
        for _ in range(4):
            memory.d = torch.randn(6, dtype=torch.float64)
            grad = memory.prev_flat_grad + hessian @ memory.d
            memory.learn(grad, scale, 100)
            memory.prev_flat_grad = grad
        s, y = memory.old_stps[-1], memory.old_dirs[-1]
        assert memory.H_diag == pytest.approx(float(s.dot(y) / y.dot(scale * y)))
        inverse, expected = dense_direction(memory, grad, scale)
        given = memory.direction(grad, scale)
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-9)
        assert float(torch.linalg.eigvalsh(inverse).min()) > 0
        assert float(given.dot(grad)) < 0
        uphill += float((scale * memory.direction(grad, None)).dot(grad)) > 0
    assert uphill > 0  # what the promise above is worth


# ------------------------------------------------------------------------- parts of another scale


def coupled(seed, scale, lrs):
    """Two coupled parts, of which one is counted in units `scale` times smaller."""
    generator = torch.Generator().manual_seed(seed)
    a, b, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((20,), (20,), (20, 20))
    )
    mix = mix / 20**0.5
    params = [nn.Parameter(torch.zeros(20, dtype=torch.float64)) for _ in range(2)]
    optimizer = optim.LBFGS(
        [{"params": param, "lr": lr} for param, lr in zip(params, lrs, strict=True)],
        max_iter=100,
        max_eval=100,
        line_search_fn="strong_wolfe",
        tolerance_change=0.0,
        tolerance_grad=0.0,
    )
    losses = []

    def closure():
        optimizer.zero_grad()
        u, v = params[0], params[1] / scale
        first = u - a + 0.3 * torch.tanh(mix @ v)
        second = v - b + 0.3 * torch.tanh(mix.T @ u)
        loss = first.square().sum() + (second**4 / 4 + second**2 / 2).sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    return optimizer, closure, losses


def evaluations(seed, lrs, target=1e-2, scale=1e4, limit=200):
    """How many it takes to get below the target; the limit if it takes as many or more."""
    optimizer, closure, losses = coupled(seed, scale, lrs)
    while len(losses) < limit and min(losses, default=1.0) >= target:
        optimizer.step(closure)
    return next((i + 1 for i, loss in enumerate(losses) if loss < target), limit)


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_against_the_best_single_learning_rate(seed):
    """Curvatures differ by the square of the scale, and so do the two learning rates."""
    grouped = evaluations(seed, (1e-8, 1.0))
    enough = math.ceil(grouped / 0.35)  # more are not counted
    single = [
        evaluations(seed, (lr, lr), limit=enough) for lr in (10.0**power for power in range(-4, 5))
    ]
    assert enough < 200
    assert grouped <= 0.35 * min(single)


# ------------------------------------------------------------------------------ who takes part


@pytest.mark.parametrize("how", ["frozen", "no gradient", "lr 0"])
def test_what_takes_no_part_does_not_move(how):
    def groups(net):
        return halves(net, 0.0 if how == "lr 0" else 1.0, 1.0)

    part = Fit(optim.LBFGS, groups=groups)
    alone = Fit(optim.LBFGS, groups=lambda net: [{"params": net[2].parameters(), "lr": 1.0}])
    for fit in (part, alone):
        for param in fit.net[0].parameters():
            if how == "frozen":
                param.requires_grad_(False)
            elif how == "no gradient":
                fit.without.append(param)
    before = part.weights()
    part.train(3)
    alone.train(3)
    after = part.weights()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert part.losses == pytest.approx(alone.losses, rel=1e-12)


def test_a_thaw_forgets_the_pairs_of_the_smaller_vector():
    fit = Fit(optim.LBFGS, groups=halves, line_search_fn="strong_wolfe")
    fit.net[0].requires_grad_(False)
    fit.train(2)
    fit.net[0].requires_grad_(True)
    before = fit.weights()
    fit.train(4)
    assert not torch.equal(before[0], fit.net[0].weight)
    assert fit.losses[-1] < 0.5 * fit.losses[0]


def test_all_frozen():
    fit = Fit(optim.LBFGS)
    fit.net.requires_grad_(False)
    assert float(fit.optimizer.step(lambda: 1.5)) == 1.5


# ------------------------------------------------------------------------------------ odd tensors


def test_complex_and_half_and_sparse():
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = optim.LBFGS([weight, half, table.weight], line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (weight - (0.5 + 2j)).abs().square().sum() + (half.float() - 3).square().sum()
        loss = loss + (table(torch.tensor([1, 2])) - 1).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    last = optimizer.step(closure)
    assert last.item() < 1e-3 * first.item()
    assert optimizer.state[weight]["d"].dtype is torch.float32
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure)


# ---------------------------------------------------------------------------------------- bad input


def test_a_closure_is_needed():
    with pytest.raises(PlanError, match=r"optimizer.step\(closure\)"):
        optim.LBFGS([nn.Parameter(torch.ones(2))]).step()


def test_only_lr_may_differ():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    with pytest.raises(HyperparameterError, match="group 1: max_iter=3, but it is 20"):
        optim.LBFGS([{"params": params[0]}, {"params": params[1], "max_iter": 3}])


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("what", ["loss", "gradient", "error"])
@pytest.mark.parametrize("when", [0, 1, 4])
def test_what_goes_wrong_leaves_weights_and_state(line_search, what, when):
    fit = Fit(optim.LBFGS, line_search_fn=line_search, max_iter=9).train(1)
    before, state = fit.weights(), copy.deepcopy(fit.optimizer.state_dict())
    calls = []

    def closure():
        calls.append(1)
        loss = fit.closure()
        if len(calls) <= when:
            return loss
        if what == "error":
            raise KeyboardInterrupt
        if what == "gradient":
            fit.net[2].weight.grad[0, 0] = torch.nan
            return loss
        return loss * torch.inf

    words = {"loss": "loss of the closure is inf", "gradient": "parameter number 2 is not finite"}
    with pytest.raises(KeyboardInterrupt if what == "error" else NonFiniteError) as caught:
        fit.optimizer.step(closure)
    assert len(calls) == when + 1
    assert words.get(what, "") in str(caught.value)
    for a, b in zip(fit.weights(), before, strict=True):
        assert torch.equal(a, b)
    after = fit.optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)
    fit.train(1)  # and training may go on


# ---------------------------------------------------------------------------------- the line search


def search(function, slope, t, max_evals=25):
    def evaluate(t):
        return Point(t, function(t), torch.zeros(1), slope(t))

    return strong_wolfe(evaluate, evaluate(0.0), t, 1.0, tolerance_change=1e-9, max_evals=max_evals)


@pytest.mark.parametrize("t", [1e-3, 0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (lambda t: (t - 2) ** 2, lambda t: 2 * (t - 2)),
        (lambda t: -t / (t**2 + 2), lambda t: (t**2 - 2) / (t**2 + 2) ** 2),
        (lambda t: (t + 0.004) ** 5 - 2 * (t + 0.004) ** 4, lambda t: _quintic_slope(t)),
        (lambda t: 1.0 - t + t**4, lambda t: -1 + 4 * t**3),
    ],
)
def test_strong_wolfe_conditions_hold(function, slope, t):
    """Functions 1 and 2 of Moré and Thuente 1994, among others."""
    point, count = search(function, slope, t)
    assert count <= 26
    assert point.loss <= function(0.0) + 1e-4 * point.t * slope(0.0)
    assert abs(point.slope) <= 0.9 * abs(slope(0.0))


def _quintic_slope(t):
    return 5 * (t + 0.004) ** 4 - 8 * (t + 0.004) ** 3


def test_the_best_point_is_returned_when_evaluations_run_out():
    point, count = search(lambda t: -t, lambda t: -1.0, 1e-3, max_evals=3)
    assert count == 4
    assert point.loss == -point.t < -0.1
    start, count = search(lambda t: t, lambda t: -1.0, 1.0, max_evals=0)
    assert (count, start.t) == (1, 0.0)


# ------------------------------------------------------------------------------------ under a plan


def layers(rules):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()
    return net, lm.Plan(lm.LBFGS, lr=0.1, max_iter=2, rules=rules)


def go(net, optimizer, steps):
    for step in steps:
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

        def closure(x=x):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            if loss.requires_grad:
                loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("at", range(7))
def test_a_plan_resumes_in_every_stage_of_a_thaw(at):
    rules = [lm.Rule("{depth}.*", thaw=lm.top_down(every=2, start=0))]
    net, plan = layers(rules)
    optimizer = plan.build(net, steps=8)
    go(net, optimizer, range(at))
    twin = copy.deepcopy(net)
    other = plan.build(twin, steps=8, resume=copy.deepcopy(optimizer.state_dict()))
    go(net, optimizer, range(at, 8))
    go(twin, other, range(at, 8))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_another_part_of_the_same_size_begins_without_the_pairs_of_the_first():
    net, plan = layers([lm.Rule("0", freeze=2), lm.Rule("1", thaw=2), lm.Rule("2", frozen=True)])
    optimizer = plan.build(net, steps=6)
    go(net, optimizer, range(2))
    fresh = copy.deepcopy(net)
    for param in [*fresh[0].parameters(), *fresh[2].parameters()]:
        param.requires_grad_(False)
    fresh[1].requires_grad_(True)
    theirs = torch.optim.LBFGS(fresh[1].parameters(), lr=0.1, max_iter=2)
    go(net, optimizer, range(2, 5))
    go(fresh, theirs, range(2, 5))
    for one, other in zip(net.parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:nothing-trains")  # which is meant here
def test_nothing_trains_yet():
    net, plan = layers([lm.Rule("*", thaw=2)])
    optimizer = plan.build(net, steps=6)
    before = [param.detach().clone() for param in net.parameters()]
    go(net, optimizer, range(2))
    assert all(map(torch.equal, net.parameters(), before))
    go(net, optimizer, range(2, 4))
    assert not any(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_complex_parameters_with_a_learning_rate_of_their_own(lr, search):
    """The same steps as for the two real numbers that each of them is."""

    def trained(is_complex):
        dtype = torch.complex128 if is_complex else torch.float64
        shape = (2,) if is_complex else (2, 2)
        first = nn.Parameter(torch.zeros(shape, dtype=dtype))
        second = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        groups = [{"params": [first], "lr": lr}, {"params": [second]}]
        optimizer = optim.LBFGS(groups, lr=1, max_iter=3, line_search_fn=search)

        def closure():
            optimizer.zero_grad()
            pairs = torch.view_as_real(first) if is_complex else first
            loss = (pairs - torch.tensor([2.0, 1.0])).pow(4).sum() + (second - 3).square().sum()
            (loss + pairs.sum() * second.sum() / 20).backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        given = first.detach()
        return torch.view_as_real(given) if is_complex else given, second.detach()

    for one, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
    assert trained(True)[0][:, 1].abs().min() > 0.1


def test_the_first_group_may_be_empty():
    ours = Fit(optim.LBFGS, groups=lambda net: [{"params": []}, {"params": net.parameters()}])
    theirs = Fit(torch.optim.LBFGS)
    for one, other in zip(ours.train(2).weights(), theirs.train(2).weights(), strict=True):
        torch.testing.assert_close(one, other)
    assert optim.LBFGS([{"params": []}]).step(lambda: 1.5) == 1.5


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned None"),
        ("0.5", "returned '0.5'"),
        (torch.ones(2), r"returned a tensor of shape \(2,\)"),
        ((torch.ones(()), 1), r"returned \(tensor"),
    ],
)
def test_a_closure_that_returns_no_number_is_refused(returned, words, at, planned):
    fit = Fit(optim.LBFGS)
    if planned:
        fit.optimizer = lm.Plan(lm.LBFGS, lr=1.0).build(fit.net)
    fit.train(1)
    before, state = fit.weights(), copy.deepcopy(fit.optimizer.state_dict())
    calls = []

    def closure():
        calls.append(fit.closure())
        return returned if len(calls) == at else calls[-1]

    with pytest.raises(PlanError, match=f"the closure {words}.*expected the loss"):
        fit.optimizer.step(closure)
    assert all(map(torch.equal, fit.weights(), before))
    assert plain(fit.optimizer.state_dict()) == plain(state)


def plain(value):
    """Tensors as numbers, so that == compares them."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("planned", [False, True])
def test_what_is_no_closure_is_refused(planned):
    fit = Fit(optim.LBFGS)
    optimizer = lm.Plan(lm.LBFGS, lr=1.0).build(fit.net) if planned else fit.optimizer
    with pytest.raises(PlanError, match=r"needs a closure, and was given 3: optimizer\.step"):
        optimizer.step(3)

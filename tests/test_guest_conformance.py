"""Third-party optimizers in a plan: as by hand, in two halves, with a part that thaws late."""

import copy
import io
import random
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import nn

import lamina as lm

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import guests

po = pytest.importorskip("pytorch_optimizer")
#: of each kind: counters in groups, loose entries, a state_dict of its own, a queue, a dict by
#: numbers, lists, modes, group flags, a second derivative, rewritten settings
KINDS = [
    *("Lion", "MADGRAD", "StableSPAM", "AdaShift", "AggMo", "ScheduleFreeAdamW", "Muon"),
    *("AdaHessian", "SCION", "DAdaptSGD"),
]


@pytest.mark.parametrize("name", KINDS)
def test_an_optimizer_of_each_kind_runs_as_by_hand_and_goes_on_from_a_save(name):
    outcome = guests.conform(guests.case_of(getattr(po, name)))
    assert outcome.refused == ""
    assert (outcome.by_hand, outcome.resumes, outcome.late) == ("yes", "yes", "yes")


@pytest.mark.slow
def test_at_least_110_classes_of_pytorch_optimizer_run_and_the_others_are_refused_clearly():
    outcomes = [guests.conform(case) for case in guests.cases_of("pytorch_optimizer")]
    assert len(outcomes) == 139
    wrong = [each for each in outcomes if not each.right and not each.refused]
    assert wrong == []
    assert sum(each.right for each in outcomes) >= 110
    assert [each for each in outcomes if each.refused.startswith("fails")] == []


@pytest.mark.slow
@pytest.mark.parametrize("package", [name for name in guests.PACKAGES if "pytorch" not in name])
def test_no_class_of_another_package_goes_on_with_other_numbers(package):
    try:
        cases = guests.cases_of(package)
    except ImportError as error:
        pytest.skip(str(error))
    outcomes = [guests.conform(case) for case in cases]
    assert [each for each in outcomes if not each.right and not each.refused] == []


# ------------------------------------------------------------------ each place of a guest's state


class Descent(torch.optim.Optimizer):
    """Descent with a factor that grows with a count; where the count lies is up to subclasses."""

    def __init__(self, params, lr=0.05, **kwargs):
        super().__init__(params, {"lr": lr})

    def factor(self):
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        factor = self.factor()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad, alpha=group["lr"] * factor)


class InGroups(Descent):
    def factor(self):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return 1 + 0.1 * self.param_groups[0]["k"]


class Loose(Descent):
    def factor(self):
        self.state["k"] = self.state.get("k", torch.zeros(())) + 1
        return 1 + 0.1 * float(self.state["k"])


class InAttribute(Descent):
    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.counts = {"steps": 0, "last": deque(maxlen=3)}

    def factor(self):
        self.counts["steps"] += 1
        self.counts["last"].append(self.counts["steps"])  # type: ignore[attr-defined]
        return 1 + 0.1 * sum(self.counts["last"])


class OwnStateDict(Descent):
    """What it counts is an object, which only its own methods can write and read."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.counter = random.Random(0)

    def factor(self):
        return 1 + self.counter.random()

    def state_dict(self):
        version, numbers, gauss = self.counter.getstate()
        return {**super().state_dict(), "counter": [version, list(numbers), gauss]}

    def load_state_dict(self, state_dict):
        version, numbers, gauss = state_dict["counter"]
        self.counter.setstate((version, tuple(numbers), gauss))
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "counter"})


class Generator(Descent):
    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.generator = torch.Generator().manual_seed(3)

    def factor(self):
        return float(torch.rand((), generator=self.generator))


PLACES = [InGroups, Loose, InAttribute, OwnStateDict, Generator]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def written(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(one, other):
    return all(map(torch.equal, one.parameters(), other.parameters()))


def by_hand(kind, steps=8):
    model = small()
    train(model, kind(model.parameters()), range(steps))
    return model


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("how", ["fresh", "running", "late", "copied"])
def test_every_place_of_a_guests_state_is_carried(kind, how):
    rules = [lm.Rule("1.*", thaw=6)] if how == "late" else []
    plan, model = lm.Plan(kind, rules=rules), small()
    optimizer = plan.build(model, steps=8)
    train(model, optimizer, range(4))
    saved = written([model.state_dict(), optimizer.state_dict()])
    if how == "running":  # the same optimizer goes back, from where it has come to since
        train(model, optimizer, range(4, 7))
        again, its = model, optimizer
        its.load_state_dict(saved[1])
    elif how == "copied":
        again, its = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(4, 6))  # which the copy does not feel
    else:
        again = small()
        its = plan.build(again, steps=8, resume=saved[1])
    again.load_state_dict(saved[0])
    train(again, its, range(4, 8))
    if how == "late":
        whole = small()
        train(whole, plan.build(whole, steps=8), range(8))
        assert same(again, whole)
    else:
        assert same(again, by_hand(kind))


@pytest.mark.parametrize("kind", PLACES)
def test_a_guests_own_state_goes_on_in_a_plan_and_back(kind):
    model = small()
    theirs = kind(model.parameters())
    train(model, theirs, range(3))
    planned = copy.deepcopy(model)
    optimizer = lm.Plan(kind).build(planned)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(planned, optimizer, range(3, 6))
    back = kind(planned.parameters())
    back.load_state_dict(copy.deepcopy(optimizer.torch_state_dict()))
    if kind in (InGroups, Loose, OwnStateDict):  # what its own state_dict writes
        train(planned, back, range(6, 8))
        assert same(planned, by_hand(kind))


@pytest.mark.parametrize("one", PLACES)
def test_two_guests_with_the_same_keys_do_not_meet(one):
    other = Loose if one is not Loose else InAttribute
    plan = lm.Plan(one, rules=[lm.Rule("1.*", optimizer=other, lr=0.05)])
    model, alone = small(), small()
    optimizer = plan.build(model)
    pair = [one(alone[0].parameters()), other(alone[1].parameters())]
    for step in range(6):
        if step == 3:
            saved = written(optimizer.state_dict())
            optimizer = plan.build(model, resume=saved)
        generator = torch.Generator().manual_seed(step)
        batch = torch.randn(5, 3, generator=generator)
        for each, by in ((model, [optimizer]), (alone, pair)):
            each(batch).square().mean().backward()
            for its in by:
                its.step()
            each.zero_grad()
    assert same(model, alone)


def test_a_load_of_an_earlier_state_leaves_no_later_counter():
    model = small()
    optimizer = lm.Plan(InGroups).build(model)
    first = written(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(3))
    optimizer.load_state_dict(first)
    model.load_state_dict(weights)
    assert "k" not in optimizer.param_groups[0]
    train(model, optimizer, range(8))
    assert same(model, by_hand(InGroups))


# ----------------------------------------------------------------------------- refused, with why


class Hidden(Descent):
    """Counts in an object that nothing writes."""

    class Count:
        value = 0

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        self.count = Hidden.Count()

    def factor(self):
        self.count.value += 1
        return 1 + self.count.value


class ObjectInState(Descent):
    def factor(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["by"] = Hidden.Count()
        return 1


class Rewrites(Descent):
    def __init__(self, params, lr=0.05):
        super().__init__(params, lr / 2)


class Wants(Descent):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("a closure, please")
        closure()
        self.factor()

    def factor(self):
        return 1


class Wraps(torch.optim.Optimizer):
    def __init__(self, base, lr=0.1):
        self.inner = base if isinstance(base, torch.optim.Optimizer) else torch.optim.SGD(base, lr)
        super().__init__(self.inner.param_groups, {"lr": lr})


class OverOptimizer(torch.optim.Optimizer):
    def __init__(self, optimizer, k=5):
        super().__init__(optimizer.param_groups, {"k": k})


class ByName(torch.optim.Optimizer):
    def __init__(self, named_parameters, lr=0.1):
        super().__init__([{"params": [p], "name": n} for n, p in named_parameters], {"lr": lr})


class Fussy(Descent):
    """Fails over a group without gradients."""

    def factor(self):
        return min(p.grad.abs().max() for g in self.param_groups for p in g["params"])


REFUSED = [
    (Hidden, r"Hidden cannot be resumed"),
    (ObjectInState, r"keeps an object of type Count in its state"),
    (Rewrites, r"Rewrites makes lr=0\.2 of lr=0\.4 when it is built"),
    (Wants, r"Wants needs a closure in every step"),
    (Wraps, r"Wraps wraps another one \(its inner\)"),
    (OverOptimizer, r"OverOptimizer wraps another one \(its optimizer\)"),
    (ByName, r"ByName takes named_parameters first"),
]


@pytest.mark.parametrize(("kind", "why"), REFUSED)
def test_what_cannot_be_carried_is_refused_at_build_and_nothing_is_set(kind, why):
    model = small()
    settings = {} if kind is OverOptimizer else {"lr": 0.4}
    with pytest.raises(lm.PlanError, match=why):
        lm.Plan(kind, **settings, rules=[lm.Rule("0.*", frozen=True)]).build(model)
    assert all(param.requires_grad for param in model.parameters())


def test_a_guest_that_fails_without_gradients_is_refused_where_a_part_rests():
    lm.Plan(Fussy).build(small())
    with pytest.raises(lm.PlanError, match=r"Fussy fails where a part of its groups has no grad"):
        lm.Plan(Fussy, rules=[lm.Rule("1.*", thaw=3)]).build(small(), steps=9)


def test_the_default_that_a_constructor_works_out_is_the_plans():
    optimizer = lm.Plan(Rewrites).build(small())
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_an_instance_is_refused_with_the_class_and_its_settings():
    given = InGroups(small().parameters(), lr=0.3)
    with pytest.raises(lm.PlanError, match=r"an instance of InGroups.*Plan\(InGroups, lr=0\.3\)"):
        lm.Plan(given)


def test_a_setting_that_reaches_only_the_group_is_taken_where_it_is_read():
    train_one = small()
    optimizer = lm.Plan(po.Lion, lr=1e-3, adanorm=True).build(train_one)
    alone = small()
    theirs = po.Lion(alone.parameters(), lr=1e-3, adanorm=True)
    train(train_one, optimizer, range(3))
    train(alone, theirs, range(3))
    assert same(train_one, alone)
    with pytest.raises(lm.HyperparameterError, match=r"no hyperparameter 'weigth_decay'.*weight_d"):
        lm.Plan(po.Lion, lr=1e-3, weigth_decay=0.1).build(small())


def test_what_a_guest_counts_is_not_overridden():
    optimizer = lm.Plan(po.DAdaptSGD, lr=1.0).build(small())
    with pytest.raises(lm.PlanError, match=r"sets d, which the plan does not set"):
        optimizer.override(d=1.0)
    optimizer.override(lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_trial_leaves_no_trace_in_random_numbers():
    class Drawing(Descent):
        def factor(self):
            return float(torch.rand(())) + random.random()

    lm.Plan(Drawing).build(model := small())
    torch.manual_seed(7)
    numbers = random.getstate()
    optimizer = lm.Plan(Drawing, lr=0.1).build(model, steps=9)
    assert numbers == random.getstate()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert optimizer.clock == 0


# ---------------------------------------------------------------------------- tensors as values


class TensorRate(torch.optim.Optimizer):
    """Insists on the very tensor that it made of its learning rate, as torchao's do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": torch.tensor(lr)})
        self.made = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        for group, made in zip(self.param_groups, self.made, strict=True):
            if group["lr"] is not made:
                raise RuntimeError("lr was changed to another object; fill it")
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(group["lr"] * param.grad)


def test_a_tensor_learning_rate_is_filled_and_the_group_holds_a_number():
    plan = lm.Plan(TensorRate, lr=0.1, schedule=lm.linear(to=0.5))
    model, alone = small(), small()
    optimizer = plan.build(model, steps=8)
    theirs = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(8):
        if step == 4:
            optimizer = plan.build(model, steps=8, resume=written(optimizer.state_dict()))
        theirs.param_groups[0]["lr"] = 0.1 * (1 - 0.5 * step / 8)
        train(model, optimizer, range(step, step + 1))
        train(alone, theirs, range(step, step + 1))
        assert type(optimizer.param_groups[0]["lr"]) is float
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# -------------------------------------------------------------------------- refused when loaded


def damaged(state, how):
    entry = state["state"][0]
    if how == "lost":
        del entry["exp_avg_var"]
    elif how == "shape":
        entry["exp_avg"] = torch.zeros(3, 4)
    elif how == "text":
        entry["exp_avg"] = "none"
    elif how == "counter":
        for group in state["param_groups"]:
            group["step"] = "many"
    return state


@pytest.mark.parametrize("how", ["lost", "shape", "text", "counter"])
def test_a_state_with_which_the_next_step_would_fail_is_refused_at_load(how):
    model = small()
    optimizer = lm.Plan(po.AdaBelief, lr=0.01).build(model)
    train(model, optimizer, range(2))
    state = written(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(lm.StateError, match=r"next step would fail"):
        optimizer.load_state_dict(damaged(state, how))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    train(model, optimizer, range(2, 4))

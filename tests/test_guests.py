"""Any torch optimizer as a guest: alone, beside lamina's own, and from other packages."""

from __future__ import annotations

import copy
import importlib
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lamina as lm

THIRD_PARTY = [
    ("lion_pytorch", "Lion", 1e-3),
    ("prodigyopt", "Prodigy", 1.0),
    ("schedulefree", "AdamWScheduleFree", 1e-2),
]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model, optimizer, steps=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(16, 4, generator=generator)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(one: nn.Module, other: nn.Module):
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("package", "name", "lr"), THIRD_PARTY)
def test_a_third_party_guest_does_what_it_does_alone(package, name, lr):
    guest = getattr(importlib.import_module(package), name)
    planned, alone = small(), small()
    mine = lm.Plan(guest, lr=lr).build(planned)
    theirs = guest(alone.parameters(), lr=lr)
    for optimizer in (mine, theirs):
        if hasattr(optimizer, "train"):
            optimizer.train()
    train(planned, mine)
    train(alone, theirs)
    assert_equal(planned, alone)


@pytest.mark.parametrize("guest", [torch.optim.NAdam, torch.optim.Adamax, torch.optim.Adagrad])
def test_a_plan_moves_a_guests_learning_rate(guest):
    planned, alone = small(), small()
    plan = lm.Plan(guest, lr=0.01, schedule=lm.linear(to=0.5), rules=[lm.Rule("2.*", lr=0.02)])
    mine = plan.build(planned, steps=12)
    theirs = guest(
        [{"params": alone[0].parameters()}, {"params": alone[2].parameters(), "lr": 0.02}]
    )
    theirs.param_groups[0]["lr"] = 0.01
    base = [group["lr"] for group in theirs.param_groups]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for step in range(12):
        for group, lr in zip(theirs.param_groups, base, strict=True):
            group["lr"] = lr * (1 - 0.5 * step / 12)
        for model, optimizer, generator in zip(
            (planned, alone), (mine, theirs), generators, strict=True
        ):
            model(torch.randn(16, 4, generator=generator)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(planned, alone)


def test_several_algorithms_in_one_optimizer_equal_each_alone():
    planned, alone = small(), small()
    plan = lm.Plan(lm.AdamW, lr=0.01, rules=[lm.Rule("2.*", optimizer=torch.optim.NAdam, lr=0.02)])
    mine = plan.build(planned)
    own = lm.AdamW(alone[0].parameters(), lr=0.01)
    guest = torch.optim.NAdam(alone[2].parameters(), lr=0.02)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(10):
        planned(torch.randn(16, 4, generator=generators[0])).pow(2).sum().backward()
        mine.step()
        mine.zero_grad()
        alone(torch.randn(16, 4, generator=generators[1])).pow(2).sum().backward()
        for optimizer in (own, guest):
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(planned, alone)
    assert {group["optimizer"] for group in mine.param_groups} == {"AdamW", "NAdam"}


def test_clipping_reaches_a_guest():
    planned, alone = small(), small()
    mine = lm.Plan(torch.optim.NAdam, lr=0.01, clip_norm=0.1).build(planned)
    theirs = torch.optim.NAdam(alone.parameters(), lr=0.01)
    for model in (planned, alone):
        model(torch.ones(4, 4)).pow(2).sum().backward()
    torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.1)
    mine.step()
    theirs.step()
    assert_equal(planned, alone)


def test_a_clip_factor_is_not_rounded_for_a_guest():
    model = nn.ParameterList([torch.zeros(1, dtype=torch.bfloat16)])
    seen = []

    class Seeing(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["params"][0].grad.clone())

    optimizer = lm.Plan(Seeing, lr=0.1, gradients=[lm.scale_gradients(1.003)]).build(model)
    seen.clear()  # of the steps in which the class was tried on small tensors
    model[0].grad = torch.full((1,), 255.0, dtype=torch.bfloat16)
    optimizer.step()
    assert seen[0].dtype is torch.bfloat16
    assert seen[0].item() == 256.0  # 255 * bfloat16(1.003) would be 255


def test_a_frozen_guest_does_not_move_and_thaws():
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = lm.Plan(
        lm.SGD, lr=0.1, rules=[lm.Rule("2.*", optimizer=torch.optim.NAdam, lr=0.1, thaw=5)]
    ).build(model, steps=10)
    train(model, optimizer, 5)
    assert torch.equal(model[2].weight, before["2.weight"])
    assert not torch.equal(model[0].weight, before["0.weight"])
    train(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before["2.weight"])


def test_a_planned_guest_survives_deepcopy():
    model = small()
    optimizer = lm.Plan(torch.optim.NAdam, lr=0.01, schedule=lm.cosine()).build(model, steps=20)
    train(model, optimizer, 5)
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    train(model, optimizer, 5)
    train(model2, optimizer2, 5)
    assert_equal(model, model2)


def test_a_guest_setting_that_is_not_per_group_cannot_vary():
    class Odd(torch.optim.SGD):
        def __init__(self, params, lr=0.1, temperature=1.0):
            super().__init__(params, lr=lr)

    plan = lm.Plan(Odd, lr=0.1, temperature=1.0, rules=[lm.Rule("2.*", temperature=2.0)])
    with pytest.raises(lm.HyperparameterError, match="temperature only for all parameters"):
        plan.build(small())


def test_a_guest_that_refuses_its_settings_is_named():
    with pytest.raises(lm.PlanError, match=r"NAdam refused its settings .*beta"):
        lm.Plan(torch.optim.NAdam, lr=0.1, betas=(2.0, 0.9)).build(small())


@pytest.mark.parametrize("wrong", [dict, nn.Linear, 3])
def test_what_is_not_an_optimizer_is_refused(wrong):
    with pytest.raises(lm.PlanError, match=r"expected a class such as lamina\.AdamW"):
        lm.Plan(wrong, lr=0.1)


@pytest.mark.parametrize("schedule", [None, lm.cosine(to=0.1)])
def test_a_guest_that_moves_a_value_of_the_plan_is_named(schedule):
    class Willful(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                group["momentum"] *= 0.5

    model = torch.nn.Linear(2, 2)
    optimizer = lm.Plan(Willful, lr=0.1, momentum=0.8, schedule=schedule).build(model, steps=9)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(
        lm.OwnershipError, match=r"third-party optimizer Willful set momentum=0\.4 .*0\.8"
    ):
        optimizer.step()
    assert optimizer.clock == 1
    assert optimizer.param_groups[0]["momentum"] == (0.4 if schedule is None else 0.8)


def test_a_guest_that_needs_a_closure_is_refused():
    with pytest.raises(lm.PlanError, match=r"LBFGS evaluates the loss by itself.*lamina\.LBFGS"):
        lm.Plan(torch.optim.LBFGS, lr=0.5).build(torch.nn.Linear(3, 1))


class Eager(torch.optim.Optimizer):
    """A guest that begins its state when it is built, with a count in its group, as some do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["seen"] = torch.zeros_like(param)

    def step(self):
        for group in self.param_groups:
            group["count"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    self.state[param]["seen"] += param.grad.abs()
                    param.data -= group["lr"] * param.grad


def mixed(guest, **rule):
    return lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("2.*", optimizer=guest, lr=0.1, **rule)])


def lacking(optimizer, lacks):
    """A state in which nothing is for the guest, and what to load it with."""
    state = copy.deepcopy(optimizer.state_dict())
    if lacks == "dropped":
        return state, {"renamed": {"2": None}}
    if lacks == "new":
        return lm.Plan(lm.SGD, lr=0.1).build(small()[:2]).state_dict(), {}
    if lacks == "empty":
        return state | {"state": {n: e if n < 2 else {} for n, e in state["state"].items()}}, {}
    other = mixed(torch.optim.RMSprop).build(twin := small())
    train(twin, other, 3)
    return other.state_dict(), {}


@pytest.mark.parametrize("guest", [Eager, torch.optim.Adagrad, torch.optim.NAdam])
@pytest.mark.parametrize("lacks", ["dropped", "new", "empty", "restarted"])
def test_a_guest_begins_anew_where_a_load_brings_nothing(guest, lacks):
    model, fresh = small(), small()
    optimizer, built = mixed(guest).build(model), mixed(guest).build(fresh)
    train(model, optimizer, 3)
    state, how = lacking(optimizer, lacks)
    words = {"new": "not in the state: 2.weight", "restarted": "another optimizer: 2.weight"}
    for _ in range(2):  # what it begins with is not moved by the steps
        said = (
            pytest.warns(lm.LaminaWarning, match=words[lacks]) if lacks in words else nullcontext()
        )
        with said:
            optimizer.load_state_dict(state, **how)
        for mine, theirs in zip(model[2].parameters(), fresh[2].parameters(), strict=True):
            found, expected = optimizer.state[mine], built.state[theirs]
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value))
        if guest is Eager and lacks != "empty":
            assert optimizer.param_groups[-1]["count"] == 0
        train(model, optimizer, 2)


UNLIKE = [
    {"lr": 0.5},
    {"thaw": 3, "rewarm": lm.warmup(3)},
    {"schedule": lm.cosine()},
]


@pytest.mark.parametrize("rule", UNLIKE)
def test_a_guest_that_wants_one_learning_rate_is_refused_others_at_build(rule):
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    plan = lm.Plan(prodigy, lr=1.0, rules=[lm.Rule("2.*", **rule)])
    with pytest.raises(lm.PlanError, match=r"Prodigy refuses groups whose learning rates differ"):
        plan.build(small(), steps=9)
    for kind in (torch.optim.NAdam, pytest.importorskip("schedulefree").SGDScheduleFree):
        lm.Plan(kind, lr=1.0, rules=[lm.Rule("2.*", **rule)]).build(small(), steps=9)


@pytest.mark.parametrize("rule", [{"thaw": 3}, {"freeze": 3}, {"frozen": True, "lr": 0.5}])
def test_a_guest_that_wants_one_learning_rate_takes_windows(rule):
    prodigy = pytest.importorskip("prodigyopt").Prodigy
    model = small()
    plan = lm.Plan(prodigy, lr=1.0, rules=[lm.Rule("2.*", **rule)])
    told = (
        pytest.warns(lm.LaminaWarning, match="lr-never-trains") if "lr" in rule else nullcontext()
    )
    with told:
        optimizer = plan.build(model, steps=9)
    train(model, optimizer, 9)
    assert optimizer.clock == 9


# ------------------------------------------------------ optimizers that are derived from lamina's


class Signed(lm.SGD):
    """Sign descent, with defaults of its own."""

    def __init__(self, params, lr=0.1, momentum=0.5):
        super().__init__(params, lr=lr, momentum=momentum)

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = param.grad.sign()
        return super().step(closure)


class Plain(lm.AdamW):
    pass


class Wrapped(lm.RMSprop):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    ("derived", "options"),
    [(Signed, {}), (Signed, {"momentum": 0.9}), (Plain, {}), (Wrapped, {"centered": True})],
)
def test_a_class_derived_from_laminas_does_in_a_plan_what_it_does_alone(derived, options):
    plan = lm.Plan(derived, lr=0.01, rules=[lm.Rule("2.*", lr=0.02)], **options)
    planned, alone = small(), small()
    mine = plan.build(planned)
    groups = [{"params": alone[0].parameters()}, {"params": alone[2].parameters(), "lr": 0.02}]
    theirs = derived(groups, lr=0.01, **options)
    train(planned, mine, 6)
    train(alone, theirs, 6)
    assert_equal(planned, alone)
    resumed = small()
    resumed.load_state_dict(planned.state_dict())
    again = plan.build(resumed, resume=copy.deepcopy(mine.state_dict()))
    for _ in range(2):
        train(planned, mine, 3)
        train(resumed, again, 3)
    assert_equal(planned, resumed)
    settings = {"lr", "momentum"} if derived is Signed else set(derived.algorithm.defaults)
    assert settings <= mine.param_groups[0].keys()
    for key in settings:
        assert mine.param_groups[0][key] == theirs.param_groups[0][key]


def test_a_class_derived_from_laminas_lbfgs_is_refused():
    class Search(lm.LBFGS):
        pass

    with pytest.raises(lm.PlanError, match=r"Search evaluates the loss by itself"):
        lm.Plan(Search, lr=0.5).build(small())


# ------------------------------------------------------------------------------ how they are built


class Handed(torch.optim.NAdam):
    def __init__(self, params, *args, temperature=2.0, **kwargs):
        super().__init__(params, *args, **kwargs)
        self.temperature = temperature


class Needy(torch.optim.Optimizer):
    def __init__(self, params, lr, rho):
        super().__init__(params, {"lr": lr, "rho": rho})

    def step(self, closure=None):
        pass


def test_arguments_that_are_handed_on_are_known():
    optimizer = lm.Plan(Handed, lr=0.1, betas=(0.5, 0.9)).build(small())
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert optimizer.param_groups[0]["momentum_decay"] == 4e-3
    assert optimizer.param_groups[0]["temperature"] == 2.0
    with pytest.raises(lm.HyperparameterError, match="it has lr, temperature, betas, eps"):
        lm.Plan(Handed, lr=0.1, beta=0.5).build(small())


def test_an_argument_without_a_default_must_be_given():
    with pytest.raises(lm.HyperparameterError, match=r"Needy has no default for rho; give it: rho"):
        lm.Plan(Needy, lr=0.1).build(small())
    assert lm.Plan(Needy, lr=0.1, rho=0.3).build(small()).param_groups[0]["rho"] == 0.3


@pytest.mark.parametrize("guest", [torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam])
def test_a_guest_is_built_with_the_first_values_of_its_schedules(guest):
    beta, lr = lm.linear(0.5, to=0.9, length=6), lm.linear(0.0, to=0.1, length=10)
    planned, alone = small(), small()
    mine = lm.Plan(guest, lr=lr, betas=(beta, 0.99)).build(planned, steps=10)
    theirs = guest(alone.parameters())
    generator, again = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for step in range(8):
        values = {"lr": lr(step), "betas": (0.5 + 0.4 * min(step / 6, 1), 0.99)}
        theirs.param_groups[0].update(values)
        for model, optimizer, noise in ((planned, mine, generator), (alone, theirs, again)):
            model(torch.randn(16, 4, generator=noise)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert mine.applied["default"]["betas"] == pytest.approx(values["betas"])
    for one, other in zip(planned.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Insists(torch.optim.SGD):
    """Refuses lr 0 when it is built, as Lion does."""

    def __init__(self, params, lr=0.1):
        assert 0 < lr <= 0.1
        super().__init__(params, lr=lr)


def test_a_guest_that_insists_on_a_learning_rate_gets_one():
    lr = lm.linear(0.0, to=0.1, length=10)
    optimizer = lm.Plan(Insists, lr=lr).build(small(), steps=10)
    assert optimizer.param_groups[0]["lr"] == 0.0


# ---------------------------------------------------------------------------------- when they fail


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise KeyError("no")


def untouched(model, optimizer, names):
    """Whether parts are as `small` begins them, with no update counted."""
    begun = dict(small().named_parameters())
    return all(
        torch.equal(param, begun[name]) and not float(optimizer.state[param].get("step", 0))
        for name, param in model.named_parameters()
        if name in names
    )


def test_a_guest_that_fails_leaves_the_others_as_they_were():
    rules = [
        lm.Rule("0.bias", optimizer=torch.optim.Adamax, lr=0.1),
        lm.Rule("2.*", optimizer=Failing, lr=0.1),
    ]
    model = small()
    optimizer = lm.Plan(lm.AdamW, lr=0.1, rules=rules).build(model)
    with pytest.raises(KeyError) as caught:
        train(model, optimizer, 1)
    [note] = caught.value.__notes__
    assert "third-party optimizer Failing" in note
    assert "Updated before it: Adamax; all other weights are as they were" in note
    assert untouched(model, optimizer, ["0.weight", "2.weight", "2.bias"])
    assert not untouched(model, optimizer, ["0.bias"])
    assert optimizer.clock == 0


def test_a_gradient_that_is_refused_leaves_guests_as_they_were():
    torch.manual_seed(0)
    model = nn.ModuleDict({"0": nn.Linear(2, 1), "e": nn.Embedding(4, 2, sparse=True)})
    rules = [lm.Rule("0", optimizer=torch.optim.NAdam, lr=0.1)]
    optimizer = lm.Plan(lm.Adam, lr=0.1, rules=rules).build(model)
    before = copy.deepcopy(model.state_dict())
    model["0"](model["e"](torch.tensor([1]))).sum().backward()
    with pytest.raises(lm.PlanError, match=r"'e\.weight'.*is sparse"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.usefixtures("without_numba")
def test_a_kernel_that_fails_says_what_was_updated(monkeypatch):
    from lamina.kernels import fused

    model = small()
    rules = [lm.Rule("2.*", optimizer=lm.RMSprop, lr=0.1)]
    optimizer = lm.Plan(lm.AdamW, lr=0.1, rules=rules).build(model)
    monkeypatch.setattr(fused.Fused, "run", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError) as caught:
        train(model, optimizer, 1)
    [note] = caught.value.__notes__
    assert "fused kernel failed on the groups 'default'" in note
    assert "Updated before them: none" in note
    assert untouched(model, optimizer, ["2.weight", "2.bias"])

"""Each drop-in scheduler against torch's: values over 1,000 steps, and states."""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as theirs

from lamina import optim
from lamina.optim import lr_scheduler as ours
from lamina.schedules import cyclic, noam, one_cycle, one_cycle_momentum

RATES = (1.0, 1e-2, 3e-5)
STEPS = 1000

pytestmark = pytest.mark.filterwarnings("ignore:.*eta_min:lamina.errors.LaminaWarning")


def optimizer_of(cls=torch.optim.SGD, **hyper):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in RATES]
    return cls(groups, lr=0.1, **({"momentum": 0.9} if cls.__name__ == "SGD" else {}) | hyper)


def moving(group):
    return [float(group["lr"]), group.get("momentum", 0.0), group.get("betas", (0.0,))[0]]


def advance(optimizer, schedulers, steps):
    for _ in range(steps):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def as_list(made):
    return made if isinstance(made, list) else [made]


def run(module, make, cls=torch.optim.SGD, steps=STEPS):
    """lr, momentum and beta1 of every group before each step."""
    optimizer = optimizer_of(cls)
    schedulers = as_list(make(module, optimizer))
    rows = []
    for _ in range(steps):
        rows.append([moving(group) for group in optimizer.param_groups])
        advance(optimizer, schedulers, 1)
    return np.array(rows)


class Decay:
    """A function with state, which torch saves."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, epoch):
        return self.rate**epoch


TABLE = {
    "LambdaLR": lambda m, o: m.LambdaLR(o, lambda e: 0.95 ** (e / 10)),
    "LambdaLR by group": lambda m, o: m.LambdaLR(
        o, [lambda e: 1.0, lambda e: math.cos(e) + 1, Decay(0.99)]
    ),
    "MultiplicativeLR": lambda m, o: m.MultiplicativeLR(o, lambda e: 0.999),
    "StepLR": lambda m, o: m.StepLR(o, 100, 0.5),
    "MultiStepLR": lambda m, o: m.MultiStepLR(o, [10, 300, 300, 700], 0.3),
    "ConstantLR": lambda m, o: m.ConstantLR(o, 0.25, 200),
    "ConstantLR by default": lambda m, o: m.ConstantLR(o),
    "LinearLR": lambda m, o: m.LinearLR(o, 0.1, 1.0, 500),
    "LinearLR by default": lambda m, o: m.LinearLR(o),
    "LinearLR down": lambda m, o: m.LinearLR(o, 1.0, 0.05, 900),
    "ExponentialLR": lambda m, o: m.ExponentialLR(o, 0.99),
    "PolynomialLR": lambda m, o: m.PolynomialLR(o, 1000, 2.0),
    "PolynomialLR by default": lambda m, o: m.PolynomialLR(o),
    "CosineAnnealingLR": lambda m, o: m.CosineAnnealingLR(o, 1000),
    "CosineAnnealingLR floor": lambda m, o: m.CosineAnnealingLR(o, 1000, 1e-6),
    "WarmRestarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 130),
    "WarmRestarts growing": lambda m, o: m.CosineAnnealingWarmRestarts(o, 100, 2, 1e-6),
    "OneCycleLR": lambda m, o: m.OneCycleLR(o, list(RATES), 1000),
    "OneCycleLR epochs": lambda m, o: m.OneCycleLR(
        o, list(RATES), epochs=10, steps_per_epoch=100, pct_start=0.1, base_momentum=[0.7, 0.8, 0.9]
    ),
    "OneCycleLR three": lambda m, o: m.OneCycleLR(
        o, list(RATES), 1000, three_phase=True, anneal_strategy="linear"
    ),
    "OneCycleLR at once": lambda m, o: m.OneCycleLR(o, list(RATES), 1000, pct_start=0.0),
    "CyclicLR": lambda m, o: m.CyclicLR(o, [0.1, 1e-3, 1e-6], list(RATES), 70, 130),
    "CyclicLR by default": lambda m, o: m.CyclicLR(o, 0.0, list(RATES)),
    "CyclicLR triangular2": lambda m, o: m.CyclicLR(o, 1e-6, list(RATES), 70, mode="triangular2"),
    "CyclicLR exp_range": lambda m, o: m.CyclicLR(
        o, 0.0, list(RATES), 70, mode="exp_range", gamma=0.999
    ),
    "CyclicLR own scale": lambda m, o: m.CyclicLR(
        o, 0.0, list(RATES), 70, scale_fn=lambda x: 1 / (1 + x), scale_mode="iterations"
    ),
    "on one optimizer": lambda m, o: [
        m.LinearLR(o, 0.1, 1.0, 50),
        m.CosineAnnealingLR(o, 1000, 1e-6),
        m.StepLR(o, 300),
    ],
    "five on one optimizer": lambda m, o: [
        m.ExponentialLR(o, 0.999),
        m.PolynomialLR(o, 1000),
        m.ConstantLR(o, 0.5, 20),
        m.MultiStepLR(o, [500]),
        m.MultiplicativeLR(o, lambda e: 0.9999),
    ],
    "ChainedScheduler": lambda m, o: m.ChainedScheduler(
        [m.LinearLR(o, 0.1, 1.0, 50), m.ExponentialLR(o, 0.999)]
    ),
    "SequentialLR": lambda m, o: m.SequentialLR(
        o, [m.LinearLR(o, 0.1, 1.0, 50), m.CosineAnnealingLR(o, 950)], [50]
    ),
    "SequentialLR of four": lambda m, o: m.SequentialLR(
        o,
        [
            m.ConstantLR(o, 0.1, 10),
            m.ExponentialLR(o, 0.9),
            m.StepLR(o, 100),
            m.CosineAnnealingWarmRestarts(o, 100),
        ],
        [20, 100, 500],
    ),
    "SequentialLR of others": lambda m, o: m.SequentialLR(
        o,
        [
            m.MultiplicativeLR(o, lambda e: 0.99),
            m.LambdaLR(o, lambda e: 0.9 ** (e / 100)),
            m.PolynomialLR(o, 400, 0.5),
        ],
        [20, 600],
    ),
}
every = pytest.mark.parametrize("name", TABLE)
single = pytest.mark.parametrize("name", [n for n in TABLE if "one optimizer" not in n])


@every
def test_equals_torch(name):
    wanted, got = run(theirs, TABLE[name]), run(ours, TABLE[name])
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [n for n in TABLE if n.startswith(("OneCycle", "Cyclic"))])
def test_moves_beta1_where_there_is_no_momentum(name):
    wanted, got = (run(m, TABLE[name], torch.optim.AdamW, 300) for m in (theirs, ours))
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=0)
    assert np.ptp(got[..., 2]) > 0  # it did move


@every
def test_drives_laminas_optimizers_as_torchs_do(name):
    wanted = run(theirs, TABLE[name], torch.optim.SGD, 50)
    np.testing.assert_allclose(run(ours, TABLE[name], optim.SGD, 50), wanted, rtol=1e-12)
    np.testing.assert_allclose(run(theirs, TABLE[name], optim.SGD, 50), wanted, rtol=1e-12)


@every
def test_saved_anywhere_it_goes_on_exactly(name):
    for place in (0, 1, 19, 20, 137, 500):
        first = optimizer_of()
        schedulers = as_list(TABLE[name](ours, first))
        advance(first, schedulers, place)
        # SequentialLR writes the groups when it is made: the optimizer is loaded after that
        second = optimizer_of()
        others = as_list(TABLE[name](ours, second))
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for scheduler, other in zip(schedulers, others, strict=True):
            other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
        second.step()
        for _ in range(40):
            assert list(map(moving, first.param_groups)) == list(map(moving, second.param_groups))
            advance(first, schedulers, 1)
            advance(second, others, 1)


@single
def test_states_have_torchs_keys_and_go_both_ways(name):
    wanted = TABLE[name](theirs, optimizer_of()).state_dict()
    optimizer = optimizer_of()
    scheduler = TABLE[name](ours, optimizer)
    assert set(scheduler.state_dict()) == set(wanted)
    advance(optimizer, [scheduler], 60)
    other = optimizer_of()
    torchs = TABLE[name](theirs, other)
    torchs.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    other.load_state_dict(optimizer.state_dict())
    other.step()
    advance(optimizer, [scheduler], 5)
    advance(other, [torchs], 5)
    got = [group["lr"] for group in other.param_groups]
    np.testing.assert_allclose(got, scheduler.get_last_lr(), rtol=1e-12)


@single
def test_any_step_can_be_asked_for(name):
    optimizer = optimizer_of()
    scheduler = TABLE[name](ours, optimizer)
    try:
        asked = [scheduler.at(step) for step in (0, 700, 3, 20, 19)]
    except ValueError:
        assert name == "SequentialLR of others"
        return
    before = scheduler.state_dict()
    rows = run(ours, TABLE[name])[..., 0]
    np.testing.assert_allclose(asked, rows[[0, 700, 3, 20, 19]], rtol=1e-12)
    assert scheduler.state_dict() == before


def test_every_name_and_argument_of_torch_is_there():
    for name in theirs.__all__:
        wanted = inspect.signature(getattr(theirs, name)).parameters
        got = inspect.signature(getattr(ours, name)).parameters
        assert list(got)[: len(wanted)] == list(wanted), name
        assert [*got][len(wanted) :] == ["verbose"], name
        for key, parameter in wanted.items():
            assert got[key].default == parameter.default, (name, key)


def test_trainers_recognise_them():
    assert all(issubclass(getattr(ours, name), theirs.LRScheduler) for name in ours.__all__)
    assert issubclass(ours.ReduceLROnPlateau, theirs.ReduceLROnPlateau)


def test_one_cycle_is_the_schedule_of_the_plan_tier():
    total, share = 1000, 0.3
    rows = run(ours, lambda m, o: m.OneCycleLR(o, list(RATES), total))
    places = {"pct_start": (share * total - 1) / (total - 1), "length": total - 1}
    factor, momentum = one_cycle(**places), one_cycle_momentum(**places)
    for index, peak in enumerate(RATES):
        np.testing.assert_allclose(rows[:, index, 0], peak * factor(np.arange(total)), rtol=1e-9)
        np.testing.assert_allclose(rows[:, index, 1], momentum(np.arange(total)), rtol=1e-12)


def test_cyclic_is_the_schedule_of_the_plan_tier():
    rows = run(ours, lambda m, o: m.CyclicLR(o, [lr / 4 for lr in RATES], list(RATES), 70, 30))
    for index, peak in enumerate(RATES):
        wanted = peak * cyclic(70, 0.25, 30)(np.arange(STEPS))
        np.testing.assert_allclose(rows[:, index, 0], wanted, rtol=1e-12)


def test_warmup_follows_its_formula_from_the_first_step():
    rows = run(ours, lambda m, o: ours.WarmupLR(o, 100))
    for step in (1, 2, 99, 100, 101, 1000):
        wanted = [lr * min(step**-0.5, step * 100**-1.5) for lr in RATES]
        np.testing.assert_allclose(rows[step - 1, :, 0], wanted, rtol=1e-12)
    np.testing.assert_allclose(rows[:, 0, 0], noam(1, 100)(np.arange(STEPS)), rtol=1e-12)


def test_linear_warmup_follows_its_formula_from_the_first_step():
    rows = run(ours, lambda m, o: ours.LinearWarmupLR(o, 100))
    wanted = np.minimum(1.0, np.arange(1, STEPS + 1) / 100)
    np.testing.assert_allclose(rows[:, 0, 0], wanted, rtol=1e-12)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
def test_plateau_equals_torch(mode, threshold_mode):
    metrics = np.random.default_rng(0).normal(1.0, 0.3, 300).cumsum() % 7 + 0.1
    rows = []
    for module in (theirs, ours):
        optimizer = optimizer_of()
        scheduler = module.ReduceLROnPlateau(
            optimizer,
            mode,
            0.7,
            patience=3,
            threshold=0.05,
            threshold_mode=threshold_mode,
            cooldown=2,
            min_lr=[0.1, 1e-4, 1e-6],
        )
        rows.append([])
        for metric in metrics:
            scheduler.step(metric)
            rows[-1].append(scheduler.get_last_lr())
    assert rows[0] == rows[1]
    assert set(scheduler.state_dict()) == set(theirs.ReduceLROnPlateau(optimizer_of()).state_dict())


def test_both_libraries_in_one_sequence():
    for first, second in ((ours, theirs), (theirs, ours)):
        for sequence in (ours, theirs):

            def make(_, o, first=first, second=second, sequence=sequence):
                parts = [first.LinearLR(o, 0.1, 1.0, 50), second.CosineAnnealingLR(o, 950)]
                return sequence.SequentialLR(o, parts, [50])

            wanted = run(theirs, TABLE["SequentialLR"])
            np.testing.assert_allclose(run(None, make), wanted, rtol=1e-12)


def test_a_scheduler_of_ones_own():
    class Halve(ours.LRScheduler):
        def get_lr(self):
            return [base * 0.5**self.last_epoch for base in self.base_lrs]

    optimizer = optimizer_of()
    scheduler = Halve(optimizer)
    advance(optimizer, [scheduler], 3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 1.0})
    advance(optimizer, [scheduler], 1)
    assert scheduler.get_last_lr() == [lr / 16 for lr in (*RATES, 8.0)]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    figure = ours.CosineAnnealingLR(optimizer_of(), 100).plot(path=tmp_path / "lr.png")
    lines = figure.axes[0].lines
    assert len(lines) == len(RATES)
    assert lines[0].get_data()[1][[0, -1]].tolist() == [1.0, 0.0]
    assert (tmp_path / "lr.png").exists()
    optimizer = optimizer_of()
    parts = [ours.LinearLR(optimizer), ours.CosineAnnealingLR(optimizer, 9)]
    sequence = ours.SequentialLR(optimizer, parts, [5])
    for name, scheduler in (("sequence", sequence), ("chain", ours.ChainedScheduler(parts))):
        scheduler.plot(str(tmp_path / f"{name}.png"))
        assert (tmp_path / f"{name}.png").exists()
    assert len(sequence.plot().axes[0].lines[0].get_xdata()) == 15
    with pytest.raises(ValueError, match="pass steps=20"):
        ours.StepLR(optimizer_of(), 10).plot(20)
    with pytest.raises(ValueError, match="depends on a metric"):
        ours.ReduceLROnPlateau(optimizer_of()).plot("lr.png")
    with pytest.raises(ValueError, match="pass steps="):
        ours.StepLR(optimizer_of(), 10).plot()


def test_copies_survive():
    optimizer = optimizer_of()
    scheduler = ours.StepLR(optimizer, 3)
    advance(optimizer, [scheduler], 4)
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    assert state == scheduler.state_dict()
    assert copy.deepcopy(scheduler).get_last_lr() == scheduler.get_last_lr()

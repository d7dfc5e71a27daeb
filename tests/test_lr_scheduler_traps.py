"""The pitfalls of learning rate schedules: the right result in both tiers."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as theirs

import lamina as lm
from lamina.errors import LaminaWarning, OwnershipError, ScheduleError
from lamina.optim import lr_scheduler as ours
from lamina.schedules import cosine, one_cycle, warm_restarts, warmup
from lamina.schedules.duration import Run


def optimizer_of(*rates, cls=torch.optim.SGD, **hyper):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates]
    return cls(groups, lr=0.1, **hyper)


def advance(optimizer, schedulers, steps):
    for _ in range(steps):
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def rates(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def planned(schedule, steps=100, **settings):
    """The learning rates of a two-part model under a plan: shape (steps, 2)."""
    model = nn.ModuleDict({"top": nn.Linear(2, 2), "low": nn.Linear(2, 2)})
    plan = lm.Plan(
        lm.SGD, lr=1e-3, schedule=schedule, rules=[lm.Rule("low.*", lr=1e-6)], **settings
    )
    resolved = lm.resolve_plan(plan, model, Run(steps))
    values = lm.values_at(resolved, np.arange(steps + 50))
    by_name = resolved.cell_of
    return np.stack([values.lr(by_name[f"{part}.weight"]) for part in ("top", "low")], axis=1)


# --- a group added after the scheduler exists -----------------------------------------------------

LATER = {
    "LambdaLR": lambda o: ours.LambdaLR(o, lambda e: 1 / (1 + e)),
    "MultiplicativeLR": lambda o: ours.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: ours.StepLR(o, 4),
    "MultiStepLR": lambda o: ours.MultiStepLR(o, [2, 7]),
    "ConstantLR": lambda o: ours.ConstantLR(o, 0.5, 8),
    "LinearLR": lambda o: ours.LinearLR(o, 0.1, 1.0, 10),
    "ExponentialLR": lambda o: ours.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: ours.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: ours.CosineAnnealingLR(o, 20),
    "WarmRestarts": lambda o: ours.CosineAnnealingWarmRestarts(o, 7),
    "WarmupLR": lambda o: ours.WarmupLR(o, 5),
    "LinearWarmupLR": lambda o: ours.LinearWarmupLR(o, 8),
    "OneCycleLR": lambda o: ours.OneCycleLR(o, 0.1, 20),
    "CyclicLR": lambda o: ours.CyclicLR(o, 0.025, 0.1, 7),
}


def add(optimizer, lr, **more):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": lr, **more})


@pytest.mark.parametrize("name", LATER)
def test_a_group_added_late_continues_from_its_lr(name):
    optimizer = optimizer_of(0.1, momentum=0.9)
    scheduler = LATER[name](optimizer)
    advance(optimizer, [scheduler], 6)
    add(optimizer, rates(optimizer)[0] / 10)
    for _ in range(9):
        advance(optimizer, [scheduler], 1)
        assert rates(optimizer)[1] == pytest.approx(rates(optimizer)[0] / 10, rel=1e-12)
    assert len(scheduler.get_last_lr()) == 2


@pytest.mark.parametrize("name", LATER)
def test_a_late_group_with_its_initial_lr_joins_the_curve(name):
    optimizer = optimizer_of(0.1, momentum=0.9)
    scheduler = LATER[name](optimizer)
    advance(optimizer, [scheduler], 6)
    initial = optimizer.param_groups[0]["initial_lr"]
    add(optimizer, 0.7, initial_lr=2 * initial)
    for _ in range(9):
        advance(optimizer, [scheduler], 1)
        assert rates(optimizer)[1] == pytest.approx(2 * rates(optimizer)[0], rel=1e-12)


def test_a_late_group_with_its_initial_lr_keeps_the_floor():
    for make in (
        lambda o: ours.CosineAnnealingLR(o, 20, 1e-3),
        lambda o: ours.CosineAnnealingWarmRestarts(o, 20, 1, 1e-3),
    ):
        optimizer = optimizer_of(0.1)
        scheduler = make(optimizer)
        advance(optimizer, [scheduler], 6)
        add(optimizer, 0.7, initial_lr=0.01)
        advance(optimizer, [scheduler], 1)
        wanted = 1e-3 + 0.009 * (1 + np.cos(np.pi * 7 / 20)) / 2
        assert rates(optimizer)[1] == pytest.approx(wanted, rel=1e-12)


def test_several_schedulers_share_a_late_group():
    optimizer = optimizer_of(0.1)
    schedulers = [ours.LinearLR(optimizer, 0.5, 1.0, 10), ours.ExponentialLR(optimizer, 0.9)]
    advance(optimizer, schedulers, 3)
    add(optimizer, 0.2)
    ratio = 0.2 / rates(optimizer)[0]
    advance(optimizer, schedulers, 4)
    assert rates(optimizer)[1] == pytest.approx(ratio * rates(optimizer)[0])


@pytest.mark.parametrize("place", [2, 3, 4, 6])
@pytest.mark.parametrize("composed", ["SequentialLR", "ChainedScheduler"])
def test_a_late_group_in_a_sequence_and_in_a_chain(composed, place):
    optimizer = optimizer_of(0.1)
    parts = [
        ours.LambdaLR(optimizer, lambda e: (e + 1) / 5),
        ours.CosineAnnealingWarmRestarts(optimizer, 5),
    ]
    more = {"milestones": [4]} if composed == "SequentialLR" else {}
    scheduler = getattr(ours, composed)(**more, schedulers=parts, optimizer=optimizer)
    advance(optimizer, [scheduler], place)
    add(optimizer, rates(optimizer)[0] / 10)
    for _ in range(12):
        advance(optimizer, [scheduler], 1)
        assert rates(optimizer)[1] == pytest.approx(rates(optimizer)[0] / 10)


def test_a_late_group_without_a_lambda_is_an_error_that_changes_nothing():
    optimizer = optimizer_of(0.1, 0.2)
    scheduler = ours.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 1.0])
    advance(optimizer, [scheduler], 1)
    add(optimizer, 0.3)
    with pytest.raises(ScheduleError, match="append one for it"):
        scheduler.step()
    assert (rates(optimizer), scheduler.last_epoch) == ([0.05, 0.2, 0.3], 1)
    scheduler.lr_lambdas.append(lambda e: 0.1**e)
    scheduler.step()
    assert rates(optimizer) == pytest.approx([0.025, 0.2, 0.03])


def test_a_plateau_takes_in_a_late_group():
    optimizer = optimizer_of(0.1, 0.2)
    scheduler = ours.ReduceLROnPlateau(optimizer, patience=0, min_lr=[0.05, 0.01])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.3})
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert rates(optimizer) == pytest.approx([0.05, 0.02, 0.03])


def test_a_plan_covers_all_parameters_from_the_start():
    optimizer = lm.Plan(lm.SGD, lr=0.1).build(nn.Linear(2, 2), steps=10)
    with pytest.raises(lm.PlanError, match="thaw="):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_groups_taken_away_are_an_error():
    optimizer = optimizer_of(0.1, 0.2)
    scheduler = ours.StepLR(optimizer, 1)
    optimizer.step()
    del optimizer.param_groups[1]
    with pytest.raises(ScheduleError, match="knows 2 groups"):
        scheduler.step()


# --- past the planned end -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (lambda o: ours.CosineAnnealingLR(o, 10), 0.0),
        (lambda o: ours.LinearLR(o, 1.0, 0.25, 10), 0.025),
        (lambda o: ours.PolynomialLR(o, 10), 0.0),
        (lambda o: ours.OneCycleLR(o, 0.1, 11, cycle_momentum=False), 0.1 / 25e4),
    ],
)
def test_a_scheduler_past_its_end_holds_its_last_lr(make, end):
    optimizer = optimizer_of(0.1)
    scheduler = make(optimizer)
    advance(optimizer, [scheduler], 10)
    for _ in range(30):
        assert rates(optimizer) == [pytest.approx(end, abs=1e-15)]
        advance(optimizer, [scheduler], 1)
    assert scheduler.at(1000) == rates(optimizer)


def test_a_planned_cosine_holds_its_end():
    assert (planned(cosine(to=0.1))[100:] == [1e-4, 1e-7]).all()


# --- absolute floors and peaks --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["CosineAnnealingLR", "CosineAnnealingWarmRestarts"])
def test_an_absolute_floor_that_levels_the_groups_warns_once(kind):
    optimizer = optimizer_of(1e-3, 1e-6)
    with pytest.warns(LaminaWarning, match=r"lamina\.(cosine|warm_restarts)") as caught:
        scheduler = getattr(ours, kind)(optimizer, 10, eta_min=1e-5)
    assert len(caught) == 1
    advance(optimizer, [scheduler], 9)
    assert rates(optimizer)[1] > 1e-6  # as in torch: the small group goes up


def test_an_absolute_floor_that_loses_nothing_does_not_warn():
    ours.CosineAnnealingLR(optimizer_of(1e-3, 1e-3), 10, eta_min=1e-5)
    scheduler = ours.CosineAnnealingLR(optimizer_of(1e-3, 1e-6), 10)
    assert scheduler.at(5) == pytest.approx([5e-4, 5e-7])


def test_a_planned_cosine_keeps_the_ratios_of_the_groups():
    lr = planned(cosine(to=0.01))
    np.testing.assert_allclose(lr[:, 0] / lr[:, 1], 1000)
    assert lr[-1].tolist() == pytest.approx([1e-5, 1e-8])


def test_one_peak_for_several_learning_rates_warns_once():
    optimizer = optimizer_of(1e-3, 1e-6, momentum=0.9)
    with pytest.warns(LaminaWarning, match=r"lamina\.one_cycle") as caught:
        scheduler = ours.OneCycleLR(optimizer, 1e-3, 10)
    assert len(caught) == 1
    advance(optimizer, [scheduler], 3)
    assert len(set(rates(optimizer))) == 1  # as in torch
    with pytest.warns(LaminaWarning, match=r"lamina\.cyclic") as caught:
        ours.CyclicLR(optimizer_of(1e-3, 1e-6, momentum=0.9), 1e-4, 1e-3)
    assert len(caught) == 1


def test_a_planned_one_cycle_keeps_the_peak_of_each_group():
    lr = planned(one_cycle())
    assert lr.max(axis=0).tolist() == [1e-3, 1e-6]


# --- a warmup before warm restarts ----------------------------------------------------------------


@pytest.mark.parametrize("warm_first", [True, False])
def test_a_warmup_chained_with_warm_restarts_has_an_effect(warm_first):
    optimizer = optimizer_of(0.1, 1e-4)
    makers = [
        lambda: ours.LinearLR(optimizer, 0.1, 1.0, 10),
        lambda: ours.CosineAnnealingWarmRestarts(optimizer, 8, 2),
    ]
    schedulers = [make() for make in (makers if warm_first else makers[::-1])]
    restarts = ours.CosineAnnealingWarmRestarts(optimizer_of(0.1, 1e-4), 8, 2)
    for step in range(60):
        wanted = [lr * min(1.0, 0.1 + 0.09 * step) for lr in restarts.at(step)]
        assert rates(optimizer) == pytest.approx(wanted, rel=1e-12)
        advance(optimizer, schedulers, 1)


def test_a_warmup_before_restarts_in_fractions_of_epochs():
    optimizer = optimizer_of(0.1)
    warm = ours.LinearLR(optimizer, 0.5, 1.0, 4)
    restarts = ours.CosineAnnealingWarmRestarts(optimizer, 5)
    alone = ours.CosineAnnealingWarmRestarts(optimizer_of(0.1), 5)
    optimizer.step()
    for tick in range(1, 60):
        restarts.step(tick / 4)
        alone.step(tick / 4)
        warm.step()
        assert rates(optimizer)[0] == pytest.approx(
            alone.get_last_lr()[0] * min(1.0, 0.5 + 0.125 * tick)
        )


def test_a_planned_warmup_before_warm_restarts():
    lr = planned(warmup(10) * warm_restarts(25))
    assert lr[5, 0] == pytest.approx(0.5e-3 * (1 + np.cos(np.pi * 5 / 25)) / 2)
    assert lr[25].tolist() == [1e-3, 1e-6]
    assert planned(warmup(10) >> warm_restarts(25))[[5, 10, 35], 0].tolist() == [5e-4, 1e-3, 1e-3]


# --- phase two after a manual edit ----------------------------------------------------------------


def test_a_second_scheduler_begins_from_the_edited_lr():
    optimizer = optimizer_of(0.1, 0.2)
    advance(optimizer, [ours.ExponentialLR(optimizer, 0.9)], 5)
    optimizer.param_groups[0]["lr"] = 0.01
    second = ours.LambdaLR(optimizer, lambda e: 0.5**e)
    assert second.base_lrs == [0.01, 0.2]
    advance(optimizer, [second], 2)
    assert rates(optimizer) == [0.0025, 0.05]


def test_without_an_edit_the_initial_lr_stays_the_base_as_in_torch():
    optimizer = optimizer_of(0.1)
    advance(optimizer, [ours.ExponentialLR(optimizer, 0.9)], 5)
    assert ours.LambdaLR(optimizer, lambda e: 1.0).base_lrs == [0.1]


def test_under_a_plan_an_edit_is_an_error_and_an_override_lasts():
    model = nn.Linear(2, 2)
    optimizer = lm.Plan(lm.SGD, lr=0.1, schedule=cosine()).build(model, steps=10)
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(OwnershipError, match="override"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.override(lr=0.01)
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(5):
        optimizer.step()
    assert rates(optimizer) == [pytest.approx(0.005)]


# --- resume with a longer run ---------------------------------------------------------------------


def test_a_scheduler_of_another_length_keeps_it_and_says_so():
    first = optimizer_of(0.1)
    scheduler = ours.CosineAnnealingLR(first, 100)
    advance(first, [scheduler], 50)
    second = optimizer_of(0.1)
    longer = ours.CosineAnnealingLR(second, 200)
    second.load_state_dict(first.state_dict())
    with pytest.warns(LaminaWarning, match=r"T_max=200 \(saved: 100\)"):
        longer.load_state_dict(scheduler.state_dict())
    second.step()
    for step in range(51, 210):
        longer.step()
        assert rates(second) == [pytest.approx(longer.at(step)[0], rel=1e-12)]
    assert rates(second) == [0.0]


def test_another_length_with_a_warmup_beside_it():
    def make(length):
        optimizer = optimizer_of(0.1)
        parts = [ours.LinearLR(optimizer, 0.1, 1.0, 80), ours.PolynomialLR(optimizer, length)]
        return optimizer, parts

    first, parts = make(100)
    advance(first, parts, 50)
    second, others = make(200)
    second.load_state_dict(first.state_dict())
    others[0].load_state_dict(parts[0].state_dict())
    with pytest.warns(LaminaWarning, match="total_iters=200"):
        others[1].load_state_dict(parts[1].state_dict())
    second.step()
    whole, alone = make(200)
    advance(whole, alone, 50)
    for _ in range(60):
        advance(second, others, 1)
        advance(whole, alone, 1)
        assert rates(second) == pytest.approx(rates(whole))


def test_restarts_of_another_length_find_their_place():
    first = optimizer_of(0.1)
    scheduler = ours.CosineAnnealingWarmRestarts(first, 10)
    advance(first, [scheduler], 25)
    second = optimizer_of(0.1)
    other = ours.CosineAnnealingWarmRestarts(second, 40)
    second.load_state_dict(first.state_dict())
    with pytest.warns(LaminaWarning, match="T_0=40"):
        other.load_state_dict(scheduler.state_dict())
    second.step()
    other.step()
    assert rates(second) == pytest.approx(other.at(26))


def test_a_planned_run_resumes_at_another_length():
    model = nn.Linear(2, 2)
    plan = lm.Plan(lm.SGD, lr=0.1, schedule=cosine())
    first = plan.build(model, steps=100)
    model(torch.ones(1, 2)).sum().backward()
    for _ in range(50):
        first.step()
    longer = plan.build(model, steps=200)
    longer.load_state_dict(first.state_dict())
    assert rates(longer) == [pytest.approx(0.1 * cosine(length=200)(50))]


# --- a sequence rebuilt in the middle -------------------------------------------------------------


@pytest.mark.parametrize("last_epoch", [0, 3, 4, 5, 12])
@pytest.mark.parametrize("module", [ours, theirs])
def test_a_sequence_rebuilt_at_an_epoch_has_its_lr(last_epoch, module):
    def make(optimizer, **where):
        parts = [
            module.ConstantLR(optimizer, 0.5, 3),
            module.ExponentialLR(optimizer, 0.9),
            module.CosineAnnealingWarmRestarts(optimizer, 3),
        ]
        return ours.SequentialLR(optimizer, parts, [4, 9], **where)

    first = optimizer_of(0.1)
    scheduler = make(first)
    advance(first, [scheduler], last_epoch + 1)
    second = optimizer_of(0.1)
    rebuilt = make(second, last_epoch=last_epoch)
    second.step()
    for _ in range(8):
        assert rates(second) == pytest.approx(rates(first), rel=1e-12)
        assert rebuilt.last_epoch == scheduler.last_epoch
        advance(first, [scheduler], 1)
        advance(second, [rebuilt], 1)


REBUILT = [n for n in LATER if n not in ("OneCycleLR", "CyclicLR", "MultiplicativeLR")]


@pytest.mark.parametrize("name", REBUILT)
def test_a_scheduler_rebuilt_at_an_epoch_has_its_lr(name):
    optimizer = optimizer_of(0.1)
    optimizer.param_groups[0]["initial_lr"] = 0.1
    made = LATER[name]
    scheduler = {
        "LambdaLR": lambda: ours.LambdaLR(optimizer, lambda e: 1 / (1 + e), 5),
        "StepLR": lambda: ours.StepLR(optimizer, 4, last_epoch=5),
        "MultiStepLR": lambda: ours.MultiStepLR(optimizer, [2, 7], last_epoch=5),
        "ConstantLR": lambda: ours.ConstantLR(optimizer, 0.5, 8, 5),
        "LinearLR": lambda: ours.LinearLR(optimizer, 0.1, 1.0, 10, 5),
        "ExponentialLR": lambda: ours.ExponentialLR(optimizer, 0.9, 5),
        "PolynomialLR": lambda: ours.PolynomialLR(optimizer, 20, last_epoch=5),
        "CosineAnnealingLR": lambda: ours.CosineAnnealingLR(optimizer, 20, last_epoch=5),
        "WarmRestarts": lambda: ours.CosineAnnealingWarmRestarts(optimizer, 7, last_epoch=5),
        "WarmupLR": lambda: ours.WarmupLR(optimizer, 5, 5),
        "LinearWarmupLR": lambda: ours.LinearWarmupLR(optimizer, 8, 5),
    }[name]()
    assert scheduler.last_epoch == 6
    assert rates(optimizer) == pytest.approx(made(optimizer_of(0.1)).at(6))


def test_a_loaded_lr_is_not_moved_when_the_scheduler_is_made():
    optimizer = optimizer_of(0.1)
    scheduler = ours.StepLR(optimizer, 3)
    advance(optimizer, [scheduler], 6)
    other = optimizer_of(0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours.StepLR(other, 3, last_epoch=5)
    assert rates(other) == rates(optimizer) == [pytest.approx(1e-3)]


def test_a_planned_lr_is_a_function_of_the_step():
    schedule = warmup(5) >> cosine()
    assert schedule(7, run=Run(20)) == schedule(np.arange(20), run=Run(20))[7]


# --- one tensor for two groups --------------------------------------------------------------------


def test_groups_do_not_share_a_tensor_lr():
    groups = [{"params": [nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.1))
    scheduler = ours.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 1.0])
    kept = [group["lr"] for group in optimizer.param_groups]
    advance(optimizer, [scheduler], 2)
    assert rates(optimizer) == pytest.approx([0.025, 0.1])
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, kept, strict=True))
    assert scheduler.get_last_lr()[0] is not optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", LATER)
def test_tensors_follow_the_same_curve(name):
    plain = optimizer_of(0.1, momentum=0.9)
    group = {"params": [nn.Parameter(torch.ones(2))], "lr": torch.tensor(0.1)}
    tensors = torch.optim.SGD([group], lr=0.1, momentum=0.9)
    pair = LATER[name](plain), LATER[name](tensors)
    for _ in range(25):
        assert rates(tensors) == pytest.approx(rates(plain), rel=1e-5, abs=1e-9)
        advance(plain, [pair[0]], 1)
        advance(tensors, [pair[1]], 1)


def test_planned_values_are_floats():
    optimizer = lm.Plan(lm.Adam, lr=0.1, schedule=cosine()).build(nn.Linear(2, 2), steps=10)
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)


# --- tiny learning rates --------------------------------------------------------------------------


def test_a_plateau_scheduler_lowers_tiny_learning_rates():
    optimizer = optimizer_of(1e-3, 1e-9)
    scheduler = ours.ReduceLROnPlateau(optimizer, patience=0)
    scheduler.step(1.0)
    scheduler.step(1.0)
    assert rates(optimizer) == pytest.approx([1e-4, 1e-10])
    exact = ours.ReduceLROnPlateau(optimizer, patience=0, eps=1e-6)
    exact.step(1.0)
    exact.step(1.0)
    assert rates(optimizer) == pytest.approx([1e-5, 1e-10])  # an eps of one's own is absolute


# --- reports and order ----------------------------------------------------------------------------


def test_each_change_is_one_line(caplog):
    optimizer = optimizer_of(0.1, 0.2)
    optimizer.param_groups[1]["name"] = "head"
    scheduler = ours.StepLR(optimizer, 2, 0.5, verbose=True)
    quiet = ours.ConstantLR(optimizer, 1.0, 1)
    plateau = ours.ReduceLROnPlateau(optimizer, patience=0, verbose=True)
    with caplog.at_level(logging.INFO, logger="lamina"):
        advance(optimizer, [scheduler, quiet], 3)
        assert caplog.messages == [
            "StepLR: group 0 (unnamed): lr 0.05",
            "StepLR: group 1 (head): lr 0.1",
        ]
        caplog.clear()
        plateau.step(1.0)
        plateau.step(1.0)
    assert caplog.messages[1] == "ReduceLROnPlateau: group 1 (head): lr 0.01"


def test_a_step_before_the_optimizers_warns_once():
    scheduler = ours.StepLR(optimizer_of(0.1), 2)
    with pytest.warns(LaminaWarning, match="call optimizer.step"):
        scheduler.step()
    scheduler.step()
    assert scheduler.last_epoch == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda o: ours.LinearLR(o, start_factor=0),
        lambda o: ours.LinearLR(o, end_factor=2.0),
        lambda o: ours.ConstantLR(o, factor=-1),
        lambda o: ours.StepLR(o, 0),
        lambda o: ours.StepLR(o, 2.5),
        lambda o: ours.MultiStepLR(o, [-1]),
        lambda o: ours.ExponentialLR(o, -0.5),
        lambda o: ours.CosineAnnealingLR(o, 0),
        lambda o: ours.CosineAnnealingWarmRestarts(o, 0),
        lambda o: ours.CosineAnnealingWarmRestarts(o, 5, 0),
        lambda o: ours.OneCycleLR(o, 0.1),
        lambda o: ours.OneCycleLR(o, 0.1, 0),
        lambda o: ours.OneCycleLR(o, [0.1, 0.2], 10),
        lambda o: ours.OneCycleLR(o, 0.1, 10, pct_start=1.5),
        lambda o: ours.OneCycleLR(o, 0.1, 10, anneal_strategy="sine"),
        lambda o: ours.CyclicLR(o, 0.1, 0.2, 0),
        lambda o: ours.CyclicLR(o, 0.1, 0.2, mode="square"),
        lambda o: ours.SequentialLR(o, [], []),
        lambda o: ours.SequentialLR(o, [ours.StepLR(o, 1)], [3]),
        lambda o: ours.ChainedScheduler([]),
        lambda o: ours.ChainedScheduler([ours.ReduceLROnPlateau(o)]),
        lambda o: ours.ChainedScheduler([ours.StepLR(o, 1), ours.StepLR(optimizer_of(1.0), 1)]),
        lambda o: ours.LambdaLR(o, [abs, abs]),
        lambda o: ours.WarmupLR(o, 0),
        lambda o: ours.LinearWarmupLR(o, 2.5),
        lambda o: ours.ReduceLROnPlateau(o, factor=1.5),
        lambda o: ours.ReduceLROnPlateau(o).at(3),
    ],
)
def test_bad_arguments_are_errors_at_the_call(make):
    optimizer = optimizer_of(0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"\w"):
        make(optimizer)


def test_what_has_no_momentum_says_so():
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.ones(1))])
    with pytest.raises(ScheduleError, match="cycle_momentum=False"):
        ours.OneCycleLR(optimizer, 0.1, 10)
    with pytest.raises(TypeError, match="Linear"):
        ours.StepLR(nn.Linear(1, 1), 3)


def test_fractional_lengths_follow_the_formula():
    optimizer = optimizer_of(0.1)
    scheduler = ours.CosineAnnealingLR(optimizer, 10.5)
    other = theirs.CosineAnnealingLR(optimizer_of(0.1), 10.5)
    advance(optimizer, [scheduler], 10)
    assert scheduler.at(10)[0] == pytest.approx(rates(optimizer)[0], rel=1e-12)
    other.last_epoch = 10
    assert other._get_closed_form_lr() == pytest.approx(rates(optimizer), rel=1e-12)

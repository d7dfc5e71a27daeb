"""Schedulers read back into schedules: the same lr, and the same momentum, at every step."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.optim import lr_scheduler

import lamina as lm
from lamina.optim import lr_scheduler as drop_ins

STEPS = 20


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def built(model, kind=torch.optim.SGD, rates=(1e-3, 1e-5)):
    parts = (model[0], model[2])
    groups = [
        {"params": list(m.parameters()), "lr": lr} for m, lr in zip(parts, rates, strict=True)
    ]
    return kind(groups, momentum=0.9) if kind is torch.optim.SGD else kind(groups)


def in_turn(o, *parts):
    """`SequentialLR` of (scheduler, steps) pairs, the last without steps."""
    milestones, at = [], 0
    for _, steps in parts[:-1]:
        milestones.append(at := at + steps)
    return lr_scheduler.SequentialLR(o, [part for part, _ in parts], milestones)


S = lr_scheduler
SCHEDULERS = {
    "step": lambda o: S.StepLR(o, 3, gamma=0.5),
    "multi_step": lambda o: S.MultiStepLR(o, [2, 5, 5], gamma=0.5),
    "multi_step at once": lambda o: S.MultiStepLR(o, [0, 5], gamma=0.5),
    "exponential": lambda o: S.ExponentialLR(o, 0.9),
    "constant": lambda o: S.ConstantLR(o, 0.25, total_iters=4),
    "linear up": lambda o: S.LinearLR(o, 0.1, total_iters=4),
    "linear down": lambda o: S.LinearLR(o, 1.0, 0.2, total_iters=4),
    "linear, below 1": lambda o: S.LinearLR(o, 0.3, 0.5, total_iters=4),
    "linear down, below 1": lambda o: S.LinearLR(o, 0.5, 0.0, total_iters=4),
    "polynomial": lambda o: S.PolynomialLR(o, total_iters=8, power=2.0),
    "polynomial of nothing": lambda o: S.PolynomialLR(o, total_iters=0),
    "cosine": lambda o: S.CosineAnnealingLR(o, T_max=STEPS),
    "cosine to a floor": lambda o: S.CosineAnnealingLR(o, T_max=STEPS, eta_min=5e-5),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3, 2, eta_min=1e-6),
    "one cycle": lambda o: S.OneCycleLR(o, 0.1, total_steps=STEPS),
    "one cycle, peaks": lambda o: S.OneCycleLR(
        o, [0.1, 0.01], total_steps=STEPS, pct_start=0.4, div_factor=10.0, final_div_factor=7.0
    ),
    "one cycle, lines": lambda o: S.OneCycleLR(
        o, [0.1, 0.01], total_steps=STEPS, three_phase=True, anneal_strategy="linear"
    ),
    "one cycle, no momentum": lambda o: S.OneCycleLR(
        o, 0.1, total_steps=STEPS, cycle_momentum=False
    ),
    "cyclic": lambda o: S.CyclicLR(o, [1e-4, 1e-5], [1e-3, 2e-3], 3),
    "cyclic, smaller": lambda o: S.CyclicLR(o, 1e-4, 1e-3, 3, 2, mode="triangular2"),
    "cyclic, decaying": lambda o: S.CyclicLR(o, 1e-4, 1e-3, 7, mode="exp_range", gamma=0.9),
    "in turn": lambda o: in_turn(
        o, (S.LinearLR(o, 0.1, total_iters=4), 4), (S.CosineAnnealingLR(o, STEPS - 4), 0)
    ),
    "in turn, held": lambda o: in_turn(
        o,
        (S.ConstantLR(o, 0.1, total_iters=2), 5),
        (S.ExponentialLR(o, 0.9), 6),
        (S.StepLR(o, 2), 0),
    ),
    "in turn, to a floor": lambda o: in_turn(
        o,
        (S.LinearLR(o, 0.01, total_iters=4), 4),
        (S.CosineAnnealingWarmRestarts(o, 4, eta_min=1e-6), 0),
    ),
    "chained": lambda o: S.ChainedScheduler(
        [S.LinearLR(o, 0.1, total_iters=4), S.ExponentialLR(o, 0.9), S.StepLR(o, 6)], o
    ),
    "drop-in": lambda o: drop_ins.MultiStepLR(o, [2, 5], gamma=0.5),
    "drop-in one cycle": lambda o: drop_ins.OneCycleLR(o, [0.1, 0.2], total_steps=STEPS),
    "drop-ins in turn": lambda o: drop_ins.SequentialLR(
        o, [drop_ins.LinearLR(o, 0.1, total_iters=4), drop_ins.ExponentialLR(o, 0.9)], [4]
    ),
    "hf linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 4, STEPS),
    "hf cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 4, STEPS),
    "hf cosine to a floor": lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(
        o, 4, STEPS, min_lr_rate=0.1
    ),
    "hf constant": lambda o: transformers.get_constant_schedule_with_warmup(o, 4),
    "hf constant alone": lambda o: transformers.get_constant_schedule(o),
    "hf restarts": lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        o, 4, STEPS - 2, num_cycles=3
    ),
    "hf polynomial": lambda o: transformers.get_polynomial_decay_schedule_with_warmup(
        o, 4, STEPS - 2, lr_end=1e-4, power=2.0
    ),
    "hf inverse sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, 4),
    "hf wsd": lambda o: transformers.get_wsd_schedule(
        o, 4, 6, num_stable_steps=5, min_lr_ratio=0.1
    ),
    "hf wsd, lines": lambda o: transformers.get_wsd_schedule(
        o, 4, 6, num_training_steps=STEPS, decay_type="1-sqrt"
    ),
}


def read(model, optimizer, scheduler):
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.LaminaWarning)
        return lm.Plan.from_optimizer(model, optimizer, scheduler)


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")  # what the drop-ins say of their floors
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_known_schedulers(name, kind):
    """Read at the beginning and in the middle of the run, the plan is the same."""
    model = network()
    optimizer = built(model, kind)
    scheduler = SCHEDULERS[name](optimizer)
    plans, courses = [], []
    for step in range(STEPS):
        if step in (0, 3, 11):
            plans.append(read(model, optimizer, scheduler))
        courses.append([dict(group) for group in optimizer.param_groups])
        optimizer.step()
        if step < STEPS - 1:
            scheduler.step()
    assert plans[0] == plans[1] == plans[2] == lm.Plan.from_toml(plans[0].to_toml())
    ours = plans[0].build(model, steps=STEPS)
    places = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
    for step in range(STEPS):
        values = lm.values_at(ours.resolved, step)
        for index, group in enumerate(ours.param_groups):
            wanted = courses[step][places[id(group["params"][0])]]
            close = partial(pytest.approx, rel=1e-9, abs=1e-15)
            assert values.lr(index) == close(float(wanted["lr"])), (name, step)
            for key in {"momentum", "betas"} & wanted.keys():
                assert values.hyper(index)[key] == close(wanted[key]), (name, step)


def assert_left_out(make, words, rates=(1e-3, 1e-5)):
    model = network()
    optimizer = built(model, rates=rates)
    scheduler = make(optimizer)
    with pytest.warns(lm.LaminaWarning, match=words):
        plan = lm.Plan.from_optimizer(model, optimizer, scheduler)
    assert "schedule" not in dict(plan.settings)
    assert not any("schedule" in dict(rule.settings) for rule in plan.rules)


def _get_linear_schedule_with_warmup_lr_lambda(step, *, num_warmup_steps, num_training_steps):
    return 0.5  # the name of one of Transformers', and another function


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: S.LambdaLR(o, lambda step: 1.0), "the LambdaLR, whose function"),
        (
            lambda o: S.LambdaLR(
                o,
                partial(
                    _get_linear_schedule_with_warmup_lr_lambda,
                    num_warmup_steps=2,
                    num_training_steps=9,
                ),
            ),
            "the LambdaLR, whose function",
        ),
        (
            lambda o: transformers.get_cosine_schedule_with_warmup(o, 4, STEPS, num_cycles=2),
            "num_cycles",
        ),
        (lambda o: S.MultiplicativeLR(o, lambda step: 0.9), "the MultiplicativeLR"),
        (lambda o: S.ReduceLROnPlateau(o), "add plateau"),
        (lambda o: torch.optim.swa_utils.SWALR(o, 0.05), "the SWALR, which goes on"),
        (lambda o: S.LinearLR(o, 0.5, total_iters=0), "the LinearLR over 0 steps"),
        (lambda o: S.ConstantLR(o, 0.5, total_iters=0), "the ConstantLR over 0 steps"),
        (lambda o: S.ExponentialLR(o, -0.5), "the ExponentialLR: .*-0.5"),
        (lambda o: S.CyclicLR(o, 1e-4, 1e-3, scale_fn=lambda x: 0.5), "scale_fn"),
        (lambda o: S.OneCycleLR(o, 0.1, total_steps=2, pct_start=0.3), "too short"),
        (
            lambda o: in_turn(o, (S.CosineAnnealingLR(o, 8), 5), (S.ExponentialLR(o, 0.9), 0)),
            "cuts cosine",
        ),
        (
            lambda o: S.ChainedScheduler([S.ExponentialLR(o, 0.9), S.LambdaLR(o, lambda s: 1.0)]),
            "with LambdaLR, which does not multiply",
        ),
        (
            lambda o: S.ChainedScheduler([S.CosineAnnealingLR(o, 9, eta_min=1e-6)]),
            "with CosineAnnealingLR, which does not multiply",
        ),
        (
            lambda o: in_turn(o, (S.ExponentialLR(o, 0.9), 5), (S.OneCycleLR(o, 0.1, 9), 0)),
            "with OneCycleLR, which sets lrs of its own",
        ),
    ],
)
def test_what_cannot_be_expressed_is_said(make, words):
    assert_left_out(make, words)


def test_a_floor_above_a_rate_of_0_is_said():
    assert_left_out(
        lambda o: S.CosineAnnealingLR(o, 9, eta_min=1e-6), "from lr=0", rates=(1e-3, 0.0)
    )


def test_a_scheduler_of_another_optimizer_is_refused():
    model = network()
    with pytest.raises(lm.PlanError, match="the StepLR belongs to another optimizer"):
        lm.Plan.from_optimizer(model, built(model), S.StepLR(built(model), 3))
    with pytest.raises(lm.PlanError, match="scheduler=str object"):
        lm.Plan.from_optimizer(model, built(model), "cosine")


def test_a_group_that_came_after_the_scheduler_is_said():
    model = network()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    scheduler = S.StepLR(optimizer, 3)
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.5})
    with pytest.warns(lm.LaminaWarning, match="made for 1 groups, while the optimizer has 2"):
        lm.Plan.from_optimizer(model, optimizer, scheduler)


def test_a_rate_edited_under_the_scheduler_is_said():
    model = network()
    optimizer = built(model)
    scheduler = S.StepLR(optimizer, 3)
    optimizer.step()
    scheduler.step()
    optimizer.param_groups[1]["lr"] = 0.7
    with pytest.warns(lm.LaminaWarning, match=r"beside the schedule now: lr=0.7 instead of 1e-05"):
        lm.Plan.from_optimizer(model, optimizer, scheduler)


def test_a_scheduler_that_was_not_given_is_missed():
    model = network()
    optimizer = built(model)
    scheduler = S.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    with pytest.warns(lm.LaminaWarning, match="scheduler that has moved its lr"):
        plan = lm.Plan.from_optimizer(model, optimizer)
    assert dict(plan.settings)["lr"] in (5e-4, 5e-6)

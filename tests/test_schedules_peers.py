"""The schedules of Transformers, each as one line of a plan."""

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.schedules import (
    constant,
    cosine,
    inverse_sqrt,
    linear,
    one_minus_sqrt,
    polynomial,
    warm_restarts,
    warmup,
    wsd,
)
from lamina.schedules.duration import Run

get_scheduler = pytest.importorskip("transformers").get_scheduler
STEPS, WARM, LR = 1000, 77, 1e-3


def theirs(name, warm=WARM, **kwargs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR)
    scheduler = get_scheduler(name, optimizer, warm, STEPS, kwargs or None)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


@pytest.mark.parametrize(
    ("name", "kwargs", "schedule"),
    [
        ("constant", {}, constant()),
        ("constant_with_warmup", {}, warmup(WARM)),
        ("linear", {}, warmup(WARM) >> linear()),
        ("cosine", {}, warmup(WARM) >> cosine()),
        ("cosine_with_restarts", {"num_cycles": 3}, warmup(WARM) >> warm_restarts(cycles=3)),
        ("cosine_with_min_lr", {"min_lr": 1e-4}, warmup(WARM) >> cosine(to=0.1)),
        (
            "polynomial",
            {"power": 2.0, "lr_end": 1e-5},
            warmup(WARM) >> polynomial(2.0, to=0.01),
        ),
        ("inverse_sqrt", {}, inverse_sqrt(WARM)),
        ("inverse_sqrt", {"timescale": 500}, inverse_sqrt(WARM, timescale=500)),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 200},
            wsd(WARM, cosine(length=200)),
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 200, "decay_type": "linear", "min_lr_ratio": 0.0},
            wsd(WARM, 200),
        ),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 200, "decay_type": "1-sqrt"},
            wsd(WARM, one_minus_sqrt(length=200)),
        ),
    ],
)
def test_one_line_of_a_plan(name, kwargs, schedule):
    plan = lm.Plan(lm.AdamW, lr=LR, schedule=schedule)
    resolved = lm.resolve_plan(plan, nn.Linear(2, 2), Run(STEPS))
    ours = lm.values_at(resolved, np.arange(STEPS + 1)).lr(0)
    wanted = theirs(name, **kwargs)
    np.testing.assert_allclose(ours, wanted, rtol=1e-12, atol=LR * 1e-15)

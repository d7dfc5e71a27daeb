"""What a preview says of reactions: the earliest step at which early stopping may end a run."""

import re

import pytest
import torch
from torch import nn

import lamina as lm


def plan(**stop):
    rules = stop.pop("rules", [])
    feedback = stop.pop("feedback", None)
    stop = lm.early_stop("val_loss", **stop)
    return lm.Plan("SGD", lr=0.1, stop=stop, feedback=feedback, rules=rules)


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))


def said(preview):
    """The step that the preview states."""
    text = " ".join(preview.text(width=100).split())
    found = re.search(r"may stop the run after step ([\d,]+) \(epoch", text)
    return None if found is None else int(found[1].replace(",", ""))


def stopped(optimizer, net, every, steps):
    """The step after which the optimizer says so, if the metric never improves."""
    while optimizer.clock < steps:
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.clock % every == 0:
            optimizer.report(val_loss=1.0)
        if optimizer.should_stop:
            return optimizer.clock
    return None


THAW = [lm.Rule("0.*", thaw=21)]
LATER = [lm.Rule("0.*", thaw=lm.on_plateau("val_loss", patience=1))]
CASES = [
    ({"patience": 2}, 15),
    ({"patience": "3 epochs"}, 20),
    ({"patience": "7 steps"}, 15),
    ({"patience": 2, "rules": THAW}, 35),
    ({"patience": 2, "rules": LATER}, 30),
    ({"patience": 9}, None),
]


@pytest.mark.parametrize(("stop", "step"), CASES)
def test_the_step_is_the_one_at_which_a_run_stops(stop, step):
    net = model()
    run = {"epochs": 8, "steps_per_epoch": 5}
    assert said(plan(**stop).preview(net, **run)) == step
    assert stopped(plan(**stop).build(net, **run), net, 5, 40) == step


def test_a_plateau_may_only_make_it_later():
    feedback = lm.plateau("val_loss", patience=0)
    preview = plan(patience=2, feedback=feedback).preview(model(), epochs=8, steps_per_epoch=5)
    assert said(preview) == 15
    net = model()
    optimizer = plan(patience=2, feedback=feedback).build(net, epochs=8, steps_per_epoch=5)
    assert stopped(optimizer, net, 5, 40) > 15


def test_a_resumed_run_counts_what_was_reported():
    net = model()
    run = {"epochs": 8, "steps_per_epoch": 5}
    optimizer = plan(patience=2).build(net, **run)
    assert stopped(optimizer, net, 5, 12) is None
    state = optimizer.state_dict()
    assert said(plan(patience=2).preview(net, **run, resume=state)) == 15
    assert said(plan(patience=3).preview(net, **run, resume=state)) == 20
    stopped(optimizer, net, 5, 40)
    ended = str(plan(patience=2).preview(net, **run, resume=optimizer.state_dict()))
    assert "the saved run was to stop" in ended


@pytest.mark.parametrize(
    ("stop", "run", "text"),
    [
        ({"patience": 2}, {"steps": 9}, "may stop the run at report 3 of val_loss at the earliest"),
        ({"patience": "20%"}, {"steps": 10}, "may stop the run 2 steps after the first report"),
        ({"patience": "2 epochs"}, {"steps": 9}, "stops the run when val_loss stalls"),
        ({"patience": 8}, {"epochs": 3, "steps_per_epoch": 2}, "cannot stop this run before its"),
    ],
)
def test_what_is_said_where_no_step_is_known(stop, run, text):
    assert text in " ".join(str(plan(**stop).preview(model(), **run)).split())


def test_a_plateau_says_what_the_table_leaves_out():
    feedback = lm.plateau("val_loss", factor=0.5, patience=2)
    shown = " ".join(str(lm.Plan("SGD", lr=0.1, feedback=feedback).preview(model())).split())
    assert "multiplies lr by 0.5 each time val_loss stalls; reductions to come are not" in shown
    ruled = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("0.*", feedback=feedback)])
    assert "multiplies lr of 0.* by 0.5" in " ".join(str(ruled.preview(model())).split())

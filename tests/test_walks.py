"""The walks of docs/explanation/architecture.md are the calls that are made, in their order."""

import re
import sys
from pathlib import Path

import torch
from torch import nn

import lamina as lm

PAGE = (Path(__file__).parents[1] / "docs" / "explanation" / "architecture.md").read_text()
PACKAGE = str(Path(lm.__file__).parent)


def walks():
    """The lists of the page: places as (file, function)."""
    section = PAGE.partition("## Two walks")[2].partition("\n## ")[0]
    lines = re.findall(r"^(\d+)\. `(.+?)`, `(.+?)`: .+\.$", section, re.MULTILINE)
    found = []
    for number, file, function in lines:
        if number == "1":
            found.append([])
        found[-1].append((file, function))
    return found


def traced(run):
    """Every call into lamina, in order."""
    calls = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            file = frame.f_code.co_filename[len(PACKAGE) + 1 :]
            calls.append((file, frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def missing(walk, calls):
    """The first place of a walk that is not called after the one before it; None if all are."""
    place = 0
    for hop in walk:
        if hop not in calls[place:]:
            return hop
        place = calls.index(hop, place) + 1
    return None


def test_the_walks_are_what_is_called():
    made = {}

    def build():
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        plan = lm.Plan("AdamW", lr=1e-3, clip_norm=1.0, rules=[lm.Rule("0.*", frozen=True)])
        made["model"], made["optimizer"] = model, plan.build(model, steps=10)

    def step():
        made["optimizer"].step()

    built = traced(build)
    made["model"](torch.ones(2, 3)).sum().backward()
    stepped = traced(step)
    of_lr, of_gradient = walks()
    assert len(of_lr) == len(set(of_lr))
    assert len(of_gradient) == len(set(of_gradient))
    assert missing(of_lr, [*built, *stepped]) is None
    assert missing(of_gradient, stepped) is None
    # canaries: an order that is not, a place that is not
    assert missing(of_gradient[::-1], stepped) is not None
    assert missing([("plan/plan.py", "Plan.vanish")], built) == ("plan/plan.py", "Plan.vanish")

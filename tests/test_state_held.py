"""A held run that goes on: whether its schedules still fit the length that they were saved for."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import lamina as lm
from lamina.schedules.duration import Run
from models import mlp, train
from test_state import through_a_file

# plans here rest as a whole for some steps, which the build warns of
pytestmark = pytest.mark.filterwarnings("ignore:nothing-trains")

COSINE = lm.Plan(lm.AdamW, lr=0.05, schedule=lm.cosine(to=0.01))


def held(plan=COSINE, first=10, at=4, second=20, more=0):
    """The state of a run of `first` steps that was held over `second` ones."""
    model = mlp()
    optimizer = plan.build(model, steps=first)
    train(model, optimizer, at)
    state = through_a_file(optimizer.state_dict())
    optimizer = plan.build(model, steps=second, resume=state, extend="hold")
    train(model, optimizer, more, first=at)
    return through_a_file(optimizer.state_dict())


def found(preview):
    return [finding.code for finding in preview.findings]


@pytest.mark.parametrize("strict", [False, True])
def test_a_held_state_loaded_by_hand_names_the_jumps(caplog, strict):
    other = COSINE.build(mlp(), steps=20)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        other.load_state_dict(held(), strict=strict)
    (record,) = caplog.records
    assert "lr of 'default' jumps from" in record.getMessage()
    load = other.last_load
    assert (load.saved_run, load.run) == (Run(20), Run(20))
    assert (load.saved_planned, load.planned) == (Run(10), Run(20))
    assert "schedules: of 10 steps, now of 20 steps" in str(load)


def test_hold_then_stretch_names_the_jumps_everywhere():
    state = held()
    optimizer = COSINE.build(mlp(), steps=20, resume=state, extend="stretch")
    preview = COSINE.preview(mlp(), steps=20, resume=state, extend="stretch")
    (told,) = optimizer.last_load.jumps
    assert told.startswith("lr of 'default' jumps from")
    assert found(preview) == ["value-jumps"]
    assert told in preview.findings[0].message
    assert "schedules are fitted to the new length" in " ".join(str(preview).split())


@pytest.mark.parametrize("extend", [None, "hold"])
def test_a_held_run_that_stays_held_names_none(caplog, extend):
    state = held(more=3)
    for steps in (20, 30) if extend else (20,):
        optimizer = COSINE.build(mlp(), steps=steps, resume=state, extend=extend)
        preview = COSINE.preview(mlp(), steps=steps, resume=state, extend=extend)
        assert optimizer.last_load.jumps == ()
        assert found(preview) == []
        assert "schedules are those for 10 steps" in " ".join(str(preview).split())
    assert caplog.text == ""


def test_stretched_back_to_its_own_length_a_held_run_names_none():
    optimizer = COSINE.build(mlp(), steps=10, resume=held(), extend="stretch")
    assert optimizer.last_load.jumps == ()
    assert "schedules:" not in str(optimizer.last_load)


# ------------------------------------------------- groups that another length splits, joins, swaps

#: at 20 steps both thaw at 4 and are one group; at 40 steps they are two
REGROUPED = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.cosine(to=0.01),
    rules=[lm.Rule("body", thaw="20%"), lm.Rule("head", thaw=4)],
)
NAMES = ("body.weight", "body.bias", "head.weight", "head.bias")


def still(model, optimizer):
    """Take a step with gradients of zero."""
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def lived(plan, steps, at, model=None, **run):
    """The values applied in the first steps of a run by parameter, and its state."""
    rows = []
    model = model or mlp()
    optimizer = plan.build(model, steps=steps, **run)
    for _ in range(at):
        still(model, optimizer)
        groups = [(name, g["name"]) for g in optimizer.param_groups for name in g["param_names"]]
        rows.append({name: optimizer.applied[group] for name, group in groups})
    return rows, through_a_file(optimizer.state_dict())


@pytest.mark.parametrize(("first", "second"), [(20, 40), (40, 20)])
def test_the_past_of_a_regrouped_run_is_what_was_applied(first, second):
    rows, state = lived(REGROUPED, first, 6)
    preview = REGROUPED.preview(mlp(), steps=second, resume=state, extend="stretch")
    assert len(preview.resolved.cells) != len(preview.resumed.before.cells)
    for step in range(first):
        for name in NAMES:
            told = preview.explain(name, step)
            lr = preview.at(step)[told.group]["lr"]
            assert next(x.value for x in told.lines if x.key == "lr") == f"{lr:.6g}"
            if step < 6:
                assert preview.at(step)[told.group] == rows[step][name]
    # The picture has the groups as they go on, each with the past of its first parameter.
    curves = preview.values(np.arange(6))
    for index, cell in enumerate(preview.resolved.cells):
        name = cell.parameters[0].name
        assert curves.hyper(index)["lr"].tolist() == [row[name]["lr"] for row in rows]


def test_equal_names_do_not_make_equal_groups():
    def model():
        names = ("a0", "a1", "a2", "b0", "b1", "b2", "d", "e")
        return nn.ModuleDict({name: nn.Linear(1, 1) for name in names})

    # At 20 steps d is with the a and e with the b, at 40 steps the other way round.
    rules = [lm.Rule(name, thaw=4) for name in ("a0", "a1", "a2")]
    rules += [lm.Rule(name, thaw="1 epochs") for name in ("b0", "b1", "b2")]
    rules += [lm.Rule("d", thaw="20%"), lm.Rule("e", thaw="10%")]
    plan = lm.Plan("SGD", lr=0.1, rules=rules)
    rows, state = lived(plan, 20, 3, model(), steps_per_epoch=2)
    how = {"steps": 40, "steps_per_epoch": 8, "resume": state, "extend": "stretch"}
    preview = plan.preview(model(), **how)
    before, after = preview.resumed.before, preview.resolved
    assert [cell.name for cell in before.cells] == [cell.name for cell in after.cells]
    assert before.cell_of["d.bias"] != after.cell_of["d.bias"]
    for name in before.cell_of:
        told = preview.explain(name, 2)
        assert preview.at(2)[told.group] == rows[2][name]
        assert told.active is (rows[2][name]["lr"] > 0)


def test_overrides_of_the_past_are_shown_by_the_groups_of_the_past():
    model = mlp()
    optimizer = REGROUPED.build(model, steps=40)
    for step in range(10):
        if step == 5:
            optimizer.override(rule="head", lr=0.5)
        still(model, optimizer)
    applied, state = optimizer.applied, through_a_file(optimizer.state_dict())
    preview = REGROUPED.preview(mlp(), steps=20, resume=state, extend="stretch")
    assert preview.at(9) == applied


# ---------------------------------------------------------- patience, findings, thresholds

PATIENT = lm.Plan("SGD", lr=0.1, feedback=lm.plateau("val_loss", factor=0.5, patience="10%"))


def reported(optimizer, model, more):
    for step in range(more):
        train(model, optimizer, 1, first=step)
    optimizer.report(val_loss=1.0)
    return optimizer


def test_a_held_run_keeps_the_patience_that_was_a_share_of_the_run():
    model = mlp()
    optimizer = reported(PATIENT.build(model, steps=20), model, 5)
    state = through_a_file(optimizer.state_dict())
    uninterrupted = reported(optimizer, model, 5)
    assert uninterrupted.param_groups[0]["lr"] == 0.05
    with pytest.raises(
        lm.StateError,
        match=r"patience of plateau of plan \(val_loss, min\) would be 20 steps, not 2",
    ):
        PATIENT.build(mlp(), steps=200, resume=state)
    for extend, lr in (("hold", 0.05), ("stretch", 0.1)):
        model = mlp()
        again = PATIENT.build(model, steps=200, resume=state, extend=extend)
        assert reported(again, model, 5).param_groups[0]["lr"] == lr
    counted = lm.Plan("SGD", lr=0.1, feedback=lm.plateau("val_loss", patience=3))
    state = counted.build(mlp(), steps=20).state_dict()
    assert counted.build(mlp(), steps=200, resume=state).clock == 0


def test_a_held_run_has_the_findings_of_its_own_length():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("body", thaw=30), lm.Rule("head", thaw="80%")])
    with pytest.warns(lm.LaminaWarning, match="thaw-after-end"):
        state = plan.build(mlp(), steps=20).state_dict()
    longer = plan.build(mlp(), steps=40, resume=state, extend="hold")
    assert [finding.code for finding in longer.findings] == ["nothing-trains"]
    assert longer.resolved.planned == Run(20)
    with pytest.warns(lm.LaminaWarning, match="thaw-after-end") as told:
        shorter = plan.build(mlp(), steps=10, resume=state, extend="hold")
    assert len(told) == 3
    late = ["nothing-trains", "thaw-after-end", "thaw-after-end"]
    assert [finding.code for finding in shorter.findings] == late


def test_thresholds_that_jump_are_told():
    plan = lm.Plan("SGD", lr=0.1, clip_norm=lm.linear(1.0, 0.5))
    _, state = lived(plan, 20, 10)
    preview = plan.preview(mlp(), steps=40, resume=state, extend="stretch")
    other = plan.build(mlp(), steps=40, resume=state, extend="stretch")
    told = "clip_norm of 'plan' jumps from 0.75 to 0.875 at step 10 (x1.17)"
    assert other.last_load.jumps == (told,)
    assert told in preview.findings[0].message
    held = plan.build(mlp(), steps=40, resume=state, extend="hold")
    assert held.last_load.jumps == ()
    assert held.last_load.hyperparameters == ()


def test_a_long_past_is_sampled_where_it_thawed():
    plan = lm.Plan("SGD", lr=0.1, rules=[lm.Rule("body", thaw="20%")])
    _, state = lived(plan, 3335, 1)
    for group in state["param_groups"]:
        group["clock"] = 1000
    preview = plan.preview(mlp(), steps=20_000, resume=state, extend="stretch")
    assert {666, 667, 999, 1000, 3999, 4000} <= set(preview.steps.tolist())


def test_groups_that_go_on_alike_have_the_peaks_of_their_own_past():
    rules = [lm.Rule("body", thaw="20%"), lm.Rule("head", thaw=8, weight_decay=0)]
    plan = lm.Plan("AdamW", lr=0.05, schedule=lm.cosine(), rules=rules)
    rows, state = lived(plan, 20, 6)
    preview = plan.preview(mlp(), steps=40, resume=state, extend="stretch")
    (body, at), (_, other) = preview.peaks
    assert (body, at, other) == (rows[4]["body.bias"]["lr"], 4, 8)

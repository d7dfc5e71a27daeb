"""A saved run goes on with another length: hold, stretch, or an error that asks."""

import copy
import logging

import numpy as np
import pytest
import torch

import lamina as lm
from models import mlp, same, train, weights
from test_state import through_a_file

PLAN = lm.Plan(
    lm.AdamW,
    lr=0.05,
    schedule=lm.warmup("10%") >> lm.cosine(to=0.01),
    rules=[
        lm.Rule("body", thaw="20%", lr=lm.times(0.5)),
        lm.Rule("head.bias", weight_decay=lm.linear(0.1, to=0.0)),
    ],
)
FLAT = lm.Plan(lm.AdamW, lr=0.05, schedule=lm.warmup(3))
AT, LENGTH, LONGER = 8, 20, 40


def saved(plan=PLAN, at=AT, steps=LENGTH, **run):
    model = mlp()
    optimizer = plan.build(model, steps=steps, **run)
    train(model, optimizer, at)
    return model, through_a_file(optimizer.state_dict())


def resumed(plan=PLAN, steps=LONGER, at=AT, state=None, **how):
    first, its_state = saved(plan, at)
    model = mlp()
    model.load_state_dict(first.state_dict())
    return model, plan.build(model, steps=steps, resume=state or its_state, **how)


def applied(model, optimizer, first, last):
    rows = []
    for step in range(first, last):
        train(model, optimizer, 1, first=step)
        rows.append(copy.deepcopy(optimizer.applied))
    return rows


def planned(length, steps, plan=PLAN):
    """The values of the plan for a length, at some steps."""
    preview = plan.preview(mlp(), steps=length)
    return [preview.at(step) for step in steps]


def test_hold_keeps_the_saved_schedules_and_then_their_last_values():
    model, optimizer = resumed(extend="hold")
    assert optimizer.resolved.run.steps == LONGER
    assert optimizer.clock == AT
    assert applied(model, optimizer, AT, LONGER) == planned(LENGTH, range(AT, LONGER))
    assert optimizer.applied == planned(LENGTH, [10_000])[0]
    assert optimizer.last_load.jumps == ()


def test_a_held_run_is_the_saved_run_bit_for_bit_until_its_end():
    straight = mlp()
    one = PLAN.build(straight, steps=LENGTH)
    train(straight, one, LENGTH)
    twin, other = resumed(extend="hold")
    train(twin, other, LENGTH - AT, first=AT)
    assert same(weights(straight), weights(twin))


def test_stretch_fits_the_same_shapes_to_the_new_length():
    model, optimizer = resumed(extend="stretch")
    assert applied(model, optimizer, AT, LONGER) == planned(LONGER, range(AT, LONGER))
    before, after = planned(LENGTH, [AT])[0], planned(LONGER, [AT])[0]
    ratio = after["head.weight" if "head.weight" in after else "default"]["lr"]
    assert ratio != before["default"]["lr"]
    told = "; ".join(optimizer.last_load.jumps)
    for group in before:
        assert f"lr of {group!r} jumps from {before[group]['lr']:.6g}" in told
        assert f"to {after[group]['lr']:.6g} at step {AT}" in told
    assert "weight_decay of 'head.bias' jumps" in told
    text = str(optimizer.last_load)
    assert "run: saved with 20 steps, now 40 steps" in text


def test_a_jump_says_how_many_times():
    plan = lm.Plan(lm.SGD, lr=0.01, schedule=lm.linear(to=0.0))
    _, optimizer = resumed(plan, steps=40, at=10, extend="stretch")
    (jump,) = optimizer.last_load.jumps
    assert jump == "lr of 'default' jumps from 0.005 to 0.0075 at step 10 (x1.5)"


def test_without_a_word_a_plan_that_depends_on_the_length_asks():
    _, state = saved()
    with pytest.raises(lm.StateError) as caught:
        PLAN.build(mlp(), steps=LONGER, resume=state)
    for word in ["20 steps", "40 steps", "lr of ", "step 8", "extend='hold'", "extend='stretch'"]:
        assert word in str(caught.value)
    with pytest.raises(lm.StateError, match="depends on that"):
        PLAN.preview(mlp(), steps=LONGER, resume=state)


def test_without_a_word_nothing_is_asked_where_nothing_depends_on_the_length():
    _, optimizer = resumed(FLAT)
    assert optimizer.clock == AT
    assert optimizer.last_load.jumps == ()
    ended = lm.Plan(lm.AdamW, lr=0.05, schedule=lm.warmup("10%") >> lm.constant(1.0))
    _, optimizer = resumed(ended)  # the part that depends on it is over
    assert optimizer.clock == AT
    with pytest.raises(lm.StateError, match="at step 1 would be"):
        resumed(ended, at=1)


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        (lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("body", thaw="60%")]), "lr of 'body.weight'"),
        (lm.Plan(lm.SGD, lr=0.1, clip_norm=lm.linear(2.0, to=1.0)), "clip_norm of 'plan'"),
        (lm.Plan(lm.AdamW, lr=0.1, betas=(lm.linear(0.95, to=0.85), 0.99)), "betas of"),
    ],
)
def test_windows_thresholds_and_parts_of_pairs_are_compared_too(plan, word):
    with pytest.raises(lm.StateError, match=word):
        resumed(plan)


@pytest.mark.parametrize("extend", ["hold", "stretch", None])
def test_an_equal_length_needs_no_word_and_takes_any(extend):
    model, optimizer = resumed(steps=LENGTH, extend=extend)
    assert applied(model, optimizer, AT, LENGTH) == planned(LENGTH, range(AT, LENGTH))
    assert optimizer.resolved.planned is None


def test_a_held_run_resumes_as_it_was_held_and_can_be_held_again():
    model, optimizer = resumed(extend="hold")
    train(model, optimizer, 4, first=AT)
    state, kept = through_a_file(optimizer.state_dict()), weights(model)
    assert state["param_groups"][0]["planned"] == {"steps": LENGTH, "steps_per_epoch": None}
    train(model, optimizer, 20, first=AT + 4)
    twin = mlp()
    twin.load_state_dict(kept)
    other = PLAN.build(twin, steps=LONGER, resume=state)
    train(twin, other, 20, first=AT + 4)
    assert same(weights(model), weights(twin))
    for extend, length, steps in [
        ("hold", LENGTH, 60),
        ("stretch", 60, 60),
        ("hold", LENGTH, LONGER),
        ("stretch", LONGER, LONGER),
    ]:
        again = PLAN.build(mlp(), steps=steps, resume=state, extend=extend)
        assert again.resolved.run.steps == steps
        first = {name: group["lr"] for name, group in by_name(again).items()}
        assert first == {n: v["lr"] for n, v in planned(length, [AT + 4])[0].items()}


def by_name(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def test_a_shorter_run_loads_too():
    model, optimizer = resumed(steps=12, extend="stretch")
    assert applied(model, optimizer, AT, 12) == planned(12, range(AT, 12))
    _, optimizer = resumed(steps=12, extend="hold")
    assert optimizer.resolved.run.steps == 12


def test_epochs_of_another_length_are_another_run():
    plan = lm.Plan(lm.AdamW, lr=0.05, rules=[lm.Rule("body", thaw="2 epochs")])
    first = plan.build(mlp(), steps=20, steps_per_epoch=5)
    state = first.state_dict()
    with pytest.raises(lm.StateError, match=r"epochs of 5.*epochs of 10"):
        plan.build(mlp(), steps=20, steps_per_epoch=10, resume=state)
    held = plan.build(mlp(), steps=20, steps_per_epoch=10, resume=state, extend="hold")
    assert by_name(held)["body"]["lr"] == 0.0
    assert held.resolved.cells[0].windows == ((10, None),)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"extend": "hold"}, lm.PlanError, "give its state, resume=state"),
        ({"extend": "strech"}, lm.PlanError, "Did you mean 'stretch'"),
        ({"extend": 3}, lm.PlanError, "expected None, 'hold' or 'stretch'"),
        ({"resume": {"a": 1}}, lm.StateError, "not an optimizer state"),
    ],
)
def test_no_argument_is_ignored(how, error, words):
    model = mlp()
    for call in (PLAN.build, PLAN.preview):
        with pytest.raises(error, match=words):
            call(model, steps=LONGER, **how)
    assert all(p.requires_grad for p in model.parameters())


def test_a_state_that_does_not_know_its_run_cannot_be_extended():
    model = mlp()
    theirs = torch.optim.AdamW(model.named_parameters(), lr=0.05)
    train(model, theirs, 3)
    with pytest.raises(lm.StateError, match="does not know the length of its run"):
        PLAN.build(mlp(), steps=LONGER, resume=theirs.state_dict(), extend="hold")
    optimizer = PLAN.build(mlp(), steps=LONGER, resume=theirs.state_dict())
    assert optimizer.clock == 3
    assert "resumes at step 3" in str(PLAN.preview(mlp(), steps=LONGER, resume=theirs.state_dict()))


# ---------------------------------------------------------- longer runs and second phases, by hand


def test_a_longer_run_keeps_its_own_length_and_one_warning_names_the_jumps(caplog):
    _, state = saved()
    longer = PLAN.build(mlp(), steps=LONGER)
    with caplog.at_level(logging.WARNING, logger="lamina"):
        longer.load_state_dict(state)
    (record,) = caplog.records
    assert "lr of 'default' jumps from" in record.getMessage()
    assert "extend='hold'" in record.getMessage()
    assert longer.resolved.run.steps == LONGER
    first = {name: group["lr"] for name, group in by_name(longer).items()}
    assert first == {name: each["lr"] for name, each in planned(LONGER, [AT])[0].items()}
    assert longer.last_load.saved_run.steps == LENGTH


def test_another_length_without_a_jump_does_not_warn(caplog):
    _, state = saved(FLAT)
    longer = FLAT.build(mlp(), steps=LONGER)
    longer.load_state_dict(state)
    assert caplog.text == ""
    assert "run: saved with 20 steps, now 40 steps" in str(longer.last_load)


def test_a_second_phase_begins_where_its_own_plan_says():
    model, state = saved(lm.Plan(lm.AdamW, lr=0.05, schedule=lm.cosine()))
    second = lm.Plan(lm.AdamW, lr=0.001, schedule=lm.cosine(to=0.5))
    optimizer = second.build(mlp(), steps=LENGTH)
    optimizer.load_state_dict(state)
    expected = [row["default"]["lr"] for row in planned(LENGTH, range(AT, LENGTH), second)]
    model = mlp()
    optimizer = second.build(model, steps=LENGTH)
    optimizer.load_state_dict(state)
    rows = applied(model, optimizer, AT, LENGTH)
    assert [row["default"]["lr"] for row in rows] == expected
    assert [(r.saved, r.now) for r in optimizer.last_load.hyperparameters] == [
        (pytest.approx(0.05 * (1 + np.cos(np.pi * AT / LENGTH)) / 2), expected[0])
    ]


def test_a_manual_edit_is_an_error_and_an_override_survives_a_second_optimizer():
    model, optimizer = mlp(), None
    optimizer = FLAT.build(model, steps=LENGTH)
    train(model, optimizer, AT)
    optimizer.param_groups[0]["lr"] = 0.7
    with pytest.raises(lm.OwnershipError):
        train(model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.override(lr=0.7)
    other = FLAT.build(mlp(), steps=LENGTH)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.7


# ------------------------------------------------------------------------------------ the preview


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


@pytest.mark.parametrize("extend", ["hold", "stretch"])
def test_the_picture_shows_the_saved_run_then_the_new_one(extend):
    pytest.importorskip("matplotlib")
    _, state = saved()
    preview = PLAN.preview(mlp(), steps=LONGER, resume=state, extend=extend)
    before = [row["default"]["lr"] for row in planned(LENGTH, range(AT))]
    length = LENGTH if extend == "hold" else LONGER
    after = [row["default"]["lr"] for row in planned(length, range(AT, LONGER))]
    ax = preview.plot().axes[0]
    np.testing.assert_array_equal(lines(ax)["default, head.bias"].get_ydata(), before + after)
    assert list(lines(ax)["_resumed"].get_xdata()) == [AT, AT]
    assert any("resumes at step 8" in text.get_text() for text in ax.texts)
    assert [preview.at(step)["default"]["lr"] for step in range(LONGER)] == before + after
    for step in (AT - 1, AT):
        shown = preview.explain("head.weight", step).lines
        assert f"{(before + after)[step]:g}" in next(x.value for x in shown if x.key == "lr")
    text = " ".join(str(preview).split())  # lines are wrapped to the width
    assert "resumes at step 8 of a saved run" in text
    jumps = [finding for finding in preview.findings if finding.code == "value-jumps"]
    assert bool(jumps) is (extend == "stretch")
    assert ("lr of 'default' jumps from" in " ".join(text.split())) is (extend == "stretch")
    assert ("those for 20 steps" in text) is (extend == "hold")


def test_a_preview_shows_what_a_resumed_optimizer_applies():
    for extend in ("hold", "stretch"):
        model, optimizer = resumed(extend=extend)
        _, state = saved()
        preview = PLAN.preview(mlp(), steps=LONGER, resume=state, extend=extend)
        assert applied(model, optimizer, AT, LONGER) == [
            preview.at(step) for step in range(AT, LONGER)
        ]


def test_a_long_resumed_run_is_sampled_at_its_clock():
    _, state = saved(steps=5000)
    preview = PLAN.preview(mlp(), steps=50_000, resume=state, extend="stretch")
    assert {AT - 1, AT} <= set(preview.steps.tolist())
    assert "resumes at step 8" in str(preview)


def ended_at_zero(at=4, length=10):
    plan = lm.Plan(lm.SGD, lr=0.1, schedule=lm.linear(to=0.0))
    model = mlp()
    optimizer = plan.build(model, steps=length)
    train(model, optimizer, at)
    return plan, model, optimizer.state_dict()


def test_a_held_run_that_learns_nothing_more_is_a_finding():
    plan, model, state = ended_at_zero()
    held = plan.preview(model, steps=20, resume=state, extend="hold")
    assert "held-at-zero: every lr is 0 from step 10 on" in str(held)
    stretched = plan.preview(model, steps=20, resume=state, extend="stretch")
    assert "held-at-zero" not in str(stretched)


@pytest.mark.parametrize("extend", [None, "hold", "stretch"])
def test_a_run_that_is_further_than_its_new_length_is_refused(extend):
    plan, model, state = ended_at_zero()
    with pytest.raises(lm.StateError, match="at step 4, and this one is to end after 3 steps"):
        plan.build(model, steps=3, resume=state, extend=extend)


def test_renamed_parts_of_a_longer_run():
    plan, model, state = ended_at_zero()
    other = torch.nn.ModuleDict({"trunk": model.body, "head": model.head})
    renamed = {"body": "trunk"}
    optimizer = plan.build(other, steps=20, resume=state, extend="hold", renamed=renamed)
    assert optimizer.last_load.renamed
    assert optimizer.last_load.new == optimizer.last_load.dropped == ()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.06)
    assert plan.preview(other, steps=20, resume=state, extend="hold", renamed=renamed).at(4)
    with pytest.raises(lm.PlanError, match=r"renamed=.*give the state, resume=state"):
        plan.build(other, steps=20, renamed=renamed)


def test_the_state_inside_of_a_checkpoint_is_pointed_at():
    plan, model, state = ended_at_zero()
    with pytest.raises(lm.StateError, match=r"under 'optimizer' is: pass state\['optimizer'\]"):
        plan.build(model, steps=10, resume={"model": {}, "optimizer": state})

"""Two plans compared, and the hash of what a plan does: equal exactly where nothing differs."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lamina as lm
from lamina.preview import Preview
from lamina.toy import toy_problem
from models import Encoder, Tied, encoder
from plans import RUNS, fits, plain_plans, to_plan
from test_preview import Net, example

STEPS = {"steps": 12}


def sgd(*rules, **given):
    return lm.Plan("SGD", **{"lr": 0.1, **given}, rules=rules)


def hashed(plan, model=None, **run):
    return plan.preview(model or Net(), **(run or STEPS)).hash


# ----------------------------------------------------------------------------------- the same


RULE = lm.Rule
SAME = {
    "a factor in the schedule": [sgd(), sgd(lr=1.0, schedule="constant(0.1)")],
    "a share and a number of steps": [
        sgd(schedule=lm.warmup("25%") >> lm.cosine(to=0.1)),
        sgd(schedule=lm.warmup(3) >> lm.cosine(to=0.1)),
    ],
    "a value and a factor": [
        sgd(lr=lm.linear(0.1, 0.0)),
        sgd(schedule=lm.linear(to=0.0)),
    ],
    "depth by one rule and by hand": [
        sgd(RULE("layer.{depth}.*", lr=lm.by_depth(0.9))),
        sgd(RULE("layer.0.*", lr=0.081), RULE("re:layer\\.1\\..*", lr=0.09)),
    ],
    "the order of rules": [
        sgd(RULE("head.*", lr=1.0), RULE("layer.*", weight_decay=0.3)),
        sgd(RULE("layer.*", weight_decay=0.3), RULE("head.*", lr=1.0)),
    ],
    "patterns": [sgd(RULE("head.*", frozen=True)), sgd(RULE("type:Linear & head.*", frozen=True))],
    "what a frozen part would do": [
        sgd(RULE("head.*", frozen=True)),
        sgd(RULE("head.*", frozen=True, lr=3.0, weight_decay=0.5)),
    ],
    "windows": [
        sgd(RULE("layer.{depth}.*", thaw=lm.top_down(every=3))),
        sgd(*(RULE(f"layer.{n}.*", thaw=3 * (3 - n)) for n in range(3))),
    ],
    "operations on each parameter": [
        sgd(RULE("*", gradients=lm.clip_value(1.0))),
        sgd(
            RULE("head.*", gradients=lm.clip_value(1.0)),
            RULE("!head.*", gradients=lm.clip_value(1.0)),
        ),
    ],
    "functions with the same values": [
        sgd(schedule=lambda step: 1 / (1 + step)),
        sgd(schedule=lm.from_function(lambda step: np.exp(-np.log1p(step)))),
    ],
}


@pytest.mark.parametrize("name", SAME)
def test_what_means_the_same_has_one_hash_and_no_difference(name):
    one, other = SAME[name]
    assert one != other
    assert hashed(one) == hashed(other)
    found = lm.diff(one, other, Net(), **STEPS)
    assert not found, str(found)
    assert str(found) == "12 steps: the plans do the same with all 9 parameters"


# ---------------------------------------------------------------------------------- different

DIFFERENT = {
    "lr": (sgd(lr=0.2), "lr"),
    "lr a little": (sgd(lr=0.1000001), "lr"),
    "momentum": (sgd(momentum=0.9), "momentum"),
    "an option": (sgd(nesterov=True, momentum=0.9), "nesterov"),
    "one parameter": (sgd(RULE("head.bias", lr=0.2)), "lr"),
    "the last step alone": (
        sgd(schedule=lambda step: np.where(step == 11, 0.999, 1.0)),
        "lr",
    ),
    "when it trains": (sgd(RULE("head.*", thaw=1)), "trains"),
    "optimizer": (lm.Plan("AdamW", lr=0.1, weight_decay=0.0), "optimizer"),
    "clipping": (sgd(clip_norm=1.0), "gradients"),
    "a plateau": (sgd(feedback=lm.plateau("val_loss")), "feedback"),
    "a thaw that waits": (sgd(RULE("head.*", thaw=lm.on_plateau("val_loss"))), "thaw"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_has_another_hash_and_is_named(name):
    other, setting = DIFFERENT[name]
    assert hashed(sgd()) != hashed(other)
    found = lm.diff(sgd(), other, Net(), **STEPS)
    assert found
    assert setting in {change.setting for part in found.parts for change in part.changes}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (sgd(clip_norm=1.0), sgd(clip_norm=2.0)),
        (sgd(clip_norm=1.0), sgd(gradients=lm.clip_norm(1.0, p=1.0))),
        (sgd(clip_norm=1.0), sgd(RULE("head.*", clip_norm=1.0), clip_norm=1.0)),
        (
            sgd(RULE("head.*", clip_norm=1.0), RULE("layer.0.*", clip_norm=1.0)),
            sgd(RULE("head.* | layer.0.*", clip_norm=1.0)),
        ),
        (
            sgd(RULE("head.*", freeze=4, frozen_state="keep")),
            sgd(RULE("head.*", freeze=4, frozen_state="drop")),
        ),
        (sgd(RULE("head.*", frozen=True)), sgd(RULE("head.*", frozen=True, hold=False))),
        (
            sgd(RULE("head.*", thaw=lm.on_plateau("val_loss"), lr=0.1)),
            sgd(RULE("head.*", thaw=lm.on_plateau("val_loss"), lr=0.2)),
        ),
        (sgd(feedback=lm.plateau("loss")), sgd(feedback=lm.plateau("loss", factor=0.5))),
        (sgd(), sgd(nonfinite="skip")),
        (sgd(RULE("head.*", thaw=3)), sgd(RULE("head.*", thaw=4))),
        (sgd(RULE("head.*", freeze=3)), sgd(RULE("head.*", freeze=4))),
        (sgd(), sgd(stop=lm.early_stop("val_loss"))),
    ],
)
def test_what_is_clipped_together_kept_held_or_waited_for(one, other):
    assert hashed(one) != hashed(other)
    assert lm.diff(one, other, Net(), **STEPS)


def test_the_length_of_the_run_counts():
    one, other = sgd().preview(Net(), steps=12), sgd().preview(Net(), steps=13)
    assert one.hash != other.hash
    assert str(one.diff(other)).startswith("12 steps → 13 steps: 0 of 9 parameters change")


@st.composite
def pairs(draw):
    """Two plans: unlike, or alike but for one rule that is left out, moved or said twice."""
    one = draw(plain_plans())
    rules = one["rules"]
    if not rules or draw(st.integers(0, 3)) == 0:
        return one, draw(plain_plans())
    place, kind = draw(st.integers(0, len(rules) - 1)), draw(st.sampled_from("dmt"))
    rest = rules[:place] + rules[place + 1 :]
    if kind == "m":
        rest = [*rest, rules[place]]
    elif kind == "t":
        rest = [*rules[: place + 1], *rules[place:]]
    return one, {**one, "rules": rest}


@settings(max_examples=40, deadline=None)
@given(pairs())
def test_the_hash_is_equal_exactly_where_nothing_differs(pair):
    one, other = pair
    run, model = RUNS[0], Encoder()

    def preview(plain):
        settings = [plain["settings"], *(rule["settings"] for rule in plain["rules"])]
        trees = [value for each in settings for value in each.values()]
        if not all(fits(tree, run) for tree in trees if isinstance(tree, tuple) and tree):
            return None
        try:
            return to_plan(plain).preview(model, **run)
        except lm.LaminaError:
            return None

    previews = [preview(one), preview(other)]
    if None in previews:
        return
    a, b = previews
    assert bool(a.diff(b)) == (a.hash != b.hash), str(a.diff(b))
    assert not a.diff(preview(one))
    assert a.hash == preview(one).hash
    # An oracle that knows nothing of the comparison: all that the optimizer would apply.
    if not a.diff(b):
        for step in range(run["steps"]):
            left, right = applied(a, step), applied(b, step)
            assert left.keys() == right.keys()
            for key, value in left.items():
                assert abs(value - right[key]) <= 1e-7 * max(1.0, abs(value)), (step, key)


def applied(preview, step):
    """Every number that is applied at a step, by parameter and setting."""
    values = preview.at(step)
    return {
        (info.name, key): float(value)
        for index, cell in enumerate(preview.resolved.cells)
        if preview.values(step).active(index)
        for info in cell.parameters
        for key, value in values[cell.name].items()
        if value is not None
    }


# ------------------------------------------------------------------------------ same everywhere

PROGRAM = """
import functools
import lamina as lm
from test_preview import Net, example
def halve(grads, infos, by=2):
    return [grad / by for grad in grads]
plan = lm.Plan("AdamW", lr=3e-4, betas=(0.9, 0.98), schedule=lm.warmup(7) >> lm.cosine(to=0.01),
               rules=[lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.93), thaw=lm.top_down(every=5)),
                      lm.Rule("head.*", gradients=functools.partial(halve, by=4))])
print(plan.preview(Net(), steps=1000).hash, example().preview(Net(), steps=12).hash)
"""


def test_the_hash_is_the_same_in_another_process():
    env = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, printed = done.stdout.split(), io.StringIO()
    with redirect_stdout(printed):
        exec(PROGRAM, {})
    assert found == printed.getvalue().split()


def test_names_count_and_shapes_do_not():
    small, large = Encoder(width=3), Encoder(width=8)
    assert hashed(example_of(), small) == hashed(example_of(), large)
    assert hashed(example_of(), Encoder(layers=(0, 1))) != hashed(example_of(), small)
    assert hashed(sgd(), Tied()) == hashed(sgd(), Tied(width=5))


def example_of():
    return sgd(lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(0.5)), clip_norm=1.0)


def test_noise_in_the_last_bits_is_no_difference(monkeypatch):
    """Machines differ in the last bit of a cosine; a hash that knew of it would be useless."""
    plan = sgd(schedule=lm.warmup(30) >> lm.cosine(to=0.0))
    before = hashed(plan, steps=3000)
    cos = np.cos
    monkeypatch.setattr(np, "cos", lambda x: cos(x) * (1 + 2.2e-16))
    values = plan.preview(Net(), steps=3000).values(np.arange(3000)).lr(0)
    monkeypatch.undo()
    assert (values != plan.preview(Net(), steps=3000).values(np.arange(3000)).lr(0)).any()
    monkeypatch.setattr(np, "cos", lambda x: cos(x) * (1 + 2.2e-16))
    assert hashed(plan, steps=3000) == before


# -------------------------------------------------------------------------------- how it prints


def test_a_comparison_says_what_when_and_from_where_to_where():
    before = sgd(lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.5)), lm.Rule("head.*", lr=1.0))
    after = sgd(
        lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.25)),
        lm.Rule("head.*", lr=1.0, thaw=3),
        nonfinite="skip",
    )
    found = lm.diff(before, after, Net(), steps=12)
    assert str(found).splitlines() == [
        "12 steps: 6 of 9 parameters change",
        "nonfinite: the default → 'skip'",
        "layer.0–1.* (4 parameters, 40 numbers)",
        "  lr  steps 0 to 11: 0.025…0.05 → 0.00625…0.025",
        "head.* (2 parameters, 10 numbers)",
        "  trains  steps 0 to 2: trains → frozen",
    ]
    (lower, *_, head) = found.parts
    assert lower.parameters == ("layer.0.weight", "layer.0.bias")
    (change,) = head.changes
    assert (change.setting, change.steps, change.first, change.last) == ("trains", 3, 0, 2)
    assert (change.before, change.after) == ((True, True), (False, False))
    assert json.loads(json.dumps(found.data()))["parts"][0]["changes"][0]["before"] == [0.025] * 2


def test_models_that_differ_are_compared_where_they_agree():
    one, other = sgd().preview(encoder((0, 1)), steps=5), sgd().preview(encoder((0, 2)), steps=5)
    found = one.diff(other)
    assert found.only_before[0] == "encoder.layer.1.dense.weight"
    assert "only before: encoder.layer.1.*" in str(found)
    assert "only after: encoder.layer.2.*" in str(found)
    assert found.unchanged == 7


def test_a_thousand_layers_are_one_line():
    model = nn.Module()
    model.layer = nn.ModuleList(nn.Linear(1, 1) for _ in range(300))
    rules = [lm.Rule("layer.{depth}.*", lr=lm.by_depth(0.99))]
    text = str(lm.diff(sgd(*rules), sgd(*rules, lr=0.2), model, steps=5))
    assert len(text.splitlines()) == 3
    assert "* (600 parameters, 600 numbers)" in text


def test_a_resumed_run_and_overrides_are_seen():
    model = Net()
    optimizer = sgd(clip_norm=1.0).build(model, steps=12)
    for _ in range(4):
        sum(parameter.sum() for parameter in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = sgd(clip_norm=1.0).preview(model, steps=12)
    resumed = sgd(clip_norm=1.0).preview(model, steps=12, resume=optimizer.state_dict())
    assert not plain.diff(resumed)
    changed = Preview(plain.resolved, lm.Feedback(overrides={"default": [[6, {"lr": 0.7}]]}))
    (part,) = plain.diff(changed).parts
    assert [(c.setting, c.first, c.last) for c in part.changes] == [("lr", 6, 11)]
    assert changed.hash != plain.hash


def test_unknown_lengths_are_compared_too():
    assert hashed(sgd(), Net(), epochs=None) == hashed(sgd(), Net(), epochs=None)
    found = lm.diff(sgd(), sgd(lm.Rule("head.*", thaw=7)), Net())
    assert "unknown length: 2 of 9 parameters change" in str(found)
    assert "steps 0 to 6: trains → frozen" in str(found)


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = Net()
    assert hashed(example(), model) == hashed(example(), Net())
    assert not lm.diff(example(), example(), model, **STEPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lm.diff(sgd(), None, Net()), "NoneType for a plan; expected two lamina.Plan"),
        (lambda: lm.diff(sgd(), sgd(), None), "expected a torch.nn.Module"),
        (lambda: sgd().preview(Net()).diff(sgd()), "diff was given Plan; expected the preview"),
        (
            lambda: lm.diff(sgd(), sgd(lm.Rule("haed.*", lr=1.0)), Net()),
            r"'haed\.\*' matches (no|none)",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(lm.PlanError, match=message):
        call()


# --- rounding and the dtype of the state ----------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"rounding": "kahan"}, "rounding nearest → kahan"),
        ({"rounding": "kahan"}, {}, "rounding kahan → nearest"),
        ({"rounding": "nearest"}, {"rounding": "master"}, "rounding nearest → master"),
        ({}, {"state_dtype": "float32"}, "state_dtype that of the parameter → float32"),
    ],
)
def test_a_setting_that_one_plan_leaves_out_is_a_difference(before, after, told):
    model = toy_problem().model.bfloat16()
    one, other = (lm.Plan(lm.AdamW, lr=1e-2, **each) for each in (before, after))
    found = lm.diff(one, other, model, steps=10)
    assert found
    assert told in " ".join(str(found).split())
    assert one.preview(model, steps=10).hash != other.preview(model, steps=10).hash


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {"rounding": "nearest"}),
        (torch.bfloat16, {"rounding": None, "state_dtype": None}),
        (torch.float32, {"rounding": "master"}),
    ],
)
def test_a_setting_that_changes_nothing_is_no_difference(dtype, settings):
    model = toy_problem().model.to(dtype)
    one, other = (lm.Plan(lm.AdamW, lr=1e-2, **each) for each in ({}, settings))
    assert not lm.diff(one, other, model, steps=10)
    assert one.preview(model, steps=10).hash == other.preview(model, steps=10).hash

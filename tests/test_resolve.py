"""Where a plan meets a model: cells, the cascade, windows, findings, and values over time."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import lamina as lm
from models import encoder, mlp
from oracle import SHAPES
from plans import RUNS, fits, plain_plans, to_plan

# plans here rest as a whole for some steps, which the build warns of
pytestmark = pytest.mark.filterwarnings("ignore:nothing-trains")

BAD = [
    (lm.Rule("encodr.*", lr=1), ["'encodr.*' matches none of the 11", "encoder.layer.0"]),
    (lm.Rule("clasifier", frozen=True), ["'clasifier'", "classifier.weight"]),
    (lm.Rule("encoder.layers.{depth}.*", lr=lm.by_depth(0.9)), ["encoder.layer.0"]),
    (lm.Rule("type:Conv2d", lr=1), ["'type:Conv2d' matches none"]),
    (lm.Rule(lambda info: False, lr=1), ["<lambda>", "matches none"]),
    (lm.Rule("classifier", betas=(0.9, 0.9)), ["'classifier.weight'", "SGD has no", "'betas'"]),
    (lm.Rule("classifier", weight_deacy=0.1), ["'weight_deacy'", "'weight_decay'"]),
    (lm.Rule("classifier", schedul=None), ["'schedul'", "Did you mean 'schedule'?"]),
    (lm.Rule("classifier", optimizer=lm.AdamW, lr=1, momentum=0.9), ["AdamW has no", "momentum"]),
    (lm.Rule("classifier", optimizer=lm.AdamW, lr=1, betas=(0.9, 1.0)), ["betas[1]=1.0", "< 1"]),
    (lm.Rule("classifier", nesterov=True), ["nesterov"]),
    (lm.Rule("classifier", nesterov=lm.times(0.5)), ["only a number can be multiplied"]),
    (
        lm.Rule("classifier", lr=lambda info: -1),
        ["rule 'classifier', lr", "'classifier.weight'=-1"],
    ),
    (lm.Rule("classifier", lr=lambda info: info.shoe), ["failed for 'classifier.weight'", "shoe"]),
    (lm.Rule("classifier", thaw=3, freeze=3), ["'classifier.weight'", "same step 3"]),
    (lm.Rule("classifier", thaw=[1, 4], freeze=4), ["thaw at 4", "freeze at 4", "same step 4"]),
    (lm.Rule("classifier", thaw=[4, 1], freeze=2), ["thaw at 4", "then thaw at 1", "forward"]),
    (lm.Rule("classifier", thaw=["11%", "20%"]), ["'11%' (step 2)", "'20%' (step 2)", "one step"]),
    (lm.Rule("classifier", thaw=[1, "50%"]), ["'50%' (step 5)", "without a freeze between"]),
    (lm.Rule("classifier", freeze=[1, 5]), ["freeze at 1", "without a thaw between"]),
    (lm.Rule("classifier", thaw=[1, 2], freeze=5), ["thaw at 2", "without a freeze between"]),
    (
        lm.Rule("encoder.layer.{depth}.*", thaw=lm.top_down(5), freeze=4),
        ["freeze at 4 (step 4)", "before its turn", "top_down(5) (step 5)"],
    ),
    (lm.Rule("classifier", schedule=lambda step: -1.0), ["-1 at step 0"]),
    (lm.Rule("classifier", schedule=lambda step: float("nan")), ["nan at step 0"]),
    (lm.Rule("classifier", schedule=lm.warmup(90) >> lm.cosine()), ["longer than the run", "90"]),
]


@pytest.mark.parametrize(("rule", "words"), BAD)
def test_what_does_not_fit_the_model_fails_with_the_users_words(rule, words):
    model = encoder((0,), dtype=torch.float32)
    model.extra = torch.nn.Linear(2, 1)
    model.other = torch.nn.Linear(2, 1)
    plan = lm.Plan("SGD", lr=0.1, rules=[rule])
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    for make in (plan.build, plan.preview):
        with pytest.raises(lm.PlanError) as caught:
            make(model, steps=10)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before


def groups_of(optimizer):
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


def value(optimizer, name, key="lr"):
    return next(g[key] for g in optimizer.param_groups if name in g["param_names"])


def test_equal_settings_share_a_group_and_every_parameter_has_one():
    rules = [
        lm.Rule("encoder.layer.0", lr=0.2),
        lm.Rule("encoder.layer.1", lr=0.2),
        lm.Rule("*.bias", weight_decay=0),
        lm.Rule("classifier", weight_decay=0.0),
    ]
    model = encoder((0, 1))
    optimizer = lm.Plan("SGD", lr=0.1, weight_decay=0.5, rules=rules).build(model)
    groups = groups_of(optimizer)
    assert len(groups) == 4
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())
    assert value(optimizer, "classifier.weight", "weight_decay") == 0


def test_later_rules_win_setting_by_setting():
    rules = [
        lm.Rule("encoder", lr=0.2, momentum=0.5, clip_norm=1.0),
        lm.Rule("encoder.layer.1", lr=0.3),
        lm.Rule("*.norm.*", momentum=0.7),
    ]
    optimizer = lm.Plan("SGD", lr=0.1, momentum=0.9, rules=rules).build(encoder((0, 1)))
    found = {
        name: (value(optimizer, name), value(optimizer, name, "momentum"))
        for name in ("embeddings.weight", "encoder.layer.0.dense.bias", "encoder.layer.1.norm.bias")
    }
    assert list(found.values()) == [(0.1, 0.9), (0.2, 0.5), (0.3, 0.7)]


def test_factors_act_on_what_earlier_rules_gave_and_a_number_begins_anew():
    rules = [
        lm.Rule("head", lr=lm.times(0.5)),
        lm.Rule("head", lr="x0.5", momentum=lm.times(0.5)),
        lm.Rule("head.bias", lr=1.0),
        lm.Rule("head.bias", lr=lm.times(0.25)),
    ]
    optimizer = lm.Plan("SGD", lr=0.8, momentum=0.5, rules=rules).build(mlp())
    names = ("body.weight", "head.weight", "head.bias")
    assert [value(optimizer, name) for name in names] == [0.8, 0.2, 0.25]
    assert value(optimizer, "head.bias", "momentum") == 0.25


def test_another_optimizer_starts_from_its_own_defaults_and_inherits_control():
    rules = [lm.Rule("head", optimizer=lm.AdamW, lr=0.01), lm.Rule("body", lr=0.2)]
    plan = lm.Plan(
        "SGD",
        lr=0.1,
        weight_decay=0.5,
        momentum=0.9,
        schedule=lm.constant(0.5),
        clip_norm=1.0,
        thaw=2,
        rules=rules,
    )
    optimizer = plan.build(mlp(), steps=10)
    body, head = optimizer.param_groups
    assert [body["optimizer"], head["optimizer"]] == ["SGD", "AdamW"]
    assert "momentum" not in head
    assert (head["weight_decay"], head["betas"]) == (0.01, (0.9, 0.999))
    values = plan.preview(mlp(), steps=10).at(2)
    assert (values[head["name"]]["lr"], values[body["name"]]["lr"]) == (0.005, 0.1)
    assert plan.preview(mlp(), steps=10).at(1)[head["name"]]["lr"] == 0.0
    assert {cell.scope for cell in optimizer.resolved.cells} == {0}


def test_equal_thresholds_of_two_rules_are_two_scopes():
    rules = [lm.Rule("body", clip_norm=1.0), lm.Rule("head", clip_norm=1.0)]
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules).build(mlp())
    assert len(optimizer.param_groups) == len(optimizer.resolved.scopes) == 2
    optimizer = lm.Plan("SGD", lr=0.1, rules=rules[:1]).build(mlp())
    assert [cell.scope for cell in optimizer.resolved.cells] == [0, None]


WINDOWS = [
    ({"frozen": True}, []),
    ({"frozen": False}, range(10)),
    ({"thaw": 0}, range(10)),
    ({"thaw": 3}, range(3, 10)),
    ({"thaw": "25%"}, range(3, 10)),
    ({"thaw": "0.6 epochs"}, range(3, 10)),
    ({"freeze": 4}, range(4)),
    ({"freeze": 0}, []),
    ({"thaw": 2, "freeze": "50%"}, range(2, 5)),
    ({"thaw": 5, "freeze": 2}, [0, 1, 5, 6, 7, 8, 9]),
    ({"thaw": 5, "freeze": 0}, range(5, 10)),
    ({"thaw": [1, 5], "freeze": [3]}, [1, 2, 5, 6, 7, 8, 9]),
    ({"thaw": ["0.2 epochs", 4], "freeze": ["30%", "1.2 epochs"]}, [1, 2, 4]),
    ({"freeze": [2, "80%"], "thaw": ["50%"]}, [0, 1, 5, 6, 7]),
    ({"freeze": [0, 5], "thaw": [2, 8]}, [2, 3, 4, 8, 9]),
    ({"thaw": [0, 4], "freeze": [2]}, [0, 1, 4, 5, 6, 7, 8, 9]),
    ({"thaw": [3], "freeze": [6]}, [3, 4, 5]),
]


@pytest.mark.parametrize(("window", "steps"), WINDOWS)
def test_windows(window, steps):
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule("head", **window)])
    preview = plan.preview(mlp(), steps=10, steps_per_epoch=4)
    group = preview.resolved.cells[preview.resolved.cell_of["head.bias"]].name
    trains = [step for step in range(10) if preview.at(step)[group]["lr"] > 0]
    assert trains == list(steps)


@pytest.mark.parametrize("first", [{"frozen": True}, {"thaw": 3}, {"freeze": 5}])
def test_a_later_window_replaces_an_earlier_one_as_a_whole(first):
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule("*", **first), lm.Rule("*", freeze=7)])
    preview = plan.preview(mlp(), steps=10)
    ((_, values),) = [preview.at(step).popitem() for step in (0,)]
    assert values["lr"] == 1.0
    assert [preview.at(step).popitem()[1]["lr"] for step in (6, 7)] == [1.0, 0.0]


def test_top_down_goes_by_rank_and_leaves_other_parameters_alone():
    rules = [
        lm.Rule("classifier", frozen=True),
        lm.Rule("encoder.layer.{depth} | classifier", thaw=lm.top_down(3, start=1)),
    ]
    model = encoder((0, 2, 5))
    resolved = lm.Plan("SGD", lr=1.0, rules=rules).preview(model, steps=10).resolved
    windows = {name: resolved.cells[cell].windows for name, cell in resolved.cell_of.items()}
    begins = [windows[f"encoder.layer.{depth}.dense.bias"][0][0] for depth in (0, 2, 5)]
    assert begins == [7, 4, 1]
    assert windows["classifier.bias"] == ()


# ------------------------------------------------------------------------------------ findings


FINDINGS = [
    (lm.Plan("SGD", lr=1), []),
    (lm.Plan("SGD", lr=1, frozen=True), ["nothing-trains"]),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", lr=2, frozen=True)]), ["lr-never-trains"]),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", thaw=10)]), ["thaw-after-end"]),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", thaw=9)]), []),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", thaw=[1, 10], freeze=5)]), ["thaw-after-end"]),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", lr=0)]), ["lr-zero"]),
    (lm.Plan("SGD", lr=1, rules=[lm.Rule("head", lr=0, frozen=True)]), ["lr-never-trains"]),
    (lm.Plan("SGD", lr=1, nonfinite="skip", gradients=lm.clip_value(1)), []),
    (lm.Plan("SGD", lr=1, nonfinite_check="norms"), ["gradients-unchecked"]),
    (
        lm.Plan("SGD", lr=1, nonfinite_check="norms", gradients=lm.clip_value(1)),
        ["gradients-unchecked"],
    ),
    (
        lm.Plan("SGD", lr=1, nonfinite_check="norms", rules=[lm.Rule("body", clip_norm=1)]),
        ["gradients-unchecked"],
    ),
    (lm.Plan("SGD", lr=1, nonfinite_check="norms", clip_norm=1, rules=[lm.Rule("head", lr=2)]), []),
    (lm.Plan("SGD", lr=1, nonfinite_check="norms", gradients=lm.clip_param_norm(1)), []),
    (
        lm.Plan("SGD", lr=1, nonfinite_check="norms", gradients=[lm.scale_gradients(2), lm.agc(1)]),
        [],
    ),
    (lm.Plan("SGD", lr=1, nonfinite="skip"), []),
    (lm.Plan("LBFGS", lr=1, nonfinite_check="norms"), []),
    (
        lm.Plan(
            "SGD",
            lr=1,
            nonfinite_check="norms",
            clip_norm=1,
            rules=[lm.Rule("head", gradients=None, frozen=True)],
        ),
        [],
    ),
]


@pytest.mark.parametrize(("plan", "codes"), FINDINGS)
def test_findings_have_a_code_a_cause_with_names_and_a_fix(plan, codes):
    preview = plan.preview(mlp(), steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = plan.build(mlp(), steps=10)
    assert [finding.code for finding in preview.findings] == codes
    assert [str(each.message) for each in caught] == [*map(str, preview.findings)]
    assert {each.category for each in caught} <= {lm.LaminaWarning}
    assert preview.findings == optimizer.findings
    for finding in preview.findings:
        assert finding.message
        assert finding.fix
        assert finding.code == "nothing-trains" or "head" in str(finding)


def test_findings_of_a_rule_that_is_undone_are_not_raised():
    rules = [lm.Rule("head", lr=2, frozen=True), lm.Rule("head.bias", frozen=False)]
    assert lm.Plan("SGD", lr=1, rules=rules).preview(mlp(), steps=10).findings == ()


# --------------------------------------------------------------------------------- explanations


def test_explain_gives_the_chain_behind_every_number():
    rules = [
        lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(0.5), thaw=lm.top_down(2)),
        lm.Rule("*.bias", weight_decay=0),
    ]
    plan = lm.Plan("SGD", lr=0.4, weight_decay=0.1, schedule=lm.constant(0.5), rules=rules)
    optimizer = plan.build(encoder((0, 1)), steps=10)
    text = str(optimizer.explain("encoder.layer.0.dense.bias", step=5))
    for word in ["trains", "0.1", "by_depth(0.5)", "constant(0.5", "*.bias", "from step 4"]:
        assert word in text, text
    assert "is frozen" in str(optimizer.explain("encoder.layer.0.dense.bias", step=3))
    assert text == str(
        plan.preview(encoder((0, 1)), steps=10).explain("encoder.layer.0.dense.bias", 5)
    )


def test_explain_suggests_names():
    optimizer = lm.Plan("SGD", lr=0.4).build(mlp())
    with pytest.raises(lm.PatternError, match=r"'hed.weight'.*head.weight"):
        optimizer.explain("hed.weight")


# ---------------------------------------------------------------------------------- values_at


def trees(plain):
    tables = [plain["settings"], *(rule["settings"] for rule in plain["rules"])]
    for found in (value for table in tables for value in table.values()):
        found = found[1] if isinstance(found, tuple) and found[0] == "times" else found
        if isinstance(found, tuple) and found[0] in SHAPES:
            yield found


@given(plain_plans(), st.sampled_from(RUNS))
def test_one_step_and_many_give_the_same_bits(plain, run):
    assume(all(fits(tree, run) for tree in trees(plain)))
    resolved = to_plan(plain).preview(encoder((0, 1)), **run).resolved
    steps = np.arange(run["steps"] + 3)
    many = lm.values_at(resolved, steps)
    for step in steps:
        one = lm.values_at(resolved, int(step))
        for index in range(len(resolved.cells)):
            for key, number in one.hyper(index).items():
                array = np.broadcast_to(many.hyper(index)[key], steps.shape)
                assert np.float64(number).tobytes() == np.float64(array[step]).tobytes(), key
            assert one.active(index) == np.broadcast_to(many.active(index), steps.shape)[step]


def test_values_do_not_depend_on_the_order_of_asking():
    plan = lm.Plan("SGD", lr=0.1, schedule=lm.warmup(3) >> lm.cosine(to=0.1))
    preview = plan.preview(mlp(), steps=9)
    forward = [preview.at(step) for step in range(12)]
    assert [preview.at(step) for step in reversed(range(12))] == forward[::-1]
    assert all(type(values["default"]["lr"]) is float for values in forward)


VARIANTS = [
    *[("SGD", "nesterov"), ("SGD", "maximize"), ("RMSprop", "centered"), ("Adam", "amsgrad")],
    *[("Adam", "decoupled_weight_decay"), ("LayerAdaptiveAdam", "amsgrad"), ("LARS", "maximize")],
    *[("NAdam", "decoupled_weight_decay"), ("Rprop", "maximize")],
]
COUNTS = [("LBFGS", "max_iter"), ("LBFGS", "max_eval"), ("LBFGS", "history_size")]


@pytest.mark.parametrize(("optimizer", "key"), VARIANTS + COUNTS)
@pytest.mark.parametrize("schedule", [lm.linear(0.0, to=1.0, length=4), lm.constant(1.0)])
def test_variants_and_counts_cannot_be_scheduled(optimizer, key, schedule):
    if schedule.kind == "factor":
        schedule = lm.linear(1.0, to=1.0, length=4)
    with pytest.raises(lm.HyperparameterError, match=rf"{key} was given a schedule.*{optimizer}"):
        lm.Plan(optimizer, lr=0.1, **{key: schedule}).build(mlp(), steps=8)


def test_the_steps_of_muon_cannot_be_scheduled():
    steps = lm.linear(1.0, to=5.0, length=4)
    plan = lm.Plan(
        lm.AdamW, lr=0.1, rules=[lm.Rule("ndim==2", optimizer=lm.Muon, lr=0.1, ns_steps=steps)]
    )
    with pytest.raises(lm.HyperparameterError, match="'ndim==2': ns_steps was given a schedule"):
        plan.build(mlp(), steps=8)

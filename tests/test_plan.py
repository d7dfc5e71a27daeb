"""Plans and rules: frozen values that print as their constructor, and what they refuse."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given

import lamina as lm
from models import mlp
from plans import plain_plans, to_plan

README = lm.Plan(
    lm.AdamW,
    lr=2e-5,
    weight_decay=0.01,
    schedule=lm.warmup("6%") >> lm.cosine(to=0.01),
    clip_norm=1.0,
    rules=[
        lm.Rule(
            "encoder.layer.{depth}.*", lr=lm.by_depth(0.9), thaw=lm.top_down(every="0.4 epochs")
        ),
        lm.Rule("embeddings.*", frozen=True),
        lm.Rule("classifier.*", lr=1e-3, clip_norm=0.5),
        lm.Rule("*.bias | type:LayerNorm", weight_decay=0),
    ],
)
PLANS = [
    README,
    lm.Plan("SGD", lr=0.1, nonfinite="skip", nonfinite_check="norms"),
    lm.Plan(lm.Adam, lr=lm.linear(0.1, 0.2), betas=(0.8, 0.99), amsgrad=True, schedule=None),
    lm.Plan(lm.SGD, rules=[lm.Rule("*", optimizer=lm.AdamW, lr=1.0, thaw=3, freeze="90%")]),
    lm.Plan(lm.SGD, lr=1, clip_norm=lm.linear(1.0, 0.5), rules=[lm.Rule("a", clip_norm=None)]),
    lm.Plan(lm.SGD, lr=1, thaw="10%", rewarm=lm.warmup(5), momentum="linear(0.5, 0.9)"),
    lm.Plan(lm.SGD, lr=1, rules=[lm.Rule("a", thaw=["1 epochs", 90], freeze="2 epochs")]),
    lm.Plan(lm.SGD, lr=1, freeze=["10%", "2 epochs"], thaw=["1 epochs"]),
    lm.Plan(lm.SGD, lr=1, rules=[lm.Rule("a", lr=lm.times(lm.cosine(to=0.5)), frozen=False)]),
]


def evaluated(plan):
    """The plan that the text of a plan makes in the library's own namespace."""
    return eval(repr(plan), vars(lm).copy())


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_prints_as_its_constructor(plan):
    assert evaluated(plan) == plan
    assert repr(evaluated(plan)) == repr(plan)


@given(plain_plans())
def test_random_plans_print_and_convert_without_loss(plain):
    plan = to_plan(plain)
    assert evaluated(plan) == plan
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert lm.Plan.from_toml(plan.to_toml()).to_toml() == plan.to_toml()


def test_plans_and_rules_are_frozen_values():
    rule = lm.Rule("a.*", lr=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.match = "b.*"
    with pytest.raises(dataclasses.FrozenInstanceError):
        README.rules = ()
    assert rule == lm.Rule("a.*", lr=0.1)
    assert hash(rule) == hash(lm.Rule("a.*", lr=0.1))
    assert rule != lm.Rule("a.*", lr=0.2)
    assert rule != "a.*"
    assert lm.Plan("SGD", lr=1.0) != lm.Plan("SGD", lr=1.0, nonfinite="skip")
    assert lm.Plan("SGD", lr=1.0) != 1.0


@pytest.mark.parametrize("plan", PLANS)
def test_plans_survive_pickle(plan):
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert hash(pickle.loads(pickle.dumps(plan))) == hash(plan)


def test_the_order_of_settings_does_not_matter_and_that_of_rules_does():
    one, two = lm.Rule("a", lr=0.1), lm.Rule("b", lr=0.2)
    assert lm.Plan("SGD", lr=1, momentum=0.5) == lm.Plan("SGD", momentum=0.5, lr=1)
    assert lm.Plan("SGD", lr=1, rules=[one, two]) != lm.Plan("SGD", lr=1, rules=[two, one])


def test_texts_are_the_same_as_objects():
    assert lm.Plan(lm.SGD, lr="linear(0.1, 0.2)", schedule="warmup(5) >> cosine(to=0.1)") == (
        lm.Plan("SGD", lr=lm.linear(0.1, 0.2), schedule=lm.warmup(5) >> lm.cosine(to=0.1))
    )
    assert lm.Rule("a", lr="x0.1") == lm.Rule("a", lr=lm.times(0.1))
    assert lm.Rule("a", thaw=["3 steps", "2 epochs"]) == lm.Rule("a", thaw=(3, "2 epochs"))
    assert lm.Rule("a", freeze=["50%"]) == lm.Rule("a", freeze="50%")
    assert lm.Rule("a", betas=[0.5, "linear(0.5, 0.9)"]) == (
        lm.Rule("a", betas=(0.5, lm.linear(0.5, 0.9)))
    )


def test_functions_are_settings_too():
    def halve(info):
        return 0.5

    def decay(step):
        return 1.0 / (1.0 + step)

    plan = lm.Plan("SGD", lr=halve, schedule=decay, rules=[lm.Rule(lambda info: True, lr=1.0)])
    preview = plan.preview(mlp(), steps=4)
    (group,) = preview.at(0)
    assert [preview.at(step)[group]["lr"] for step in range(3)] == [1.0, 1 / 2, 1 / 3]
    assert "halve" in repr(plan)
    assert "<lambda>" in repr(plan)


BAD = [
    (lambda: lm.Plan(lm.SGD, lr=-1), ["plan, lr=-1", "at least 0"]),
    (lambda: lm.Plan(lm.SGD, lr=float("nan")), ["plan, lr=nan"]),
    (lambda: lm.Plan(lm.SGD, lr=float("inf")), ["plan, lr=inf"]),
    (lambda: lm.Plan(lm.SGD, lr=10**400), ["plan, lr=1000"]),
    (lambda: lm.Rule("a", lr=-1.0), ["rule 'a', lr=-1.0"]),
    (lambda: lm.Rule("a", lr=torch.tensor(1.0)), ["rule 'a', lr", "tensor"]),
    (lambda: lm.Rule("a", lr="cosin(to=0.1)"), ["rule 'a', lr", "Did you mean 'cosine'?"]),
    (lambda: lm.Rule("a", lr=lm.cosine(to=0.1)), ["cosine(to=0.1) is a factor", "schedule="]),
    (lambda: lm.Rule("a", schedule=lm.linear(1, 0)), ["linear(1, 0) is a value", "lr="]),
    (lambda: lm.Rule("a", schedule=0.5), ["schedule=0.5", "a schedule"]),
    (lambda: lm.Rule("a", rewarm=3), ["rewarm=3"]),
    (lambda: lm.Rule("a", clip_norm=0), ["clip_norm=0", "frozen=True"]),
    (lambda: lm.Rule("a", clip_norm=-1), ["clip_norm=-1"]),
    (lambda: lm.Rule("a", clip_norm=lm.warmup(5)), ["is a factor", "threshold"]),
    (lambda: lm.Rule("a", clip_norm=lm.times(0.5)), ["threshold belongs to its rule"]),
    (lambda: lm.Rule("a", frozen="maybe"), ["rule 'a', frozen"]),
    (lambda: lm.Rule("a", frozen=1), ["frozen=1", "True or False"]),
    (lambda: lm.Rule("a", frozen=True, thaw=3), ["frozen=True and thaw", "contradict"]),
    (lambda: lm.Rule("a", thaw=0.5), ["rule 'a', thaw", "'50%'"]),
    (lambda: lm.Rule("a", freeze="soon"), ["rule 'a', freeze", "'soon'"]),
    (lambda: lm.Rule("a", thaw=[]), ["rule 'a', thaw=[] is empty"]),
    (lambda: lm.Rule("a", freeze=[1, "soon"]), ["rule 'a', freeze[1]", "'soon'"]),
    (lambda: lm.Rule("a", thaw=[1, [2]]), ["rule 'a', thaw[1]", "[2]"]),
    (lambda: lm.Rule("a", thaw=[lm.on_plateau("loss")]), ["thaw[0]=on_plateau", "times alone"]),
    (lambda: lm.Rule("l.{depth}", thaw=[1, "top_down(2)"]), ["thaw[1]=top_down(2)", "alone"]),
    (lambda: lm.Rule("l.{depth}", thaw=lm.top_down(2), freeze=[3, 9]), ["once", "(3, 9)", "2 t"]),
    (lambda: lm.Rule("a", thaw=lm.on_plateau("loss"), freeze=3), ["waits for", "freeze=3"]),
    (lambda: lm.Rule("a", thaw=lm.top_down(3)), ["top_down(3)", "{depth}"]),
    (lambda: lm.Rule("a", lr=lm.by_depth(0.9)), ["by_depth(0.9)", "{depth}"]),
    (lambda: lm.Rule("a", optimizer=lm.AdamW), ["changes the optimizer to AdamW", "lr="]),
    (lambda: lm.Rule("a", lr=lm.top_down(3)), ["top_down(3)"]),
    (lambda: lm.Rule("a"), ["sets nothing", "lr=1e-3"]),
    (lambda: lm.Rule(3, lr=1.0), ["3 is not a pattern"]),
    (lambda: lm.Rule("a b", lr=1.0), ["cannot read the pattern 'a b'"]),
    (lambda: lm.Plan(lm.SGD, lr=lm.times(0.1)), ["times(0.1)", "Put it into a rule"]),
    (lambda: lm.Plan(lm.SGD, lr=1, thaw=lm.top_down(3)), ["top_down(3)", "Put it into a rule"]),
    (lambda: lm.Plan(lm.SGD, lr=1, rules=["a"]), ["'a'", "lamina.Rule(pattern, ...)"]),
    (lambda: lm.Plan(lm.SGD, lr=1, nonfinite="ignore"), ["'ignore'", "'raise' or 'skip'"]),
    (lambda: lm.Plan(lm.SGD, lr=1, nonfinite_check=3), ["nonfinite_check=3", "'all'"]),
    (lambda: lm.Plan("SDG", lr=1), ["'SDG' is not registered", "Did you mean 'SGD'?"]),
    (lambda: lm.Plan(3, lr=1), ["type int", "lamina.AdamW"]),
    (lambda: lm.Plan(torch.nn.Linear, lr=1), ["expected a class such as lamina.AdamW"]),
    (lambda: lm.times(-1), ["factor=-1"]),
    (lambda: lm.times(lm.linear(1, 2)), ["linear(1, 2)", "factor"]),
    (lambda: lm.by_depth(0), ["rate=0"]),
    (lambda: lm.top_down("often"), ["'often'"]),
]


@pytest.mark.parametrize(("make", "words"), BAD)
def test_what_contradicts_itself_says_where_and_what_to_do(make, words):
    with pytest.raises(lm.PlanError) as caught:
        make()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
def test_numpy_numbers_become_pythons(kind):
    plan = lm.Plan(
        lm.SGD,
        lr=kind(1),
        weight_decay=lambda info: kind(0),
        rules=[lm.Rule("head", momentum=kind(0), lr=lm.times(kind(1)), clip_norm=kind(2))],
    )
    for group in plan.build(mlp(), steps=2).param_groups:
        numbers = [group[key] for key in ("lr", "weight_decay", "momentum")]
        assert [type(number) in (int, float) for number in numbers] == [True] * 3
    assert "np." not in repr(plan)


def test_every_name_of_an_expression_is_on_the_door():
    from lamina.plan.validate import NAMES

    assert set(NAMES) <= set(lm.__all__)
    assert all(getattr(lm, name) is call for name, call in NAMES.items())


@pytest.mark.parametrize("text", ["x2", "x0.5", "x10"])
def test_a_factor_is_written_as_text_in_python_too(text):
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule("*", lr=text)])
    assert dict(plan.rules[0].settings)["lr"] == lm.times(float(text[1:]))

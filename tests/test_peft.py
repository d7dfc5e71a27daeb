"""Plans written for a base model, on the model that PEFT makes of it."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch

import lamina as lm
import test_recipes
from lamina.model.adapters import names_in_base
from test_recipes import backward

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT's own

PLAN = lm.Plan(
    lm.AdamW,
    lr=1e-2,
    clip_norm=1.0,
    rules=[
        lm.Rule("bert.encoder.layer.{depth}.*", lr=lm.by_depth(0.5)),
        lm.Rule("bert.encoder.layer.{depth}.*", thaw=lm.top_down(every=2)),
        lm.Rule("bert.embeddings.*", frozen=True),
        lm.Rule("classifier.*", lr=1e-3),
        lm.Rule("bert.encoder.layer.0.attention.self.query.weight", weight_decay=0.0),
    ],
)


def adapted(*names, **settings):
    config = {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    torch.manual_seed(0)
    model = peft.get_peft_model(test_recipes.bert(), peft.LoraConfig(**{**config, **settings}))
    for name in names:
        model.add_adapter(name, peft.LoraConfig(**{**config, **settings, "modules_to_save": None}))
    return model


def train(model, plan, steps=8):
    optimizer = plan.build(model, steps=steps)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def moved(before, after):
    there = dict(after.named_parameters())
    return {name for name, p in before.named_parameters() if not torch.equal(p, there[name])}


def test_a_plan_for_the_base_model_trains_the_adapters_and_nothing_else():
    model = adapted()
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.LaminaWarning)
        optimizer = train(model, PLAN)
    changed = moved(before, model)
    assert changed == {name for name, p in before.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    layers = [f"base_model.model.bert.encoder.layer.{n}.attention.self.query" for n in range(3)]
    groups = {
        info.name: (cell.windows, lm.values_at(optimizer.resolved, 7).lr(index))
        for index, cell in enumerate(optimizer.resolved.cells)
        for info in cell.parameters
    }
    assert [groups[f"{layer}.lora_B.default.weight"] for layer in layers] == [
        (((6, None),), 0.0025),
        (((4, None),), 0.005),
        (((2, None),), 0.01),
    ]
    assert groups["base_model.model.classifier.modules_to_save.default.bias"][1] == 1e-3
    assert not any(groups[f"{layer}.base_layer.weight"][0] for layer in layers)


def test_what_peft_froze_thaws_where_a_rule_says_so():
    model = adapted()
    before = copy.deepcopy(model)
    plan = lm.Plan(
        lm.AdamW, lr=1e-2, rules=[lm.Rule("bert.encoder.layer.2.*.base_layer.*", frozen=False)]
    )
    train(model, plan)
    base = {name for name in moved(before, model) if "base_layer" in name}
    assert base == {
        name for name, _ in before.named_parameters() if "layer.2" in name and "base_layer" in name
    }


def test_a_rate_for_each_adapter():
    model = adapted("second")
    model.base_model.set_adapter(["default", "second"])
    plan = lm.Plan(
        lm.AdamW,
        lr=1e-2,
        rules=[lm.Rule("*.lora_?.second.*", lr=1e-4), lm.Rule("*.lora_B.*", lr=lm.times(2))],
    )
    optimizer = train(model, plan)
    rate = {
        info.name.split("layer.0.attention.self.query.")[-1]: lm.values_at(
            optimizer.resolved, 0
        ).lr(index)
        for index, cell in enumerate(optimizer.resolved.cells)
        for info in cell.parameters
        if "layer.0.attention.self.query.lora" in info.name
    }
    assert rate == {
        "lora_A.default.weight": 1e-2,
        "lora_B.default.weight": 2e-2,
        "lora_A.second.weight": 1e-4,
        "lora_B.second.weight": 2e-4,
    }


def test_adapters_alone_are_saved_and_the_run_goes_on(tmp_path):
    whole = adapted()
    train(whole, PLAN, 8)

    model = adapted()
    optimizer = PLAN.build(model, steps=8)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    fresh = test_recipes.bert()
    model = peft.PeftModel.from_pretrained(fresh, tmp_path, is_trainable=True)
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    optimizer = PLAN.build(model, steps=8, resume=state, strict=True)
    for step in range(5, 8):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    assert not moved(whole, model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.0.weight", ["encoder.layer.0.weight"]),
        (
            "base_model.model.bert.q.lora_A.default.weight",
            ["bert.q.lora_A.default.weight", "bert.q.lora_A.weight"],
        ),
        ("base_model.model.bert.q.base_layer.weight", ["bert.q.weight"]),
        ("base_model.model.head.modules_to_save.a.weight", ["head.weight"]),
        ("base_model.model.head.original_module.weight", ["head.weight"]),
        ("base_model.model.bert.e.lora_embedding_A.default", ["bert.e.lora_embedding_A"]),
        ("base_model.model.bert.e.ia3_l.default", ["bert.e.ia3_l"]),
        ("base_layer.weight", ["base_layer.weight"]),  # of no adapter: the model's own name
    ],
)
def test_names_in_the_base_model(name, expected):
    found = names_in_base(name)
    assert found[0] == name
    assert set(expected) <= set(found)
    assert len(found) <= 4


def test_patterns_still_match_the_names_that_peft_gives():
    model = adapted()

    def plan(pattern):
        return lm.Plan("AdamW", lr=1e-3, rules=[lm.Rule(pattern, weight_decay=0.0)])

    for pattern in ("base_model.model.classifier.*", "*.lora_A.default.weight", "*.base_layer.*"):
        plan(pattern).preview(model, steps=2)
    with pytest.raises(lm.PatternError, match="matches none"):
        plan("bert.nothing.*").preview(model, steps=2)

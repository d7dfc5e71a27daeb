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


METHODS = {
    "dora": lambda: lora(use_dora=True),
    "adalora": lambda: config(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=8),
    "ia3": lambda: config(peft.IA3Config, feedforward_modules=[]),
    "loha": lambda: config(peft.LoHaConfig, r=2),
    "lokr": lambda: config(peft.LoKrConfig, r=2),
    "oft": lambda: config(peft.OFTConfig, oft_block_size=4),
    "boft": lambda: config(peft.BOFTConfig, boft_block_size=4),
    "vera": lambda: config(peft.VeraConfig, r=2),
    "hra": lambda: config(peft.HRAConfig, r=2),
    "embeddings": lambda: lora(target_modules=["query", "word_embeddings"]),
    "tokens": lambda: lora(trainable_token_indices={"word_embeddings": [1, 2]}),
    "biases": lambda: lora(bias="lora_only"),
}


def config(kind, **settings):
    given = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], **settings}
    torch.manual_seed(0)
    return peft.get_peft_model(test_recipes.bert(), kind(**given))


def lora(**settings):
    return config(peft.LoraConfig, r=2, **settings)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of kernels that are not installed
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_peft_lets_train(method):
    """Layers, embeddings (frozen by the plan) and head: each by the rule for the base model."""
    model = METHODS[method]()
    before = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.LaminaWarning)
        plan = lm.Plan.from_toml(
            PLAN.to_toml().split('[[rules]]\nmatch = "bert.encoder.layer.0.')[0]
        )
        optimizer = train(model, plan)
    able = {name for name, p in before.named_parameters() if p.requires_grad}
    assert moved(before, model) == {name for name in able if ".embeddings." not in name}
    rates = {
        info.name: lm.values_at(optimizer.resolved, 7).lr(index)
        for index, cell in enumerate(optimizer.resolved.cells)
        for info in cell.parameters
    }
    for name in able:
        if ".embeddings." not in name:
            layer = name.partition(".layer.")[2][:1]
            assert rates[name] == (1e-2 * 0.5 ** (2 - int(layer)) if layer else 1e-3), name


PROMPTS = {
    "prompt": (peft.PromptTuningConfig, {}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
}


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")  # the others that a step gives
@pytest.mark.parametrize("method", PROMPTS)
def test_trained_prompts(method):
    kind, settings = PROMPTS[method]
    given = kind(task_type="SEQ_CLS", num_virtual_tokens=2, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(test_recipes.bert(), given)
    before = copy.deepcopy(model)
    # A rate for layers that never train is told, since a prompt has no layers.
    with pytest.warns(lm.LaminaWarning, match="lr-never-trains: rule 'bert.encoder.layer"):
        train(model, PLAN)
    able = {name for name, p in before.named_parameters() if p.requires_grad}
    assert moved(before, model) == able
    assert any(name.startswith("prompt_encoder.") for name in able)


def test_a_base_model_of_ones_own_is_no_prompt():
    model = torch.nn.ModuleDict({"base_model": torch.nn.Linear(2, 2)})
    with pytest.raises(lm.PatternError, match="matches none"):
        lm.Plan("SGD", lr=0.1, rules=[lm.Rule("weight", lr=1.0)]).preview(model, steps=2)


@pytest.mark.parametrize(
    "adapter", ["query", "layer", "0", "bert", "lora_A", "weight", "modules_to_save"]
)
def test_adapters_named_like_parts_of_the_model(adapter):
    torch.manual_seed(0)
    given = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
    settings = peft.LoraConfig(r=2, **given)
    model = peft.get_peft_model(test_recipes.bert(), settings, adapter_name=adapter)
    before = copy.deepcopy(model)
    optimizer = train(model, PLAN)
    assert moved(before, model) == {n for n, p in before.named_parameters() if p.requires_grad}
    layers = {
        (info.name.partition(".layer.")[2][0], cell.windows)
        for cell in optimizer.resolved.cells
        for info in cell.parameters
        if ".lora_" in info.name and ".layer." in info.name
    }
    assert layers == {("0", ((6, None),)), ("1", ((4, None),)), ("2", ((2, None),))}


def steps(model, optimizer, count=3):
    for step in range(count):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


SIMPLE = lm.Plan(lm.AdamW, lr=1e-2, rules=[lm.Rule("*.lora_B.*", lr=lm.times(2))])


def test_merging_in_the_middle_is_told():
    model = adapted()
    optimizer = SIMPLE.build(model, steps=9)
    steps(model, optimizer)
    model.merge_adapter()
    with pytest.warns(lm.LaminaWarning, match="adapters-merged: .*query"):
        steps(model, optimizer)
    model.unmerge_adapter()
    before = copy.deepcopy(model)
    steps(model, optimizer)
    assert any("lora_A" in name for name in moved(before, model))


def test_a_plan_on_merged_adapters_is_told():
    model = adapted()
    model.merge_adapter()
    with pytest.warns(lm.LaminaWarning, match="adapters-merged"):
        optimizer = SIMPLE.build(model, steps=9)
    assert "adapters-merged" in {finding.code for finding in optimizer.findings}


def test_merge_and_unload_in_the_middle_is_told():
    model = adapted()
    optimizer = SIMPLE.build(model, steps=9)
    steps(model, optimizer)
    model.merge_and_unload()
    with pytest.warns(lm.LaminaWarning, match="adapters-removed: .*merge_and_unload"):
        steps(model, optimizer)


def test_merge_and_unload_before_the_build():
    model = adapted().merge_and_unload()
    model.requires_grad_(True)
    before = copy.deepcopy(model)
    train(model, PLAN)
    still = {name for name, _ in before.named_parameters()} - moved(before, model)
    assert still
    assert all(".embeddings." in name for name in still)


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")  # the others that a step gives
def test_another_adapter_in_the_middle_of_a_run():
    """What PEFT switches off stands still, with a warning; what it switches on was frozen."""
    model = adapted("second")
    with pytest.warns(lm.LaminaWarning, match="frozen-by-model: .*second"):
        optimizer = SIMPLE.build(model, steps=9)
    steps(model, optimizer)
    model.set_adapter("second")
    before = copy.deepcopy(model)
    with pytest.warns(lm.LaminaWarning, match="requires-grad-o"):
        steps(model, optimizer)
    assert not any(".default." in name and "lora" in name for name in moved(before, model))
    assert not any(".second." in name for name in moved(before, model))


@pytest.mark.filterwarnings("ignore::lamina.LaminaWarning")  # the others that a step gives
def test_two_adapters_in_turn_when_the_plan_says_so():
    model = adapted("second")
    plan = lm.Plan(
        lm.AdamW,
        lr=1e-2,
        rules=[lm.Rule("*.lora_?.second.*", lr=1e-3, frozen=False)],
    )
    optimizer = plan.build(model, steps=9)
    model.set_adapter("default")
    before = copy.deepcopy(model)
    with pytest.warns(lm.LaminaWarning, match="requires-grad-off"):
        steps(model, optimizer)
    assert not any(".second." in name for name in moved(before, model))
    model.set_adapter("second")
    before = copy.deepcopy(model)
    with pytest.warns(lm.LaminaWarning, match="requires-grad-off"):
        steps(model, optimizer)
    second = {name for name in moved(before, model) if ".second." in name}
    assert {name.split(".")[-3] for name in second} == {"lora_A", "lora_B"}


def quantized_by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.bert.encoder, quantization.Int8WeightOnlyConfig())


def quantized_by_bitsandbytes(model, kind="Linear8bitLt"):
    layers = pytest.importorskip("bitsandbytes").nn
    for layer in model.bert.encoder.layer:
        for name in ("query", "value"):
            old = getattr(layer.attention.self, name)
            new = getattr(layers, kind)(old.in_features, old.out_features)
            if kind == "Linear8bitLt":
                new = layers.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            setattr(layer.attention.self, name, new.to("cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what these packages say while they are imported
@pytest.mark.parametrize(
    "quantize",
    [
        quantized_by_torchao,
        quantized_by_bitsandbytes,
        lambda model: quantized_by_bitsandbytes(model, "Linear4bit"),
    ],
    ids=["torchao int8", "bitsandbytes int8", "bitsandbytes 4 bit"],
)
def test_quantized_bases(quantize):
    """The adapters train as over any base, the base stays, and the run resumes in the middle."""

    def make():
        model = test_recipes.bert()
        quantize(model)
        model.requires_grad_(False)
        torch.manual_seed(0)
        given = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        return peft.get_peft_model(model, peft.LoraConfig(r=2, **given))

    model, again = make(), make()
    able = [name for name, p in model.named_parameters() if p.requires_grad]
    before = {name: model.get_parameter(name).detach().clone() for name in able}
    quantized = {id(p) for p in model.parameters() if not p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("error", lm.LaminaWarning)
        optimizer = PLAN.build(model, steps=8)
        steps(model, optimizer, 5)
        for name in able:
            again.get_parameter(name).data.copy_(model.get_parameter(name))
        other = PLAN.build(again, steps=8, resume=optimizer.state_dict(), strict=True)
        steps(model, optimizer)
        steps(again, other)
    assert quantized == {id(p) for p in model.parameters() if not p.requires_grad}
    for name in able:
        assert not torch.equal(before[name], model.get_parameter(name)), name
        assert torch.equal(again.get_parameter(name), model.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what these packages say while they are imported
def test_a_quantized_base_that_a_rule_wants_to_train():
    model = test_recipes.bert()
    quantized_by_bitsandbytes(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
    plan = lm.Plan("AdamW", lr=1e-3, rules=[lm.Rule("*.base_layer.*", frozen=False)])
    with pytest.warns(lm.LaminaWarning, match="cannot-train: .*base_layer.weight"):
        plan.build(model, steps=2)


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

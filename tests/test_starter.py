"""Starter plans: the parts of well-known models, plans without findings, texts that hold them."""

import re
import warnings
from collections import OrderedDict

import pytest
from benchmarks import starter_plans
from torch import nn

import lamina as lm
from lamina.model.patterns import compile_pattern
from models import Encoder, Tied, Wrapper, backward, encoder

#: what a person would write for the layers, below them, above them, the head, and without decay
EXPECTED = {
    "MiniLM-L6 (a BERT) with a classifier": (
        "bert.encoder.layer.{depth}.*",
        "bert.embeddings.*",
        "bert.pooler.*",
        "classifier.*",
        "ndim<2",
    ),
    "EfficientNet-Lite0": (
        "_blocks.{depth}.*",
        "_conv_stem.* | _bn0.*",
        "_conv_head.* | _bn1.*",
        "_fc.*",
        "ndim<2",
    ),
    "GPT-2": (
        "transformer.h.{depth}.*",
        "transformer.wte.* | transformer.wpe.*",
        "transformer.ln_f.*",
        None,
        "ndim<2",
    ),
    "ViT-Base": (
        "vit.layers.{depth}.* | vit.encoder.layer.{depth}.*",
        "vit.embeddings.*",
        "vit.layernorm.*",
        "classifier.*",
        "ndim<2 | *.cls_token | *.position_embeddings",
    ),
    "Swin-Tiny": (
        "swin.encoder.layers.{depth}.*",
        "swin.embeddings.*",
        "swin.layernorm.*",
        "classifier.*",
        "ndim<2 | *.relative_position_bias_table",
    ),
    "T5-Small": (
        "{encoder.block.,decoder.block.}{depth}.*",
        "shared.*",
        "encoder.final_layer_norm.* | decoder.final_layer_norm.*",
        None,
        "ndim<2",
    ),
    "ResNet-18": (
        "resnet.encoder.stages.{depth}.*",
        "resnet.embedder.*",
        None,
        "classifier.*",
        "ndim<2",
    ),
    "Llama of 7 billion": (
        "model.layers.{depth}.*",
        "model.embed_tokens.*",
        "model.norm.*",
        None,
        "ndim<2",
    ),
}


@pytest.fixture(scope="module")
def models():
    """The models of the page, on the meta device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformers, about its configurations
        return {name: build() for name, build in starter_plans.MODELS.items()}


def names(model, pattern):
    """The parameters that a pattern selects."""
    plan = lm.Plan("SGD", lr=1.0, rules=[lm.Rule(pattern, lr=2.0)])
    cells = lm.resolve_plan(plan, model).cells
    return {i.name for cell in cells for i in cell.parameters if cell.constants["lr"] == 2.0}


def uncommented(text):
    """A plan with the rules that it suggests in comments."""
    text = text.partition("# Names and shapes")[0]
    block = re.compile(r"^# (\[\[rule\]\]|match = .*|[a-z_]+ = .*)$", re.MULTILINE)
    return block.sub(r"\1", text)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_parts_of_well_known_models(name, models):
    model = models[name]
    found = lm.starter_plan(model).anatomy
    layers, below, above, head, no_decay = EXPECTED[name]
    if name == "ViT-Base":  # its layers were moved between versions of Transformers
        layers = next(each for each in layers.split(" | ") if _fits(model, each))
    in_layers = {each for stack in found.stacks for each in stack.names}
    assert in_layers == names(model, layers)
    for part, pattern in ((found.below, below), (found.above, above), (found.head, head)):
        assert set(part) == (names(model, pattern) if pattern else set())
    every = [*in_layers, *found.below, *found.above, *found.head, *found.output]
    assert set(every) == {info.name for info in found.infos}
    plan = lm.starter_plan(model).plan
    free = [rule.match for rule in plan.rules if dict(rule.settings).get("weight_decay") == 0]
    assert free == [no_decay]


def _fits(model, pattern):
    try:
        return bool(names(model, pattern))
    except lm.PatternError:
        return False


@pytest.mark.parametrize("name", EXPECTED)
def test_plans_resolve_without_findings_also_with_what_they_suggest(name, models):
    model = models[name]
    found = lm.starter_plan(model)
    assert lm.Plan.from_toml(found.toml) == found.plan
    preview = found.plan.preview(model, steps=1000)
    assert preview.findings == ()
    assert sum(row.parameters for row in preview.rows) == sum(p.numel() for p in model.parameters())
    more = lm.Plan.from_toml(uncommented(found.toml))
    assert len(more.rules) > len(found.plan.rules)
    codes = {finding.code for finding in more.preview(model, steps=1000).findings}
    assert codes <= {"rule-without-effect"}


@pytest.mark.parametrize("name", ["EfficientNet-Lite0", "GPT-2", "Swin-Tiny", "T5-Small"])
def test_patterns_of_the_listed_names_select_something(name, models):
    listed = lm.starter_plan(models[name]).toml.partition("# Names and shapes")[2]
    lines = [line[2:] for line in listed.splitlines() if line.startswith("# ")]
    patterns = [line.split("  ")[0] for line in lines if "." in line.split("  ")[0]]
    patterns += re.findall(r"type:\w+", listed)
    assert len(patterns) > 8
    covered = set()
    for pattern in patterns:
        covered |= names(models[name], pattern)
    assert covered == {info.name for info in lm.starter_plan(models[name]).anatomy.infos}


def test_the_page_is_current(models, monkeypatch):
    built = {name: (lambda model=model: model) for name, model in models.items()}
    monkeypatch.setattr(starter_plans, "MODELS", built)
    assert starter_plans.page() == starter_plans.PAGE.read_text(encoding="utf-8")


# --------------------------------------------------------------------------- two-level numbering


def test_decay_from_part_to_part_is_as_if_they_were_numbered_through(models):
    model = models["ResNet-18"]
    text = uncommented(lm.starter_plan(model).toml)
    rules = [
        rule
        for rule in lm.Plan.from_toml(text).rules
        if re.fullmatch(r"resnet\.encoder\.stages\.\d\.layers\.\{depth\}\.\*", rule.match)
    ]
    assert len(rules) == 4
    preview = lm.Plan("SGD", lr=1.0, rules=rules).preview(model)
    values, resolved = preview.at(0), preview.resolved
    for name, index in resolved.cell_of.items():
        place = re.search(r"stages\.(\d)\.layers\.(\d)", name)
        if place:
            steps = 8 - (2 * int(place[1]) + int(place[2]))  # two blocks in each of four stages
        else:
            steps = 9 if "embedder" in name else 0
        assert values[resolved.cells[index].name]["lr"] == pytest.approx(0.8**steps), name


class Stages(nn.Module):
    """Named as torchvision's ResNets are: `layer1.0.conv1` and so on."""

    def __init__(self, blocks=(2, 2, 1, 1)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        for number, count in enumerate(blocks, 1):
            setattr(self, f"layer{number}", nn.Sequential(*(self.block() for _ in range(count))))
        self.fc = nn.Linear(4, 10)

    @staticmethod
    def block():
        return nn.Sequential(
            OrderedDict(conv1=nn.Conv2d(4, 4, 3), bn1=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 4, 3))
        )


def test_numbers_at_the_end_of_a_word():
    found = lm.starter_plan(Stages())
    (first, head, small) = found.plan.rules
    assert first.match == "layer{depth}.*"
    decay = dict(first.settings)["lr"]
    assert (decay.below, decay.above) == ("conv1.* | bn1.*", "fc.*")
    assert (head.match, small.match) == ("fc.*", "ndim<2")
    assert "type:BatchNorm2d" in found.toml
    assert "layer{depth}.*.conv1.weight" in found.toml
    assert found.plan.preview(Stages(), steps=100).findings == ()


class Vgg(nn.Module):
    """Numbered convolutions, then numbered linear layers of which the last one is the head."""

    def __init__(self):
        super().__init__()
        layers = [part for _ in range(4) for part in (nn.Conv2d(3, 3, 3), nn.ReLU())]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)
        )


def test_of_a_part_with_many_matrices_the_last_one_is_the_head():
    found = lm.starter_plan(Vgg()).anatomy
    assert [stack.prefix for stack in found.stacks] == ["features."]
    assert found.stacks[0].numbers == (0, 2, 4, 6)
    assert found.head == ("classifier.4.weight", "classifier.4.bias")
    assert found.above[0] == "classifier.0.weight"


# ------------------------------------------------------------------------------- other situations


def test_names_are_not_what_decides():
    model = nn.Sequential(
        OrderedDict(
            a=nn.Embedding(30, 4),
            b=nn.ModuleDict({str(n): nn.Linear(4, 4) for n in (3, 7, 5)}),
            c=nn.LayerNorm(4),
            d=nn.Linear(4, 2),
        )
    )
    found = lm.starter_plan(model)
    assert found.anatomy.stacks[0].numbers == (3, 5, 7)
    first, head, small = found.plan.rules
    assert first == lm.Rule("b.{depth}.*", lr=lm.by_depth(0.9, below="a.*", above="c.* | d.*"))
    assert (head.match, small.match) == ("d.*", "ndim<2")


def test_a_small_model_gets_a_plain_plan():
    for model in (nn.Linear(3, 2), Tied(), nn.Sequential(nn.Linear(2, 2), nn.Tanh())):
        found = lm.starter_plan(model)
        assert [rule.match for rule in found.plan.rules] in ([], ["ndim<2"])
        assert found.plan.preview(model, steps=10).findings == ()
    assert "tied, each updated once: encoder.weight = decoder.weight" in str(
        lm.starter_plan(Tied())
    )


def test_a_wrapper_around_the_model_changes_nothing():
    plain, wrapped = lm.starter_plan(Encoder()), lm.starter_plan(Wrapper(Encoder()))
    assert wrapped.plan == plain.plan


def test_what_is_frozen_stays_so_and_the_plan_says_it():
    model = Encoder()
    model.embeddings.requires_grad_(False)
    found = lm.starter_plan(model)
    assert found.plan.rules[-1] == lm.Rule("embeddings.*", frozen=True)
    assert found.plan.preview(model, steps=10).findings == ()


def test_adapters_on_a_frozen_model():
    model = Encoder().requires_grad_(False)
    for layer in model.encoder.layer.values():
        layer.dense.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        layer.dense.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})
    found = lm.starter_plan(model)
    assert found.anatomy.adapters
    assert found.plan.rules == ()
    assert "adapters" in found.toml
    preview = found.plan.preview(model, steps=10)
    assert preview.findings == ()
    assert sum(row.parameters for row in preview.rows if row.first is not None) == 3 * 12


def test_odd_names_are_written_as_patterns_that_hold():
    model = nn.Module()
    model.add_module("a b", nn.Embedding(9, 2))
    model.add_module('q"uote', nn.Linear(2, 2))
    model.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model.add_module("head|!", nn.Linear(2, 5))
    model.add_module("new\nline", nn.Linear(5, 7))
    model.add_module("x\noptimizer = 1", nn.Linear(7, 7))
    found = lm.starter_plan(model)
    assert lm.Plan.from_toml(found.toml) == found.plan
    assert found.plan.preview(model, steps=10).findings == ()
    assert "# optimizer = 1" not in found.toml
    assert "\noptimizer = 1" not in found.toml


def test_deep_models_have_a_floor_under_the_decay():
    model = Encoder(layers=tuple(range(60)))
    model.embeddings = nn.Embedding(9, 3)
    (first, *_) = lm.starter_plan(model).plan.rules
    assert dict(first.settings)["lr"].least == 0.01


def test_many_tensors_are_examined_in_proportion(monkeypatch):
    """A thousand layers of ten tensors: no more patterns are tried than for a small model."""
    tried, name = [], "lamina.starter.selecting.compile_pattern"
    monkeypatch.setattr(name, lambda text: tried.append(text) or compile_pattern(text))
    counts = []
    for layers in (10, 1000):
        model = nn.Module()
        model.layer = nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(layers))
        model.head = nn.Linear(1, 2, device="meta")
        tried.clear()
        assert len(str(lm.starter_plan(model)).splitlines()) < 60
        counts.append(len(tried))
    assert counts[0] == counts[1]


def test_a_model_trains_by_its_starter_plan():
    model = encoder()
    optimizer = lm.starter_plan(model).plan.build(model, steps=30)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(backward(model))
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("given", [None, Encoder, [nn.Linear(1, 1)], nn.ReLU()])
def test_what_is_no_model(given):
    with pytest.raises(lm.PlanError, match=r"expected a torch.nn.Module|has no parameters"):
        lm.starter_plan(given)

"""`by_depth` with embeddings below and a head above, against tables written by hand."""

import pytest
import torch
from torch import nn

import lamina as lm
from models import encoder, train


class Vision(nn.Module):
    """Named as in timm's vision transformers: tokens, `blocks.N`, a norm, a head."""

    def __init__(self, blocks=4):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 3))
        self.patch_embed = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(blocks))
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)


STEM = "cls_token | pos_embed | patch_embed.*"
TOP = "norm.* | head.*"


def factors(model, rule):
    """The factor that a rule puts on the lr of each parameter."""
    at = lm.Plan("SGD", lr=1.0, rules=[rule]).preview(model)
    values = at.at(0)
    return {
        info.name: values[cell.name]["lr"] for cell in at.resolved.cells for info in cell.parameters
    }


def timm_table(rate, blocks=4):
    """timm's layer ids, from 0 for the stem to `blocks + 1` for the head, as it writes them."""
    ids = {"cls_token": 0, "pos_embed": 0, "patch_embed.weight": 0, "patch_embed.bias": 0}
    for block in range(blocks):
        ids |= dict.fromkeys((f"blocks.{block}.weight", f"blocks.{block}.bias"), block + 1)
    top = blocks + 1
    ids |= dict.fromkeys(("norm.weight", "norm.bias", "head.weight", "head.bias"), top)
    return {name: rate ** (top - layer) for name, layer in ids.items()}


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.65])
def test_embeddings_and_head_take_part_as_in_beit_and_timm(rate):
    rule = lm.Rule("blocks.{depth}.*", lr=lm.by_depth(rate, below=STEM, above=TOP))
    assert factors(Vision(), rule) == timm_table(rate)


def test_one_end_alone():
    below = factors(Vision(2), lm.Rule("blocks.{depth}.*", lr=lm.by_depth(0.5, below=STEM)))
    assert {below[name] for name in ("cls_token", "patch_embed.bias")} == {0.25}
    assert (below["blocks.0.weight"], below["blocks.1.weight"], below["head.bias"]) == (0.5, 1, 1)
    above = factors(Vision(2), lm.Rule("blocks.{depth}.*", lr=lm.by_depth(0.5, above=TOP)))
    assert (above["blocks.0.weight"], above["blocks.1.weight"]) == (0.25, 0.5)
    assert (above["norm.bias"], above["head.weight"], above["pos_embed"]) == (1, 1, 1)


def test_least_is_a_floor_under_every_factor():
    decay = lm.by_depth(0.5, below=STEM, above=TOP, least=0.2)
    found = factors(Vision(), lm.Rule("blocks.{depth}.*", lr=decay))
    assert [found[f"blocks.{block}.bias"] for block in range(4)] == [0.2, 0.2, 0.25, 0.5]
    assert (found["pos_embed"], found["head.bias"]) == (0.2, 1.0)


def test_numbers_with_gaps_and_parameters_without_a_number():
    model = encoder(layers=(2, 3, 7))
    decay = lm.by_depth(0.5, above="classifier")
    rule = lm.Rule("encoder.layer.{depth}.* | classifier.*", lr=decay)
    found = factors(model, rule)
    assert found["embeddings.weight"] == 1.0
    assert found["classifier.bias"] == 1.0
    assert [found[f"encoder.layer.{n}.norm.bias"] for n in (2, 3, 7)] == [0.125, 0.25, 0.5]
    rule = lm.Rule("encoder.layer.{depth}.* | classifier.*", lr=lm.by_depth(0.5))
    assert factors(model, rule)["classifier.bias"] == 1.0


def test_other_settings_of_the_rule_stay_with_what_it_selects():
    rule = lm.Rule("blocks.{depth}.*", lr=lm.by_depth(0.5, below=STEM), weight_decay=0.3, thaw=5)
    plan = lm.Plan("AdamW", lr=1.0, weight_decay=0.1, rules=[rule])
    preview = plan.preview(Vision(), steps=10)
    values, cells = preview.at(6), preview.resolved
    group = cells.cells[cells.cell_of["pos_embed"]]
    assert group.name == STEM
    assert (values[group.name]["lr"], values[group.name]["weight_decay"]) == (0.0625, 0.1)
    assert values["blocks.3.*"]["weight_decay"] == 0.3
    assert preview.at(0)[group.name]["lr"] == 0.0625
    explained = str(preview.explain("pos_embed"))
    assert f"by_depth(0.5, below='{STEM}')" in explained.replace('"', "'")
    assert preview.findings == ()


def test_it_acts_on_what_earlier_rules_gave_and_on_any_setting():
    rules = [
        lm.Rule("pos_embed", weight_decay=0.4),
        lm.Rule("blocks.{depth}.*", weight_decay=lm.by_depth(0.5, below="pos_embed")),
    ]
    preview = lm.Plan("AdamW", lr=1.0, weight_decay=0.8, rules=rules).preview(Vision(2))
    values, cells = preview.at(0), preview.resolved
    decays = [
        values[cells.cells[cells.cell_of[name]].name]["weight_decay"]
        for name in ("pos_embed", "blocks.0.bias", "blocks.1.bias", "head.bias")
    ]
    assert decays == [0.1, 0.4, 0.8, 0.8]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_weights_move_as_with_groups_written_by_hand(optimizer):
    rate = 0.5
    decay = lm.by_depth(rate, below="embeddings", above="classifier", least=0.1)
    plan = lm.Plan(optimizer, lr=0.1, rules=[lm.Rule("encoder.layer.{depth}.*", lr=decay)])
    model, other = encoder(), encoder()
    places = {"embeddings": 4, "encoder.layer.0": 3, "encoder.layer.1": 2, "encoder.layer.2": 1}
    groups = []
    for name, param in other.named_parameters():
        power = next((n for prefix, n in places.items() if name.startswith(prefix)), 0)
        groups.append({"params": [param], "lr": 0.1 * max(rate**power, 0.1)})
    train(model, plan.build(model, steps=6), 6)
    train(other, getattr(torch.optim, optimizer)(groups, lr=0.1), 6)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12, msg=name)


def test_toml_holds_it_both_ways():
    text = """
optimizer = "AdamW"
lr = 1e-3
[[rule]]
match = "blocks.{depth}.*"
lr = 'by_depth(0.75, below="cls_token | pos_embed", above="head.*", least=0.05)'
"""
    plan = lm.Plan.from_toml(text)
    decay = lm.by_depth(0.75, below="cls_token | pos_embed", above="head.*", least=0.05)
    assert plan.rules == (lm.Rule("blocks.{depth}.*", lr=decay),)
    assert lm.Plan.from_toml(plan.to_toml()) == plan
    assert factors(Vision(), plan.rules[0])["cls_token"] == 0.75**5


def test_a_run_goes_on_with_it():
    plan = lm.Plan(
        "AdamW",
        lr=0.1,
        rules=[lm.Rule("encoder.layer.{depth}.*", lr=lm.by_depth(0.5, below="embeddings"))],
    )
    whole, cut = encoder(), encoder()
    train(whole, plan.build(whole, steps=6), 6)
    optimizer = plan.build(cut, steps=6)
    train(cut, optimizer, 3)
    train(cut, plan.build(cut, steps=6, resume=optimizer.state_dict()), 3, first=3)
    assert all(map(torch.equal, whole.parameters(), cut.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"below": 3}, "below=3; expected a pattern"),
        ({"above": ["a", "b"]}, r"above=\['a', 'b'\]; expected a pattern"),
        ({"below": "blocks.{depth}"}, "leave out {depth}"),
        ({"above": "a b"}, "cannot read the pattern 'a b'"),
        ({"below": 'a"b'}, "quotation mark"),
        ({"least": 0}, "least=0; expected a number above 0"),
        ({"least": 2.0}, "least=2.0; expected"),
        ({"least": True}, "least=True; expected"),
        ({"least": float("nan")}, "least=nan; expected"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(lm.PlanError, match=message):
        lm.by_depth(0.5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"below": "embed.*"}, "below='embed.*' matches none|below='embed.*' matches no"),
        ({"above": "blocks.3.weight"}, "'blocks.3.weight', which is layer 3 already"),
        ({"below": "norm.*", "above": TOP}, "'norm.weight', which is below the layers already"),
    ],
)
def test_ends_that_do_not_fit_the_model(arguments, message):
    plan = lm.Plan(
        "SGD", lr=1.0, rules=[lm.Rule("blocks.{depth}.*", lr=lm.by_depth(0.5, **arguments))]
    )
    with pytest.raises(lm.PatternError, match=message):
        plan.preview(Vision())

"""Each recipe next to the code that it stands for: the same weights after twenty steps."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.recipes import CASES, Case, backward, bert, compare

import lamina as lm
from lamina import recipes

__all__ = ["backward", "bert"]  # other tests train this model too

#: what the extra `dev` does not bring
FOREIGN = ("timm", "fastai", "muon")


def assert_same(case: Case) -> None:
    found = compare(case)
    assert found.difference <= case.tolerance
    assert found.moved > 1e-3
    rests = {"ulmfit": "embeddings", "lora_plus": ""}.get(case.recipe.partition("(")[0])
    assert bool(found.still) == (rests is not None)
    assert all(rests in name for name in found.still)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT's own
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.module not in FOREIGN], ids=lambda c: c.original
)
def test_the_weights_are_those_of_the_original(case):
    assert_same(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what these packages say while they are imported
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.module in FOREIGN], ids=lambda c: c.original
)
def test_the_weights_are_those_of_packages_from_elsewhere(case):
    pytest.importorskip(case.module)
    assert_same(case)


def test_another_rate_is_another_outcome():
    """The comparison fails where the recipe does not say what the original does."""
    case = next(case for case in CASES if case.original.startswith("the formula of BEiT"))
    wrong = lm.Plan.from_toml(case.plan.to_toml().replace("0.6", "0.59"))
    assert wrong != case.plan
    assert compare(dataclasses.replace(case, plan=wrong)).difference > 1e-5


@pytest.mark.parametrize(
    "plan",
    [
        recipes.no_decay(lr=1e-3),
        recipes.layer_decay("layer.{depth}.*", lr=1e-3),
        recipes.ulmfit("layer.{depth}.*", lr=1e-3, head="head.*", rest="embeddings.*"),
        recipes.probe_then_finetune("head.*", probe="2 epochs", lr=1e-3, finetune_lr=1e-5),
        recipes.lora_plus(lr=1e-3),
        recipes.muon("layer.*"),
        recipes.warmup_stable_decay(lr=1e-3, clip_norm=1.0),
    ],
)
def test_recipes_are_plans_to_read_and_change(plan):
    assert lm.Plan.from_toml(plan.to_toml()) == plan


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: recipes.layer_decay("a.{depth}", lr=1e-3, embeddings=0), r"below=0.*a pattern"),
        (lambda: recipes.layer_decay("a.{depth}", lr=1e-3, gap=-1), r"gap=-1"),
        (lambda: recipes.layer_decay("a.*", lr=1e-3), "capture"),
        (lambda: recipes.ulmfit("a.{depth}", lr=1e-3, head="b", factor=0), r"factor=0"),
        (lambda: recipes.lora_plus(lr=1e-3, ratio=-1), r"ratio=-1.*above 0"),
    ],
)
def test_mistakes_have_a_name(call, words):
    with pytest.raises(lm.LaminaError, match=words):
        call()

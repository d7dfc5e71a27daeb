"""Each recipe next to the code that it stands for: the same weights after twenty steps."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import lamina as lm
from lamina import recipes

STEPS = 20
LAYERS = 3


def bert() -> transformers.BertForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(1, 50, (4, 8), generator=generator)
    model(input_ids=words, labels=words[:, 0] % 2).loss.backward()


def assert_same(model, plan: lm.Plan, train, *, steps_per_epoch=None, atol=2e-7) -> None:
    """Compare the plan with a function that trains a copy by hand: `train(model, steps)`."""
    other = copy.deepcopy(model)
    optimizer = plan.build(model, steps=STEPS, steps_per_epoch=steps_per_epoch)
    for step in range(STEPS):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(other)
    train(other)
    there = dict(other.named_parameters())
    start = dict(before.named_parameters())
    moved = 0
    for name, param in model.named_parameters():
        torch.testing.assert_close(param, there[name], rtol=0, atol=atol, msg=name)
        moved += not torch.equal(param, start[name])
    assert moved


def loop(model, *optimizers, scheduler=None, at=None):
    for step in range(STEPS):
        if at is not None:
            at(step)
        backward(model, step)
        for optimizer in optimizers:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        model.zero_grad()


def test_no_decay_as_in_transformers(tmp_path):
    def train(model):
        arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        trainer = transformers.Trainer(model, arguments)
        decayed = trainer.get_decay_parameter_names(model)
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ]
        loop(model, torch.optim.AdamW(groups, lr=1e-3))

    assert_same(bert(), recipes.no_decay(lr=1e-3, weight_decay=0.1), train)


def depth_of(name: str) -> int:
    """Number the parts of a BERT from below: embeddings 0, layers from 1, head at the end."""
    if ".embeddings." in name:
        return 0
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0]) + 1
    return LAYERS + 1


@pytest.mark.parametrize("gap", [1, 2])
def test_layer_decay_as_in_beit_and_electra(gap):
    def train(model):
        groups = []
        for name, param in model.named_parameters():
            above = LAYERS + gap - depth_of(name)
            power = 0 if depth_of(name) > LAYERS else above
            decay = 0.0 if param.ndim < 2 else 0.05
            groups.append({"params": [param], "lr": 1e-3 * 0.6**power, "weight_decay": decay})
        loop(model, torch.optim.AdamW(groups))

    plan = recipes.layer_decay(
        "bert.encoder.layer.{depth}.*",
        lr=1e-3,
        decay=0.6,
        embeddings="bert.embeddings.*",
        gap=gap,
    )
    assert_same(bert(), plan, train)


def test_ulmfit_as_written_by_hand():
    def train(model):
        def at(step):
            for name, param in model.named_parameters():
                below = LAYERS - depth_of(name)  # layers above this one, for layers
                if ".layer." in name:
                    param.requires_grad_(step >= 5 * (below + 1))

        groups = []
        for name, param in model.named_parameters():
            if ".embeddings." in name:
                param.requires_grad_(False)
                continue
            power = LAYERS + 1 - depth_of(name) if ".layer." in name else 0
            groups.append({"params": [param], "lr": 1e-3 / 2.6**power})
        loop(model, torch.optim.AdamW(groups), at=at)

    plan = recipes.ulmfit(
        "bert.encoder.layer.{depth}.*",
        lr=1e-3,
        head="bert.pooler.* | classifier.*",
        rest="bert.embeddings.*",
    )
    assert_same(bert(), plan, train, steps_per_epoch=5)


def test_probe_then_finetune_as_written_by_hand():
    def train(model):
        body = [p for n, p in model.named_parameters() if not n.startswith("classifier")]
        head = list(model.classifier.parameters())
        groups = [{"params": head, "lr": 1e-2}, {"params": body, "lr": 1e-4}]

        def at(step):
            for param in body:
                param.requires_grad_(step >= 8)

        loop(model, torch.optim.AdamW(groups), at=at)

    plan = recipes.probe_then_finetune("classifier.*", probe=8, lr=1e-2, finetune_lr=1e-4)
    assert_same(bert(), plan, train)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # PEFT's own
@pytest.mark.parametrize("embeddings", [None, "*lora_embedding_*"])
def test_lora_plus_as_in_peft(embeddings):
    targets = ["query", "value", *(["word_embeddings"] if embeddings else [])]
    torch.manual_seed(0)
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=targets))

    def train(model):
        loop(
            model,
            create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=1e-4
            ),
        )

    plan = recipes.lora_plus(lr=1e-3, ratio=8.0, embeddings=embeddings, embedding_lr=1e-4)
    assert_same(model, plan, train)


def test_muon_as_in_torch():
    torch_muon = pytest.importorskip("torch.optim", reason="torch 2.9").__dict__.get("Muon")
    if torch_muon is None:
        pytest.skip("torch has Muon from 2.9 on")

    def train(model):
        named = dict(model.named_parameters())
        hidden = [p for n, p in named.items() if ".layer." in n and p.ndim == 2]
        rest = [p for n, p in named.items() if not (".layer." in n and p.ndim == 2)]
        loop(
            model,
            torch_muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0),
        )

    # A last digit that AdamW rounds otherwise becomes one of bfloat16 inside Muon; its weights move
    # by up to 20 steps of 0.02.
    assert_same(bert(), recipes.muon("bert.encoder.layer.*"), train, atol=0.05 * 20 * 0.02)


def test_warmup_stable_decay_as_in_transformers():
    def train(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        scheduler = transformers.get_wsd_schedule(
            optimizer,
            num_warmup_steps=4,
            num_decay_steps=6,
            num_training_steps=STEPS,
            decay_type="linear",
        )
        loop(model, optimizer, scheduler=scheduler)

    plan = recipes.warmup_stable_decay(lr=1e-3, warm=4, decay=6, weight_decay=0.01)
    assert_same(bert(), plan, train)


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

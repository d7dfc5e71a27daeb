"""TRL's trainers with a plan. The test environment has no TRL: `pip install trl` to run them."""

from __future__ import annotations

import pytest
import torch
import transformers

import lamina as lm
from lamina.integrations.transformers import use_plan

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PLAN = lm.Plan(
    lm.AdamW,
    lr=1e-2,
    clip_norm=1.0,
    schedule=lm.warmup("10%") >> lm.cosine(),
    feedback=lm.plateau("eval_loss", patience=0),
    rules=[
        lm.Rule("transformer.h.{depth}.*", thaw=lm.top_down(every=2)),
        lm.Rule("transformer.wte.*", frozen=True),
    ],
)
COMMON = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 2,
    "eval_strategy": "epoch",
    "save_strategy": "steps",
    "save_steps": 7,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}
WORDS = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghxy"])}


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0
    )
    config.bos_token_id = config.eos_token_id = 1
    config.pad_token_id = config.embd_pdrop = config.attn_pdrop = 0
    return transformers.GPT2LMHeadModel(config)


def trainer_of(kind, folder):
    """A trainer of TRL on ten texts, with the plan."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    if kind == "SFT":
        rows = [{"text": " ".join("abcdefgh"[n % 5 :])} for n in range(10)]
    else:
        rows = [{"prompt": "a b", "chosen": " c d", "rejected": " x y"}] * 10
    data = datasets.Dataset.from_list(rows)
    arguments = getattr(trl, f"{kind}Config")(str(folder), max_length=16, **COMMON)
    more = {"ref_model": model()} if kind == "DPO" else {}
    trainer = getattr(trl, f"{kind}Trainer")(
        model(),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        **more,
    )
    use_plan(trainer, PLAN)
    return trainer


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_a_trainer_of_trl_trains_with_a_plan_and_resumes(kind, tmp_path):
    whole = trainer_of(kind, tmp_path)
    whole.train()
    optimizer = lm.unwrap(whole.optimizer)
    assert optimizer.clock == optimizer.resolved.run.steps == 15
    assert next(iter(optimizer.param_groups[0]["feedback"].values()))["best"] is not None
    resumed = trainer_of(kind, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    expected = dict(whole.model.named_parameters())
    for name, param in resumed.model.named_parameters():
        assert torch.equal(param, expected[name]), name

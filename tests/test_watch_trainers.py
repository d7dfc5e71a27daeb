"""Watching the trainers of others: no finding, and the same weights bit for bit as without."""

import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import lamina as lm
from correct_loops import data, network
from lamina.cli.app import app

pytestmark = pytest.mark.slow


def same_with_and_without(train, allowed=()):
    """Train without and with a watch; give back what was seen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = train().state_dict()
        with lm.watch() as seen:
            given = train().state_dict()
    assert seen.failure is None
    assert [str(each) for each in seen.findings if each.code not in allowed] == []
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    return seen


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, intermediate_size=32, num_labels=2, **sizes)
    return BertForSequenceClassification(config)


def sentences(count=48):
    torch.manual_seed(3)
    return [
        {
            "input_ids": torch.randint(50, (10,)),
            "attention_mask": torch.ones(10, dtype=torch.long),
            "labels": torch.randint(2, ()),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 5.0}])
def test_transformers(tmp_path, settings):
    from transformers import Trainer, TrainingArguments

    def train():
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8,
            learning_rate=1e-3, warmup_steps=2, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True, seed=0, logging_strategy="no", **settings,
        )  # fmt: skip
        model = bert()
        Trainer(model, arguments, train_dataset=sentences()).train()
        return model

    seen = same_with_and_without(train)
    assert seen.steps == (9 if settings else 18)


def test_transformers_finds_an_untied_decoder():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert lm.check(model, optimizer) == ()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (finding,) = lm.check(model, optimizer)
    assert finding.code == "tie-broken"
    assert "lm_head.weight" in finding.message


def lightning_trainer(**settings):
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(0, verbose=False)
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 5.0}, {"precision": "bf16-mixed"}],
)
def test_lightning(settings, tmp_path, monkeypatch):
    from lightning.pytorch import LightningModule

    monkeypatch.chdir(tmp_path)

    class Classifier(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train():
        trainer = lightning_trainer(max_epochs=4, **settings)
        model = Classifier()
        trainer.fit(model, data())
        return model

    seen = same_with_and_without(train)
    # Accumulation ends with the epoch: 5 batches are 3 steps.
    assert seen.steps == (12 if "accumulate_grad_batches" in settings else 20)
    assert len(seen.record.series("group 0", "grad_norm")[0]) > 0


def test_lightning_gan(tmp_path, monkeypatch):
    from lightning.pytorch import LightningModule

    monkeypatch.chdir(tmp_path)

    class GAN(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))
            self.critic = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))

        def training_step(self, batch, _):
            by_generator, by_critic = self.optimizers()
            real = batch[0]
            ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
            loss = F.binary_cross_entropy_with_logits
            self.toggle_optimizer(by_generator)
            fake = self.generator(torch.randn(len(real), 4))
            self.manual_backward(loss(self.critic(fake), ones))
            by_generator.step()
            by_generator.zero_grad()
            self.untoggle_optimizer(by_generator)
            self.toggle_optimizer(by_critic)
            wrong = loss(self.critic(fake.detach()), zeros)
            self.manual_backward((loss(self.critic(real), ones) + wrong) / 2)
            by_critic.step()
            by_critic.zero_grad()
            self.untoggle_optimizer(by_critic)

        def configure_optimizers(self):
            return (
                torch.optim.Adam(self.generator.parameters(), lr=2e-4),
                torch.optim.Adam(self.critic.parameters(), lr=2e-4),
            )

    def train():
        trainer = lightning_trainer(max_epochs=3)
        model = GAN()
        trainer.fit(model, data())
        return model

    assert same_with_and_without(train).steps == 30


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate):
    from accelerate import Accelerator

    def train():
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=15)
        wrapped, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, data(), scheduler
        )
        for _ in range(3):
            for x, y in loader:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(F.cross_entropy(wrapped(x), y))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 5.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        return model

    assert same_with_and_without(train).steps == (15 if accumulate == 1 else 9)


# --- as scripts ---------------------------------------------------------------------------------

SCRIPTS = {
    "transformers": """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
torch.manual_seed(0)
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
model = BertForSequenceClassification(BertConfig(vocab_size=50, intermediate_size=32, **sizes))
texts = [{"input_ids": torch.randint(50, (10,)), "labels": torch.randint(2, ())} for _ in range(40)]
arguments = TrainingArguments(
    output_dir=".", num_train_epochs=2, report_to=[], save_strategy="no", use_cpu=True, seed=0,
    disable_tqdm=True, logging_strategy="no", lr_scheduler_type="cosine", max_grad_norm=5.0)
Trainer(model, arguments, train_dataset=texts).train()
torch.save(model.state_dict(), sys.argv[1])
""",
    "lightning": """
import sys, torch
from torch import nn
from lightning.pytorch import LightningModule, Trainer, seed_everything
seed_everything(0, verbose=False)
class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))
    def training_step(self, batch, _):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
model = Model()
loader = torch.utils.data.DataLoader(torch.randn(40, 6), batch_size=8, shuffle=True)
trainer = Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, loader)
torch.save(model.state_dict(), sys.argv[1])
""",
    "gan": """
import sys, torch
sys.path.append(sys.argv[2])
from correct_loops import gan
torch.save(gan().state_dict(), sys.argv[1])
""",
    "amp": """
import sys, torch
sys.path.append(sys.argv[2])
from correct_loops import amp_with_accumulation
torch.save(amp_with_accumulation().state_dict(), sys.argv[1])
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_saves_the_same_weights_with_and_without(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    Path("train.py").write_text(SCRIPTS[name])
    here = str(Path(__file__).parent)
    monkeypatch.setattr(sys, "argv", ["train.py", "plain.pt", here])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path("train.py", run_name="__main__")
        words = ["watch", "--out", "seen", "train.py", "watched.pt", here]
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("seen/findings.json").read_text()) == []
    plain, watched = torch.load("plain.pt"), torch.load("watched.pt")
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[key], watched[key]) for key in plain)

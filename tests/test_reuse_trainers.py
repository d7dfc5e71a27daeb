"""Reuse in other people's trainers: the same weights, logs and metrics as without."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

import lamina as lm
from lamina.integrations import accelerate as for_accelerate
from lamina.integrations import lightning as for_lightning
from lamina.integrations.lightning import PlanCallback
from lamina.integrations.lightning_reuse import LightningReuse
from lamina.integrations.reusing import begin_reuse
from lamina.integrations.transformers import use_plan
from scenario import ResumableLoader, eval_data, in_order, train_data

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(treespec, LeafSpec|in eval mode at the start|num_workers|resumable|litlogger)",
    "ignore:.*does not have many workers",
    "ignore:.*callbacks used to create the checkpoint need to be provided",
    "ignore:.*torch.jit.script_method",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
)

#: the plans that every trainer is tried with, over four epochs
RULES = {
    "head only": [lm.Rule("*bert.*", frozen=True)],
    "top down": [
        lm.Rule("*bert.embeddings.* | *bert.pooler.*", frozen=True),
        lm.Rule("*encoder.layer.{depth}.*", thaw=lm.top_down("1 epoch")),
    ],
    "freeze, then thaw": [
        lm.Rule("*bert.embeddings.* | *layer.0.*", frozen=True),
        lm.Rule("*layer.1.* | *pooler.*", freeze="1 epoch"),
        lm.Rule("*layer.2.*", thaw="2 epochs"),
    ],
}


REENTRANT = {"activation_checkpointing_kwargs": {"use_reentrant": True}}


def slow(*case):
    """A case for `make soak`."""
    return pytest.param(*case, marks=pytest.mark.slow)


def forget_accelerators():
    """Let the next test choose its precision, and find no loader that is not read to its end."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lamina").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    forget_accelerators()
    yield
    forget_accelerators()
    logging.getLogger("lamina").setLevel(logging.NOTSET)


def bert():
    """A small BERT with dropout, the same each time."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return transformers.BertForSequenceClassification(config)


def plan_of(stages):
    return lm.Plan(lm.AdamW, lr=1e-2, rules=RULES[stages])


def assert_same_bits(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


# ---------------------------------------------------------------------------------- Transformers


def trainer_of(folder, **changes):
    given = {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        **changes,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given)
    return transformers.Trainer(
        bert(), arguments, train_dataset=train_data(), eval_dataset=eval_data()
    )


class EndAt(transformers.TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def by_trainer(folder, stages, reuse, resume=None, end=None, **changes):
    trainer = trainer_of(folder, **changes)
    use_plan(trainer, plan_of(stages), reuse=reuse)
    if end is not None:
        trainer.add_callback(EndAt(end))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logs(trainer):
    """All that the Trainer logged but for times."""
    left_out = ("runtime", "per_second", "flos", "train_loss")
    return [
        {name: value for name, value in row.items() if not any(part in name for part in left_out)}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        ("top down", {"bf16": True}),
        slow("head only", {}),
        slow("top down", {"gradient_accumulation_steps": 2}),
        slow("freeze, then thaw", {}),
        slow("top down", {"activation_checkpointing": True}),
        slow("head only", {"activation_checkpointing": True, **REENTRANT}),
        slow("top down", {"activation_checkpointing": True, **REENTRANT, "bf16": True}),
    ],
)
def test_the_trainer_gives_the_same_bits(stages, changes, tmp_path):
    without = by_trainer(tmp_path, stages, False, **changes)
    reusing = by_trainer(tmp_path, stages, {"space": "50 MB"}, **changes)
    assert_same_bits(reusing.model, without.model)
    assert logs(reusing) == logs(without)
    assert without.reused is None
    assert not reusing.reused.refused
    assert reusing.reused.counts["replayed"] >= 17


@pytest.mark.slow
def test_the_trainer_resumes_in_the_middle_of_an_epoch(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 9}
    whole = by_trainer(tmp_path / "whole", "top down", False, **options)
    settings = {"folder": tmp_path / "stored"}
    by_trainer(tmp_path / "cut", "top down", settings, end=12, **options)
    checkpoint = str(tmp_path / "cut" / "checkpoint-9")
    resumed = by_trainer(tmp_path / "cut", "top down", settings, checkpoint, **options)
    assert_same_bits(resumed.model, whole.model)
    assert logs(resumed)[9:] == logs(whole)[9:]
    assert resumed.reused.counts["replayed"] > 12


class Tagger(transformers.BertForTokenClassification):
    """Has a label for each word, so that each batch has another count of them."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(bert().config)


class Words(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        words = torch.randint(1, 50, (8,), generator=generator)
        return {"input_ids": words, "labels": torch.where(words > 40, -100, words % 2)}


def test_the_count_of_words_in_a_batch_is_no_part_of_the_key(tmp_path):
    trained = []
    for reuse in (False, True):
        trainer = trainer_of(tmp_path)
        trainer.model = trainer.model_wrapped = Tagger()
        trainer.model_accepts_loss_kwargs = True
        trainer.train_dataset, trainer.eval_dataset = Words(), Words()
        use_plan(trainer, plan_of("head only"), reuse=reuse)
        trainer.train()
        trained.append(trainer)
    without, reusing = trained
    assert_same_bits(reusing.model, without.model)
    assert logs(reusing) == logs(without)
    assert reusing.reused.counts["replayed"] >= 12  # three epochs of four batches


@pytest.mark.slow
def test_a_second_training_and_an_evaluation_by_hand_are_as_without(tmp_path):
    trainer = by_trainer(tmp_path, "head only", True, num_train_epochs=2)
    first = trainer.reused
    counts = dict(first.counts)
    trainer.evaluate()
    assert first.counts == counts  # it is over
    trainer.train()
    assert trainer.reused is not first
    assert trainer.reused.counts["replayed"] >= 7


# ------------------------------------------------------------------------------------- Lightning


class Module(pl.LightningModule):
    """Has the BERT as a part of it, and notes what it logs."""

    def __init__(self):
        super().__init__()
        self.model = bert()
        self.metrics = []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.metrics.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self.metrics.append(self.model(**batch).loss.item())


class Itself(Module):
    """Is called itself, as `self(...)`."""

    def forward(self, **batch):
        return self.model(**batch).loss

    def training_step(self, batch, index):
        loss = self(**batch)
        self.metrics.append(loss.item())
        return loss


def by_lightning(folder, stages, reuse, make=Module, resume=None, save=False, **options):
    pl.seed_everything(1)
    module = make()
    callback = PlanCallback(plan_of(stages), reuse=reuse)
    callbacks = [callback]
    if save:
        saving = {"every_n_train_steps": 9, "save_top_k": -1, "filename": "{step}"}
        callbacks.append(pl.callbacks.ModelCheckpoint(folder, **saving))
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=save,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        **options,
    )
    loader = ResumableLoader(train_data(), 4, sampler=in_order())
    trainer.fit(module, loader, DataLoader(eval_data(), 8), ckpt_path=resume)
    return module, callback


@pytest.mark.parametrize(
    ("stages", "make", "options"),
    [
        ("head only", Module, {}),
        slow("top down", Module, {"precision": "bf16-mixed"}),
        ("freeze, then thaw", Itself, {"accumulate_grad_batches": 2}),
    ],
)
def test_lightning_gives_the_same_bits(stages, make, options, tmp_path):
    without, none = by_lightning(tmp_path, stages, False, make, **options)
    reusing, callback = by_lightning(tmp_path, stages, True, make, **options)
    assert none.reused is None
    assert_same_bits(reusing, without)
    assert reusing.metrics == without.metrics
    assert callback.reused.counts["replayed"] >= 14
    assert not callback.reused.refused
    assert not any("forward" in vars(part) for part in reusing.modules())


@pytest.mark.slow
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path):
    settings = {"folder": tmp_path / "stored"}
    _, first = by_lightning(tmp_path, "head only", settings, save=True)
    checkpoint = str(tmp_path / "step=9.ckpt")
    # Lightning does not put random sources back, so both are resumed.
    without, _ = by_lightning(tmp_path, "head only", False, resume=checkpoint)
    resumed, callback = by_lightning(tmp_path, "head only", settings, resume=checkpoint)
    assert_same_bits(resumed, without)
    assert resumed.metrics == without.metrics
    # Nineteen steps were left and three validations, of which all are stored but for none.
    assert callback.reused.counts["replayed"] >= 19
    assert callback.reused.counts["stored"] == 0
    assert first.reused is not callback.reused


class OneByOne(Module):
    """Calls its parts in `training_step`."""

    def training_step(self, batch, index):
        pooled = self.model.bert(batch["input_ids"]).pooler_output
        return nn.functional.cross_entropy(self.model.classifier(pooled), batch["labels"])


def test_parts_that_lightning_calls_one_by_one_are_told(tmp_path):
    without, _ = by_lightning(tmp_path, "head only", False, OneByOne)
    with pytest.warns(lm.LaminaWarning, match=r"model\.bert, model\.classifier one by one"):
        reusing, callback = by_lightning(tmp_path, "head only", True, OneByOne)
    assert_same_bits(reusing, without)
    assert callback.reused is None


# -------------------------------------------------------------------------- Accelerate and Fabric


def by_loop(driver, stages, reuse, precision="no", accumulate=1, epochs=4):
    """Train with Accelerate or Fabric; returns the model, the metrics, and what was reused."""
    torch.manual_seed(1)
    model, metrics = bert(), []
    loaders = [DataLoader(train_data(), 4, shuffle=True), DataLoader(eval_data(), 8)]
    if driver == "accelerate":
        owner = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate
        )
        options = {"epochs": epochs, "reuse": reuse}
        made = for_accelerate.prepare(owner, plan_of(stages), model, *loaders, **options)
    else:
        precision = "bf16-mixed" if precision == "bf16" else None
        owner = Fabric(accelerator="cpu", devices=1, precision=precision)
        options = {"epochs": epochs, "accumulate": accumulate, "reuse": reuse}
        made = for_lightning.setup(owner, plan_of(stages), model, *loaders, **options)
    wrapped, optimizer, loader, held_out = made
    for _ in range(epochs):
        for number, batch in enumerate(loader, start=1):
            if driver == "accelerate":
                with owner.accumulate(wrapped):
                    loss = wrapped(**batch).loss
                    owner.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                loss = wrapped(**batch).loss
                owner.backward(loss / accumulate)
                if number % accumulate == 0 or number == len(loader):
                    optimizer.step()
                    optimizer.zero_grad()
            metrics.append(loss.item())
        wrapped.eval()
        with torch.no_grad():
            metrics += [wrapped(**batch).loss.item() for batch in held_out]
        wrapped.train()
    return model, metrics, owner.reused


@pytest.mark.parametrize(
    ("driver", "stages", "options"),
    [
        ("accelerate", "top down", {"precision": "bf16"}),
        slow("accelerate", "freeze, then thaw", {"accumulate": 2}),
        slow("fabric", "top down", {"precision": "bf16"}),
        ("fabric", "head only", {"accumulate": 2}),
    ],
)
def test_loops_of_ones_own_give_the_same_bits(driver, stages, options):
    model, metrics, none = by_loop(driver, stages, False, **options)
    reusing, same, reused = by_loop(driver, stages, True, **options)
    assert none is None
    assert_same_bits(reusing, model)
    assert same == metrics
    assert reused.counts["replayed"] >= 17
    assert not reused.refused


def in_two_epochs(folder, reuse, resume):
    """Two epochs with Accelerate; `resume` goes on after the first with what was saved."""
    model, losses = bert(), []
    if resume:  # the weights of another model, until the saved ones are loaded
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1)
    owner, loader = Accelerator(cpu=True), DataLoader(train_data(), 4)
    made = for_accelerate.prepare(owner, plan_of("head only"), model, loader, epochs=2, reuse=reuse)
    wrapped, optimizer, loader = made
    if resume:
        for batch in loader:
            wrapped(**batch)
        owner.load_state(folder)
    for epoch in range(int(resume), 2):
        for batch in loader:
            loss = wrapped(**batch).loss
            losses.append(loss.item())
            owner.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if not resume and epoch == 0:
            owner.save_state(folder)
    return model, losses, owner.reused


def test_a_state_that_accelerate_loads_drops_what_was_stored_before(tmp_path):
    whole, losses, _ = in_two_epochs(tmp_path, False, resume=False)
    forget_accelerators()
    resumed, same, reused = in_two_epochs(tmp_path, True, resume=True)
    assert_same_bits(resumed, whole)
    assert same == losses[7:]
    assert reused.counts == {"replayed": 0, "skipped": 0, "stored": 2 * 28}


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        (torch.compile, "is compiled as a whole"),
        (nn.DataParallel, "DataParallel"),
        (nn.Sequential, "is wrapped in Sequential, which is not known"),
    ],
)
def test_what_makes_reuse_impossible_is_named_and_training_goes_on(wrapper, said):
    model = bert()
    optimizer = plan_of("head only").build(model, epochs=1, steps_per_epoch=7)
    with pytest.warns(lm.LaminaWarning, match=f"Nothing is reused, and training goes on.*{said}"):
        assert begin_reuse(model, wrapper(model), optimizer, {}) is None
    if wrapper is torch.compile:
        compiled = torch.compile(model)
        with pytest.warns(lm.LaminaWarning, match=said):
            assert begin_reuse(compiled, compiled, optimizer, {}) is None
    assert not model._forward_pre_hooks


def test_a_compiled_module_of_lightning_is_told():
    module = pl.utilities.compile.from_compiled(torch.compile(Module(), backend="eager"))
    reusing = LightningReuse({})
    with pytest.warns(lm.LaminaWarning, match="the module is compiled as a whole"):
        reusing.follow(module, module, None)
    reusing.begin()
    assert reusing.session is None
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(
    ("reuse", "said"),
    [
        ("yes", "expected True, False, or options"),
        ({"spaces": 1}, r"unknown option 'spaces'.*Did you mean 'space'"),
        ({"space": "much"}, "expected bytes"),
        ({"debug": 2}, "a share from 0 to 1"),
        ({"folder": 3}, "the path of a folder"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_changed(reuse, said, tmp_path):
    trainer = trainer_of(tmp_path)
    before = dict(vars(trainer))
    with pytest.raises(lm.PlanError, match=said):
        use_plan(trainer, plan_of("head only"), reuse=reuse)
    assert vars(trainer) == before
    with pytest.raises(lm.PlanError, match=said):
        PlanCallback(plan_of("head only"), reuse=reuse)
    loader = DataLoader(train_data(), 4)
    plan, owner = plan_of("head only"), Accelerator(cpu=True)
    with pytest.raises(lm.PlanError, match=said):
        for_accelerate.prepare(owner, plan, bert(), loader, reuse=reuse)


def test_a_forward_or_a_hook_put_on_the_model_itself_is_told():
    model = bert()
    optimizer = plan_of("head only").build(model)
    inputs = {"input_ids": torch.arange(1, 17).view(2, 8)}
    reused = lm.reuse(model, optimizer)
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids=input_ids.flip(1))
    with pytest.warns(lm.LaminaWarning, match="model itself has a forward of its own"):
        model(**inputs)
    del model.forward
    handle = model.register_forward_pre_hook(lambda *_: None)
    with pytest.warns(lm.LaminaWarning, match="another hook before its forward pass"):
        model(**inputs)
    assert reused.counts["stored"] == 0
    handle.remove()
    model(**inputs)
    assert reused.counts["stored"] == 2


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_what_is_put_on_a_part_in_the_middle_of_a_run_is_seen(kind):
    model = bert().eval()
    reused = lm.reuse(model, plan_of("head only").build(model))
    inputs = {"input_ids": torch.arange(1, 17).view(2, 8)}
    before = model(**inputs).logits
    assert torch.equal(model(**inputs).logits, before)
    assert reused.counts["replayed"] == 1
    part = model.bert.encoder.layer[1].output.dense
    if kind == "hook":
        part.register_forward_hook(lambda module, given, output: output + 1)
    else:
        forward = part.forward
        part.forward = lambda hidden: forward(hidden) + 1
    with pytest.warns(lm.LaminaWarning, match="layer.1.output.dense' has a forward"):
        after = model(**inputs).logits
    reused.close()
    assert torch.equal(after, model(**inputs).logits)
    assert not torch.equal(after, before)

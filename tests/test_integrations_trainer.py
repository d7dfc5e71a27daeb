"""The Trainer of Transformers with a plan: its other options, callbacks and data sets."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lamina as lm
import scenario
from lamina.integrations.transformers import use_plan
from scenario import make_model, train_data
from test_integrations import CONSTANT, assert_same, loop, trainer_of

PLATEAU = lm.Plan(lm.AdamW, lr=1e-2, feedback=lm.plateau("eval_loss", patience=0, threshold=0.2))


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    logging.getLogger("lamina").setLevel(logging.ERROR)
    yield
    logging.getLogger("lamina").setLevel(logging.NOTSET)


def trained(folder, plan, *callbacks, resume=None, **changes):
    """A trainer that has trained with a plan, and its optimizer."""
    trainer = trainer_of(folder, **changes)
    use_plan(trainer, plan)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, lm.unwrap(trainer.optimizer)


def losses(trainer):
    return [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]


class At(transformers.TrainerCallback):
    """Does something when a step begins or has ended."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        def act(args, state, control, **given):
            if state.global_step == step:
                action(args=args, state=state, control=control, **given)

        setattr(self, event, act)


def test_a_missed_evaluation_is_made_up_when_a_run_goes_on(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 7, "num_train_epochs": 3}
    whole, optimizer = trained(tmp_path, PLATEAU, **steps)
    # Saved with the last step of an epoch, before its evaluation, which the Trainer leaves out.
    cut, resumed = trained(tmp_path, PLATEAU, resume=str(tmp_path / "checkpoint-7"), **steps)
    assert losses(cut) == losses(whole)
    assert len(losses(cut)) == 3
    assert_same(cut.model, whole.model)
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_run_that_the_plan_had_ended_trains_no_step_more(tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-12, stop=lm.early_stop("eval_loss", patience=1))
    first, _ = trained(tmp_path, plan, num_train_epochs=5)
    assert first.state.global_step == 14
    with pytest.warns(lm.LaminaWarning, match="no step is trained"):
        second, optimizer = trained(tmp_path, plan, resume=True, num_train_epochs=5)
    assert second.state.global_step == optimizer.clock == 14
    assert_same(second.model, first.model)


@pytest.mark.slow
def test_the_best_model_is_loaded_at_the_end(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    plan = lm.Plan(lm.AdamW, lr=0.05, feedback=lm.plateau("eval_loss", patience=0))
    trainer, optimizer = trained(tmp_path, plan, num_train_epochs=3, **options)
    seen = losses(trainer)
    assert min(seen) != seen[-1]
    assert trainer.evaluate()["eval_loss"] == min(seen)
    assert optimizer.clock == 21  # the optimizer stays as the last step left it
    trainer.train()
    assert lm.unwrap(trainer.optimizer).clock == 21  # built anew


@pytest.mark.slow
@pytest.mark.parametrize("patience", [(2, 1), (1, 4)], ids=["theirs", "the plan's"])
def test_beside_the_early_stopping_callback_the_first_ends_it(patience, tmp_path):
    ours, theirs = patience
    plan = lm.Plan(lm.AdamW, lr=1e-12, stop=lm.early_stop("eval_loss", patience=ours))
    callback = transformers.EarlyStoppingCallback(theirs)
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer, _ = trained(tmp_path, plan, callback, num_train_epochs=5, **options)
    assert trainer.state.epoch == 2


class Bert(transformers.BertForSequenceClassification):
    """A model of Transformers itself, which can recompute activations."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(make_model().bert.config)


@pytest.mark.parametrize("reentrant", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_activation_checkpointing_above_frozen_layers(reentrant, tmp_path):
    rules = [
        lm.Rule("bert.embeddings.* | bert.encoder.layer.0.*", frozen=True),
        lm.Rule("bert.encoder.layer.1.*", thaw=3),
    ]
    plan = lm.Plan(lm.AdamW, lr=1e-3, rules=rules)
    options = {"eval_strategy": "no", "save_strategy": "no", "num_train_epochs": 1}
    plain, _ = trained(tmp_path, plan, model=Bert(), **options)
    options["activation_checkpointing"] = True
    options["activation_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    recomputed, _ = trained(tmp_path, plan, model=Bert(), **options)
    assert_same(recomputed.model, plain.model)
    moved = dict(Bert().named_parameters())
    still = [n for n, p in recomputed.model.named_parameters() if torch.equal(p, moved[n])]
    assert len([n for n in still if n.startswith("bert.encoder.layer.0.")]) == 16
    assert not [n for n in still if n.startswith(("bert.encoder.layer.1.", "classifier"))]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_16_bits_on_the_cpu(precision, tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-2, clip_norm=1.0)
    trainer, optimizer = trained(tmp_path, plan, save_strategy="no", **{precision: True})
    whole, _ = trained(tmp_path, plan, save_strategy="no")
    assert optimizer.clock == 14
    # On the CPU, the Trainer takes fp16=True and computes in float32.
    assert (losses(trainer) == losses(whole)) == (precision == "fp16")
    assert losses(trainer) == pytest.approx(losses(whole), rel=0.05)


@pytest.mark.parametrize(
    ("changes", "steps", "per_epoch"),
    [
        ({"max_steps": 9, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}, 9, 4),
        ({"num_train_epochs": 1.5}, 11, 7),
        ({"train_sampling_strategy": "group_by_length"}, 14, 7),
    ],
)
def test_the_length_that_the_trainer_computes(changes, steps, per_epoch, tmp_path):
    trainer, optimizer = trained(tmp_path, PLATEAU, save_strategy="no", eval_steps=2, **changes)
    run = optimizer.resolved.run
    assert (run.steps, run.steps_per_epoch) == (steps, per_epoch)
    assert trainer.state.global_step == optimizer.clock == steps


class Stream(torch.utils.data.IterableDataset):
    """The examples, without a length."""

    def __iter__(self):
        data = train_data()
        return (data[index] for index in range(len(data)))


def test_a_data_set_without_a_length(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=9, eval_strategy="no", save_strategy="no")
    trainer.train_dataset = Stream()
    use_plan(trainer, CONSTANT)
    trainer.train()
    optimizer = lm.unwrap(trainer.optimizer)
    assert optimizer.clock == optimizer.resolved.run.steps == 9
    trainer = trainer_of(tmp_path, max_steps=9, eval_strategy="no", save_strategy="no")
    trainer.train_dataset = Stream()
    use_plan(trainer, lm.Plan(lm.AdamW, lr=1e-3, rules=[lm.Rule("bert.*", thaw="1 epochs")]))
    with pytest.raises(lm.TimeUnitError, match="steps_per_epoch"):
        trainer.train()


@pytest.mark.slow
def test_a_batch_size_that_is_found_automatically(tmp_path):
    model = make_model()

    def memory(module, args, batch):
        if module.training and len(batch["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(memory, with_kwargs=True)
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8}
    trainer = trainer_of(tmp_path, model=model, save_strategy="no", **options)
    use_plan(trainer, PLATEAU)
    trainer.train()
    optimizer = lm.unwrap(trainer.optimizer)
    assert optimizer.clock == optimizer.resolved.run.steps == 14
    assert_same(model, loop_with_reports(PLATEAU))


def loop_with_reports(plan):
    model = make_model()
    optimizer = plan.build(model, steps=14, steps_per_epoch=7)
    for _ in range(2):
        for batch in scenario.train_loader():
            model(**batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the Trainer's own
            optimizer.step()
            optimizer.zero_grad()
        optimizer.report(eval_loss=scenario.evaluate(model))
    return model


def test_callbacks_that_stop_schedule_freeze_or_change_the_length(tmp_path):
    def stop(control, **_):
        control.should_training_stop = True

    _, optimizer = trained(tmp_path, PLATEAU, At("on_step_end", 5, stop), save_strategy="no")
    assert optimizer.clock == 5

    def write(optimizer, **_):
        optimizer.param_groups[0]["lr"] = 1.0

    with pytest.raises(lm.OwnershipError, match=r"lr=1.0"):
        trained(tmp_path, CONSTANT, At("on_step_begin", 3, write))

    def freeze(model, **_):
        model.classifier.requires_grad_(False)

    with pytest.warns(lm.LaminaWarning, match="requires-grad-off"):
        trained(tmp_path, CONSTANT, At("on_step_begin", 3, freeze), save_strategy="no")

    def lengthen(state, **_):
        state.max_steps = 20

    with pytest.raises(lm.PlanError, match=r"had 14 steps .* made them 20"):
        trained(tmp_path, CONSTANT, At("on_train_begin", 0, lengthen))


def test_what_is_set_after_use_plan_is_told_and_what_cannot_work_refused(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no", num_train_epochs=1)
    use_plan(trainer, CONSTANT)
    trainer.args.learning_rate = 0.125  # as a search over hyperparameters does
    with pytest.warns(lm.LaminaWarning, match=r"learning_rate=0.125"):
        trainer.train()
    trainer.train()  # a second warning would be an error
    trainer = trainer_of(tmp_path)
    trainer.args.optim = "lomo"
    with pytest.raises(lm.PlanError, match=r"optim='lomo'.*backward"):
        use_plan(trainer, CONSTANT)


def test_arguments_come_back_after_a_failure_and_the_trainer_can_train_again(tmp_path):
    plan = lm.Plan(lm.SGD, lr=0.5, clip_norm=0.1)
    trainer = trainer_of(tmp_path, max_grad_norm=0.001, save_strategy="no")
    use_plan(trainer, plan)

    def fail(args, **_):
        assert args.max_grad_norm == 0
        raise ZeroDivisionError

    failing = At("on_step_begin", 0, fail)
    trainer.add_callback(failing)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.args.max_grad_norm == 0.001
    trainer.remove_callback(failing)
    trainer.train()
    assert_same(trainer.model, loop(plan))


def test_seq2seq_with_tied_embeddings_and_its_own_metrics(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config)
    data = [
        {"input_ids": torch.randint(2, 50, (8,)), "labels": torch.randint(2, 50, (6,))}
        for _ in range(8)
    ]
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    plan = lm.Plan(
        lm.AdamW,
        lr=1e-2,
        clip_norm=1.0,
        feedback=lm.plateau("eval_accuracy", mode="max", patience=0),
        rules=[lm.Rule("decoder.block.{depth}.*", thaw=lm.top_down(every=1))],
    )
    trainer = transformers.Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"accuracy": 0.5},
    )
    use_plan(trainer, plan)
    trainer.train()
    optimizer = lm.unwrap(trainer.optimizer)
    assert optimizer.clock == 3
    assert next(iter(optimizer.param_groups[0]["feedback"].values()))["best"] == 0.5
    assert model.shared.weight is model.encoder.embed_tokens.weight


SCRIPT = """
import logging, os, sys, warnings
from pathlib import Path

import torch

import scenario

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
torch.set_num_threads(1)
scenario.WORLD = int(os.environ["WORLD_SIZE"])
outcome = scenario.transformers_trainer(Path(sys.argv[1]), scenario.CUT)
torch.save(outcome.weights, Path(sys.argv[1], os.environ["RANK"] + ".pt"))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_with_two_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    seen = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [sys.executable, *launch, "--nproc-per-node=2", str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": seen},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[:3000]
    expected = scenario.plain(tmp_path)
    for rank in range(2):
        outcome = scenario.Outcome()
        outcome.weights = torch.load(tmp_path / f"{rank}.pt")
        assert max(gap for _, gap in scenario.differences(expected, outcome)) < 1e-5

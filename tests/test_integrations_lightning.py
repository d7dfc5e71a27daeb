"""Lightning's Trainer with a plan: its other options, other callbacks, and a second `fit`."""

from __future__ import annotations

import logging

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import FSDPStrategy

import lamina as lm
from lamina.integrations.lightning import PlanCallback
from lamina.integrations.lightning_checks import check_callbacks, check_strategy
from scenario import eval_loader, train_loader
from test_integrations import (
    CONSTANT,
    Logger,
    Manual,
    Module,
    assert_same,
    fit,
    loop,
    module,
)
from test_integrations import pytestmark as pytestmark

PLATEAU = lm.Plan(lm.AdamW, lr=1e-2, feedback=lm.plateau("eval_loss", patience=0))
COSINE = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.cosine())
#: a `fit` without output; further options in each test
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture(autouse=True)
def _quiet():
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fitted(plan, *others, kind=Module, **changes):
    """A trainer that has fitted the module of the scenario, and the plan's callback."""
    callback = PlanCallback(plan, **changes.pop("plan_options", {}))
    return fit(module(kind), callback, *others, **changes), callback


@pytest.mark.parametrize(
    ("changes", "steps", "per_epoch"),
    [
        ({"max_steps": 9, "max_epochs": -1}, 9, 7),
        ({"accumulate_grad_batches": 2}, 8, 4),
        ({"overfit_batches": 2}, 4, 2),
        ({"limit_train_batches": 0.5}, 6, 3),
        ({"fast_dev_run": 3}, 3, 3),
        ({"val_check_interval": 0.5}, 14, 7),
    ],
)
def test_the_length_that_the_trainer_computes(changes, steps, per_epoch):
    _, callback = fitted(CONSTANT, **changes)
    run = callback.optimizer.resolved.run
    assert (run.steps, run.steps_per_epoch) == (steps, per_epoch)
    assert callback.optimizer.clock == steps


def test_epochs_are_known_where_steps_end_the_run():
    plan = lm.Plan(lm.SGD, lr=0.1, rules=[lm.Rule("bert.*", thaw="1 epochs")])
    _, callback = fitted(plan, max_steps=9, max_epochs=-1)
    window = callback.optimizer.explain("bert.embeddings.word_embeddings.weight", 6)
    assert "frozen" in str(window)


def test_a_time_limit_needs_a_plan_without_a_length():
    limit = {"max_time": {"seconds": 1}, "max_epochs": -1}
    with pytest.raises(lm.ScheduleError, match="length of the run is unknown"):
        fitted(COSINE, **limit)
    _, callback = fitted(CONSTANT, **limit)
    assert callback.optimizer.clock > 0


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    "precision", ["bf16-mixed", pytest.param("bf16-true", marks=pytest.mark.slow), "16-mixed"]
)
def test_16_bits_on_the_cpu(precision):
    # Lightning takes bfloat16 for "16-mixed" on the CPU, and says so.
    trainer, callback = fitted(PLATEAU, precision=precision)
    assert callback.optimizer.clock == 14
    assert torch.isfinite(trainer.callback_metrics["eval_loss"])


@pytest.mark.filterwarnings("ignore:.*barebones")
def test_barebones_logs_nothing():
    bare = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"))
    _, callback = fitted(
        CONSTANT, barebones=True, enable_model_summary=None, log_every_n_steps=None, **bare
    )
    assert callback.optimizer.clock == 14


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_beside_other_callbacks_and_resumed_from_the_best(tmp_path):
    saved = callbacks.ModelCheckpoint(tmp_path, monitor="eval_loss", save_last=True)
    logger = Logger()
    others = (
        saved,
        callbacks.EarlyStopping("eval_loss", patience=3),
        callbacks.LearningRateMonitor(),
    )
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    _, callback = fitted(PLATEAU, *others, max_epochs=3, logger=logger, **options)
    assert any("lr/default" in row for _, row in logger.rows)
    whole = callback.optimizer
    resumed = PlanCallback(PLATEAU)
    fit(module(), resumed, max_epochs=3, resume=saved.last_model_path)
    assert resumed.optimizer.clock == whole.clock == 21
    assert resumed.optimizer.state_dict()["param_groups"] == whole.state_dict()["param_groups"]


def test_a_second_fit_goes_on_where_the_first_ended():
    plan = lm.Plan(lm.AdamW, lr=1e-2, weight_decay=0.1)
    callback, trained = PlanCallback(plan), module()
    trainer = pl.Trainer(callbacks=[callback], max_epochs=1, **QUIET)
    trainer.fit(trained, train_loader(), eval_loader())
    trainer.fit(trained, train_loader(), eval_loader())  # nothing is left to train
    assert callback.optimizer.clock == 7
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trained, train_loader(), eval_loader())
    assert callback.optimizer.clock == callback.optimizer.resolved.run.steps == 14
    assert_same(trained, loop(plan))  # Adam's moments too have gone on
    with pytest.raises(lm.PlanError, match=r"taken 14 steps already.*new Trainer"):
        trainer.fit(module(), train_loader(), eval_loader())


@pytest.mark.parametrize("extend", [None, "stretch"])
def test_a_second_fit_of_another_length_says_how_it_goes_on(extend):
    callback, trained = PlanCallback(COSINE, extend=extend), module()
    trainer = pl.Trainer(callbacks=[callback], max_epochs=1, **QUIET)
    trainer.fit(trained, train_loader(), eval_loader())
    trainer.fit_loop.max_epochs = 2
    if extend is None:
        with pytest.raises(lm.StateError, match=r"extend='hold'"):
            trainer.fit(trained, train_loader(), eval_loader())
        assert "configure_optimizers" not in vars(trained)
        return
    trainer.fit(trained, train_loader(), eval_loader())
    assert callback.optimizer.clock == 14


class WithTest(Module):
    """With a test as well."""

    def test_step(self, batch, batch_idx):
        loss = self(**batch)["loss"]
        assert torch.isfinite(loss)
        self.log("test_loss", loss)


def test_validating_and_testing_by_hand_is_no_report():
    callback, trained = PlanCallback(PLATEAU), module(WithTest)
    trainer = pl.Trainer(callbacks=[callback], max_epochs=2, **QUIET)
    trainer.validate(trained, eval_loader(), verbose=False)
    trainer.fit(trained, train_loader(), eval_loader())
    before = str(callback.optimizer.state_dict()["param_groups"][0]["feedback"])
    trainer.validate(trained, eval_loader(), verbose=False)
    trainer.test(trained, eval_loader(), verbose=False)
    assert str(callback.optimizer.state_dict()["param_groups"][0]["feedback"]) == before


def test_a_run_that_the_plan_had_ended_trains_no_step_more(tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-12, stop=lm.early_stop("eval_loss", patience=1))
    trainer, callback = fitted(plan, max_epochs=5)
    assert callback.optimizer.clock == 14
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    resumed = PlanCallback(plan)
    with pytest.warns(lm.LaminaWarning, match="no step is trained"):
        fit(module(), resumed, max_epochs=5, resume=tmp_path / "ended.ckpt")
    assert resumed.optimizer.clock == 14


class Longer(pl.Callback):
    """Changes the length after the optimizer was built."""

    def on_train_start(self, trainer, pl_module):
        trainer.fit_loop.max_epochs = 4


class Unfreezing(callbacks.BaseFinetuning):
    """Freezes and thaws by itself."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.bert)

    def finetune_function(self, pl_module, epoch, optimizer):
        self.unfreeze_and_add_param_group(pl_module.bert, optimizer)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Longer(), r"built for 14 steps \(7 an epoch\), and now the run has 28 \(7\)"),
        (Unfreezing(), r"Unfreezing freezes and thaws by itself.*thaw="),
        (callbacks.StochasticWeightAveraging(1e-2), "StochasticWeightAveraging puts a schedule"),
        (callbacks.LearningRateFinder(), "LearningRateFinder writes learning rates"),
        (callbacks.GradientAccumulationScheduler({0: 2, 1: 4}), r"how many steps.*steps=\.\.\."),
    ],
)
def test_callbacks_that_do_what_the_plan_does_are_refused(other, words):
    trained = module()
    before = {name: param.clone() for name, param in trained.named_parameters()}
    with pytest.raises(lm.PlanError, match=words):
        fit(trained, PlanCallback(CONSTANT), other)
    assert all(torch.equal(param, before[name]) for name, param in trained.named_parameters())
    assert "configure_optimizers" not in vars(trained)


def test_a_search_for_the_batch_size_is_refused():
    with pytest.raises(lm.PlanError, match="BatchSizeFinder changes the length"):
        check_callbacks([callbacks.BatchSizeFinder()], known_length=True)


def test_accumulation_that_changes_takes_a_length_by_hand():
    schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 7})
    _, callback = fitted(CONSTANT, schedule, plan_options={"steps": 8})
    assert callback.optimizer.clock == 8


class Adversarial(Manual):
    """Two optimizers, stepped by turns."""

    def configure_optimizers(self):
        parts = (self.bert, self.classifier)
        return [torch.optim.SGD(part.parameters(), 0.1) for part in parts], []


class Failing(Manual):
    """Makes an optimizer from what is not there; it is not used anyway."""

    def configure_optimizers(self):
        raise AttributeError("hparams")


@pytest.mark.filterwarnings("ignore:.*configure_optimizers is not used")
def test_several_optimizers_are_refused_by_name():
    with pytest.raises(lm.PlanError, match=r"Adversarial\.configure_optimizers makes 2 optimizers"):
        fitted(CONSTANT, kind=Adversarial, plan_options={"steps": 14})
    _, callback = fitted(CONSTANT, kind=Failing, plan_options={"steps": 14})
    assert callback.optimizer.clock == 14


def test_strategies_without_a_plan():
    with pytest.raises(lm.PlanError, match=r"FSDP1.*ModelParallelStrategy"):
        check_strategy(FSDPStrategy())
    with pytest.raises(lm.PlanError, match="DeepSpeed"):
        check_strategy(type("DeepSpeedStrategy", (), {})())

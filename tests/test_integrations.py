"""Plans in other people's trainers: the same weights everywhere, and every mistake has a name."""

from __future__ import annotations

import logging
import warnings
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from accelerate import Accelerator
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor

import lamina as lm
import scenario
from lamina.integrations import accelerate as for_accelerate
from lamina.integrations import lightning as for_lightning
from lamina.integrations.lightning import PlanCallback
from lamina.integrations.transformers import use_plan
from scenario import Classifier, eval_data, eval_loader, make_model, train_data, train_loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(treespec, LeafSpec|in eval mode at the start|num_workers|resumable|litlogger)",
    "ignore:.*does not have many workers",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
)

CONSTANT = lm.Plan(lm.AdamW, lr=1e-3)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The whole run in a plain loop."""
    return scenario.plain(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("cut", [None, scenario.CUT])
@pytest.mark.parametrize("driver", scenario.DRIVERS)
def test_every_driver_ends_with_the_same_bits_and_rates(driver, cut, reference, tmp_path):
    outcome = scenario.DRIVERS[driver](tmp_path, cut)
    assert dict(scenario.differences(reference, outcome)) == dict.fromkeys(reference.weights, 0.0)
    assert len(reference.rates) == scenario.STEPS
    assert outcome.rates == reference.rates


def test_canary_the_scenario_sees_another_plan(monkeypatch, reference, tmp_path):
    monkeypatch.setattr(scenario, "PLAN", lm.Plan(lm.AdamW, lr=2e-3))
    outcome = scenario.plain(tmp_path)
    assert max(gap for _, gap in scenario.differences(reference, outcome)) > 0.01
    assert outcome.rates != reference.rates


# ---------------------------------------------------------------------------------- Transformers


def trainer_of(folder, model=None, **changes) -> transformers.Trainer:
    given = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        **changes,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **given)
    return transformers.Trainer(
        model or make_model(), arguments, train_dataset=train_data(), eval_dataset=eval_data()
    )


def loop(plan, epochs=2, clip=None, model=None):
    """The same training in a loop of one's own."""
    model = model or make_model()
    optimizer = plan.build(model, epochs=epochs, steps_per_epoch=len(train_loader()))
    for _ in range(epochs):
        for batch in train_loader():
            model(**batch)["loss"].backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return model


def assert_same(one, other):
    other = dict(other.named_parameters())
    for name, param in one.named_parameters():
        assert torch.equal(param, other[name]), name


@pytest.mark.parametrize("source", ["plan", "file"])
def test_the_trainer_clips_where_the_plan_does_not(source, tmp_path):
    plan: Any = lm.Plan(lm.SGD, lr=0.5, schedule=lm.warmup("10%") >> lm.cosine())
    expected = loop(plan, clip=0.1)
    if source == "file":
        (tmp_path / "plan.toml").write_text(plan.to_toml())
        plan = tmp_path / "plan.toml"
    trainer = trainer_of(tmp_path, max_grad_norm=0.1)
    use_plan(trainer, plan)
    trainer.train()
    assert trainer.args.max_grad_norm == 0.1
    assert_same(trainer.model, expected)


@pytest.mark.parametrize(
    "settings", [{"clip_norm": 0.1}, {"rules": [lm.Rule("*", gradients=lm.clip_norm(0.1))]}]
)
def test_the_trainer_does_not_clip_where_the_plan_does(settings, tmp_path):
    plan = lm.Plan(lm.SGD, lr=0.5, **settings)
    trainer = trainer_of(tmp_path, max_grad_norm=0.001)
    use_plan(trainer, plan)
    trainer.train()
    assert_same(trainer.model, loop(plan))
    assert trainer.args.max_grad_norm == 0.001  # another trainer may be made from them


def test_arguments_that_the_plan_decides_are_named(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=3e-4, lr_scheduler_type="cosine")
    with pytest.warns(lm.LaminaWarning, match=r"learning_rate=0.0003, lr_scheduler_type='cosine'"):
        use_plan(trainer, CONSTANT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_plan(trainer_of(tmp_path), CONSTANT)


def test_training_twice_builds_twice(tmp_path):
    trainer = trainer_of(tmp_path)
    use_plan(trainer, scenario.PLAN)
    trainer.train()
    first = lm.unwrap(trainer.optimizer)
    trainer.train()
    second = lm.unwrap(trainer.optimizer)
    assert first is not second
    assert first.clock == second.clock == 14


def test_an_evaluation_by_hand_is_no_report(tmp_path):
    trainer = trainer_of(tmp_path)
    use_plan(trainer, scenario.PLAN)
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    before = lm.unwrap(trainer.optimizer).state_dict()["param_groups"][0]["feedback"]
    trainer.evaluate()
    assert lm.unwrap(trainer.optimizer).state_dict()["param_groups"][0]["feedback"] == before


def test_early_stopping_ends_the_training(tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-12, stop=lm.early_stop("eval_loss", patience=1))
    trainer = trainer_of(tmp_path, num_train_epochs=5)
    use_plan(trainer, plan)
    trainer.train()
    assert trainer.state.epoch == 2


def test_other_metrics_of_several_data_sets(tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-3, feedback=lm.plateau("eval_two_loss", patience=0))
    trainer = trainer_of(tmp_path)
    trainer.eval_dataset = {"one": eval_data(), "two": eval_data()}
    use_plan(trainer, plan)
    trainer.train()
    feedback = lm.unwrap(trainer.optimizer).param_groups[0]["feedback"]
    assert next(iter(feedback.values()))["best"] is not None


@pytest.mark.parametrize("extend", ["hold", "stretch"])
def test_a_longer_run_says_how_it_goes_on(extend, tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.cosine())
    trainer = trainer_of(tmp_path, num_train_epochs=2, save_steps=7, save_strategy="steps")
    use_plan(trainer, plan)
    trainer.train()
    folder = str(tmp_path / "checkpoint-7")

    longer = trainer_of(tmp_path, num_train_epochs=3)
    use_plan(longer, plan)
    with pytest.raises(lm.StateError, match=r"another length.*jumps.*extend='hold'"):
        longer.train(resume_from_checkpoint=folder)

    longer = trainer_of(tmp_path, num_train_epochs=3)
    use_plan(longer, plan, extend=extend)
    longer.train(resume_from_checkpoint=folder)
    state = torch.load(f"{folder}/optimizer.pt", weights_only=True)
    own = plan.build(make_model(), steps=21, steps_per_epoch=7, resume=state, extend=extend)
    (group,) = own.param_groups
    logged = [entry for entry in longer.state.log_history if entry.get("step") == 8]
    assert logged[0]["lr/default"] == group["lr"]
    assert logged[0]["learning_rate"] == group["lr"]


@pytest.mark.parametrize(
    ("plan", "changes", "words"),
    [
        (lm.Plan("AdamW", lr=1e-3, stop=lm.early_stop("loss")), {}, r"'eval_loss'.*Write 'eval_lo"),
        (
            lm.Plan("AdamW", lr=1e-3, stop=lm.early_stop("eval_loss")),
            {"eval_strategy": "no", "save_strategy": "no"},
            "never evaluates",
        ),
    ],
)
def test_metrics_that_never_arrive(plan, changes, words, tmp_path):
    trainer = trainer_of(tmp_path, **changes)
    use_plan(trainer, plan)
    with pytest.raises(lm.PlanError, match=words):
        trainer.train()


def test_what_a_trainer_refuses(tmp_path):
    sgd = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(lm.PlanError, match=r"expected a Plan or the path.*SGD.*optimizer already"):
        use_plan(trainer_of(tmp_path), sgd)
    with pytest.raises(lm.PlanError, match="expected a Plan or the path"):
        use_plan(trainer_of(tmp_path), 3)
    with pytest.raises(lm.PlanError, match=r"expects a transformers\.Trainer, not SimpleNamespace"):
        use_plan(SimpleNamespace(), CONSTANT)
    with pytest.raises(lm.PlanError, match=r"extend='longer'"):
        use_plan(trainer_of(tmp_path), CONSTANT, extend="longer")
    trainer = trainer_of(tmp_path)
    trainer.optimizer = sgd
    with pytest.raises(lm.PlanError, match="an optimizer of its own"):
        use_plan(trainer, lm.Plan(lm.SGD, lr=0.1, clip_norm=1.0))
    assert trainer.args.max_grad_norm == 1.0
    trainer = trainer_of(tmp_path)
    use_plan(trainer, CONSTANT)
    with pytest.raises(lm.PlanError, match="has a plan already"):
        use_plan(trainer, CONSTANT)
    with pytest.raises(lm.PlanError, match="not known before trainer"):
        trainer.create_optimizer()
    trainer = trainer_of(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(lm.PlanError, match="DeepSpeed"):
        use_plan(trainer, CONSTANT)


# ------------------------------------------------------------------------------------- Lightning


class Module(Classifier, pl.LightningModule):
    """The classifier of the scenario, without an optimizer of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(**batch)["loss"]
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("eval_loss", self(**batch)["loss"])


class WithOptimizer(Module):
    """The same with one, which a plan replaces."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def module(kind: type[Module] = Module) -> Module:
    torch.manual_seed(0)
    return kind()


class Logger(pl.loggers.Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **keywords: Any) -> None:
        """Keep nothing of these."""


def fit(trained, *callbacks, loaders=None, resume=None, **changes):
    given = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        **changes,
    }
    trainer = pl.Trainer(callbacks=list(callbacks), **given)
    trainer.fit(trained, *(loaders or (train_loader(), eval_loader())), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("kind", [Module, WithOptimizer])
def test_lightning_with_and_without_an_optimizer_of_the_module(kind):
    plan = lm.Plan(lm.SGD, lr=0.5, clip_norm=0.1, schedule=lm.warmup("10%") >> lm.cosine())
    trained, callback = module(kind), PlanCallback(plan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", lm.LaminaWarning)
        fit(trained, callback)
    told = [str(w.message) for w in caught if issubclass(w.category, lm.LaminaWarning)]
    assert [("configure_optimizers is not used" in text) for text in told] == (
        [True] if kind is WithOptimizer else []
    )
    assert_same(trained, loop(plan))
    assert callback.optimizer.clock == 14
    assert "configure_optimizers" not in vars(trained)


def test_lightning_logs_each_group_next_to_its_own_monitor(tmp_path):
    logger, callback = Logger(), PlanCallback(scenario.PLAN)
    stopper = EarlyStopping("eval_loss", patience=5)
    fit(
        module(), callback, LearningRateMonitor(), stopper, logger=logger, default_root_dir=tmp_path
    )
    rows = {step: row for step, row in logger.rows if any(key.startswith("lr/") for key in row)}
    assert sorted(rows) == list(range(14))
    assert set(rows[3]) == {f"lr/{group['name']}" for group in callback.optimizer.param_groups}
    monitored = [row for _, row in logger.rows if any(key.startswith("plan") for key in row)]
    assert len(monitored) == 14  # what LearningRateMonitor reads before each step
    assert max(monitored[3].values()) == max(rows[3].values())


def test_lightning_stops_early_and_reports_metrics_of_the_training():
    plan = lm.Plan(
        lm.AdamW,
        lr=1e-12,
        feedback=lm.plateau("train_loss", patience=0),
        stop=lm.early_stop("eval_loss", patience=1),
    )
    callback = PlanCallback(plan)
    trainer = fit(module(), callback, max_epochs=5)
    assert trainer.current_epoch == 2
    seen = callback.optimizer.param_groups[0]["feedback"]
    assert all(value["best"] is not None for value in seen.values())
    losses = {key: value["best"] for key, value in seen.items()}
    assert len(set(losses.values())) == 2, losses


@pytest.mark.parametrize("extend", [None, "hold", "stretch"])
def test_a_longer_run_in_lightning(extend, tmp_path):
    plan = lm.Plan(lm.AdamW, lr=1e-3, schedule=lm.cosine())
    trainer = fit(module(), PlanCallback(plan), max_epochs=2)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["optimizer_states"][0]
    callback = PlanCallback(plan, extend=extend)
    if extend is None:
        with pytest.raises(lm.StateError, match=r"another length.*extend='hold'"):
            fit(module(), callback, max_epochs=3, resume=path)
        return
    logger = Logger()
    fit(module(), callback, max_epochs=3, resume=path, logger=logger)
    own = plan.build(make_model(), steps=21, steps_per_epoch=7, resume=state, extend=extend)
    rows = [row for step, row in logger.rows if step == 14 and "lr/default" in row]
    assert rows[0]["lr/default"] == own.param_groups[0]["lr"]


class Around(pl.LightningModule):
    """A module with its model in an attribute, as most are."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.model = make_model()
        if extra:
            self.extra = torch.nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch)["loss"]


def test_a_plan_for_the_model_inside_the_module():
    plan = lm.Plan(lm.SGD, lr=0.5, rules=[lm.Rule("bert.embeddings.*", frozen=True)])
    trained = Around()
    fit(trained, PlanCallback(plan, submodule="model"), loaders=[train_loader()])
    assert_same(trained.model, loop(plan))
    with pytest.raises(lm.PlanError, match=r"'model': extra.weight, extra.bias would train too"):
        fit(Around(extra=True), PlanCallback(plan, submodule="model"), loaders=[train_loader()])
    with pytest.raises(lm.PlanError, match=r"'modle'.*has no such part.*'model'"):
        fit(Around(), PlanCallback(plan, submodule="modle"), loaders=[train_loader()])


class Manual(Module):
    """Manual optimization: the module calls the optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self(**batch)["loss"])
        optimizer.step()
        optimizer.zero_grad()


def test_manual_optimization_needs_the_length():
    plan = lm.Plan(lm.SGD, lr=0.5, clip_norm=0.1, schedule=lm.cosine())
    with pytest.raises(lm.ScheduleError, match="pass steps="):
        fit(module(Manual), PlanCallback(plan))
    trained = module(Manual)
    fit(trained, PlanCallback(plan, steps=14))
    assert_same(trained, loop(plan))


def test_what_lightning_refuses():
    clipping = PlanCallback(lm.Plan(lm.SGD, lr=0.1, clip_norm=1.0))
    with pytest.raises(lm.PlanError, match=r"gradient_clip_val=1.0.*both|both.*gradient_clip_val"):
        fit(refused := module(), clipping, gradient_clip_val=1.0)
    assert "configure_optimizers" not in vars(refused)
    with pytest.raises(lm.PlanError, match="two PlanCallbacks"):
        fit(module(), PlanCallback(CONSTANT), PlanCallback(CONSTANT))
    waiting = lm.Plan(lm.SGD, lr=0.1, stop=lm.early_stop("loss"))
    with pytest.raises(lm.PlanError, match=r"waits for 'loss'.*'eval_loss'"):
        fit(module(), PlanCallback(waiting))
    with pytest.raises(lm.PlanError, match="expected a Plan or the path"):
        PlanCallback(torch.optim.SGD(make_model().parameters(), lr=0.1))
    with pytest.raises(lm.PlanError, match="is built in trainer"):
        _ = PlanCallback(CONSTANT).optimizer


# ------------------------------------------------------------------------ Accelerate and Fabric


def test_accelerate_counts_the_batches_of_a_process():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model, optimizer, first, second = for_accelerate.prepare(
        accelerator, scenario.PLAN, make_model(), train_loader(), eval_loader(), epochs=3
    )
    assert lm.unwrap(optimizer).resolved.run.steps == scenario.STEPS
    assert (len(first), len(second)) == (7, 1)
    assert model is accelerator.unwrap_model(model)


def test_what_accelerate_refuses():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(lm.TimeUnitError, match="steps_per_epoch"):
        for_accelerate.prepare(accelerator, scenario.PLAN, make_model(), epochs=3)
    with pytest.raises(lm.PlanError, match="optimizer already"):
        for_accelerate.prepare(
            accelerator,
            torch.optim.SGD(make_model().parameters(), lr=0.1),
            make_model(),
            epochs=3,
        )
    plain = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"))
    with pytest.raises(lm.PlanError, match="DEEPSPEED makes optimizers of its own"):
        for_accelerate.prepare(plain, CONSTANT, make_model(), steps=3)
    plain = SimpleNamespace(
        distributed_type=SimpleNamespace(value="NO"),
        gradient_state=SimpleNamespace(sync_with_dataloader=False),
    )
    with pytest.raises(lm.PlanError, match="sync_with_dataloader=False"):
        for_accelerate.prepare(plain, CONSTANT, make_model(), train_loader(), epochs=3)


def test_fabric_without_loaders_takes_steps():
    from lightning.fabric import Fabric

    model, optimizer = for_lightning.setup(
        Fabric(accelerator="cpu", devices=1), scenario.PLAN, make_model(), steps=12
    )
    assert optimizer.resolved.run.steps == 12
    assert isinstance(model, torch.nn.Module)

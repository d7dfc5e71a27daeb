"""A plan for the Trainer of Hugging Face's Transformers, and for the trainers built on it.

Source of the Trainer's behaviour: `transformers/trainer.py`, version 5.23. `create_optimizer` and
`create_scheduler` are the methods that its documentation offers for replacement.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint.distributed import load_distributed
from ..errors import LaminaError, PlanError, require
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..reuse import reuse_settings
from ..state.extend import check_extend
from .common import MetricFeed, as_plan, clips, rates, refuse_jumps, tell
from .reusing import begin_reuse

log = logging.getLogger("lamina")

_transformers = require("transformers", "hf", "lamina.integrations.transformers")
_Callback: Any = _transformers.TrainerCallback

#: arguments of the Trainer that a plan decides instead
_DECIDED = (
    *("learning_rate", "weight_decay", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("warmup_steps", "warmup_ratio", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "optim_args", "adafactor"),
)
#: optimizers for which the Trainer does another backward pass
_IN_BACKWARD = ("lomo", "adalomo")
_EXTEND = (
    "Give use_plan(trainer, plan, extend='hold') to keep its schedules and, past their end, their "
    "last values, or extend='stretch' to fit them to the new length."
)


def use_plan(
    trainer: Any,
    plan: Plan | str | os.PathLike[str],
    *,
    audit: bool = False,
    extend: str | None = None,
    reuse: bool | Mapping[str, Any] = False,
) -> None:
    """Train with a plan in `trainer.train()`.

    The optimizer is built when the Trainer makes its own, with the length that the Trainer
    computes. Metrics of each evaluation are reported under the Trainer's names (`eval_loss`);
    early stopping ends the training; the lr of each group is logged as `lr/<group>`, and as
    `learning_rate` the largest of them. Where the plan clips, the Trainer's `max_grad_norm` is 0
    during `train()`, so that gradients are not clipped twice; where it does not, the Trainer clips
    as before.

    Args:
        trainer: a `transformers.Trainer`, or one of a class derived from it, before `train()`.
        plan: a plan, or the path of its TOML file.
        audit: prove at every step that nothing moved what is frozen, as in `Plan.build`.
        extend: how a run resumed with another length goes on: `"hold"` or `"stretch"`, as in
            `Plan.build`. Without it, that is an error if values depend on the length.
        reuse: compute the outputs of what is frozen once per example during `train()`, in training
            and evaluation, with the same bits: True, or settings of `lamina.reuse` such as
            `{"space": "8 GB"}`. `trainer.reused` says what became of it.

    Raises:
        PlanError: if the trainer has an optimizer or a plan already, or trains through DeepSpeed
            or LOMO; nothing was changed. In `train()`, before the first step: if the trainer never
            evaluates though the plan waits for a metric, or a callback changes `max_steps`.

    Example:
        >>> use_plan(trainer, lm.Plan("AdamW", lr=2e-5, clip_norm=1.0))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    plan = as_plan(plan)
    check_extend(extend)
    settings = reuse_settings(reuse)
    _check(trainer)
    driver = _Driver(trainer, plan, audit, extend, settings)
    driver.tell_unused()
    # An instance's own functions, not a subclass: the trainer may be of any class.
    trainer.create_optimizer = driver.create_optimizer
    trainer.create_scheduler = driver.create_scheduler
    trainer.set_initial_training_values = driver.note_length
    trainer.get_batch_samples = driver.get_batch_samples
    trainer._load_optimizer_and_scheduler = driver.load_state
    trainer.train = driver.train
    trainer.reused = None
    # First, so that what it adds to the logs reaches every other callback.
    trainer.callback_handler.callbacks.insert(0, driver)
    if trainer.args.max_grad_norm and clips(plan):
        log.warning("max_grad_norm=%g is not used: the plan clips.", trainer.args.max_grad_norm)


def _check(trainer: Any) -> None:
    """Refuse what cannot train with a plan, before anything is changed."""
    if not isinstance(trainer, _transformers.Trainer):
        raise PlanError(f"use_plan expects a transformers.Trainer, not {type(trainer).__name__}.")
    if not hasattr(trainer, "set_initial_training_values"):
        raise LaminaError(
            f"the Trainer of transformers {_transformers.__version__} does not tell the length of "
            "a run. Update it with: pip install --upgrade transformers"
        )
    if any(isinstance(each, _Driver) for each in trainer.callback_handler.callbacks):
        raise PlanError("this trainer has a plan already; make a new trainer for another one.")
    if trainer.optimizer is not None or getattr(trainer, "optimizer_cls_and_kwargs", None):
        raise PlanError(
            "this trainer was given an optimizer of its own (optimizers= or "
            "optimizer_cls_and_kwargs=), and a plan makes its own. Leave that argument out."
        )
    if trainer.lr_scheduler is not None:
        raise PlanError(
            "this trainer was given a scheduler of its own (optimizers=), and the plan decides "
            "every learning rate. Leave it out, and write the schedule in the plan."
        )
    if trainer.is_deepspeed_enabled:
        raise PlanError(
            "DeepSpeed makes optimizers of its own from what it is given; a plan does not work "
            "with it. Use DDP, or FSDP2 (fsdp_version: 2)."
        )
    if _plain(trainer.args.optim) in _IN_BACKWARD:
        raise PlanError(
            f"optim={_plain(trainer.args.optim)!r} makes the Trainer update the weights in its "
            "backward pass, where a plan has no say. Leave optim= out; the plan names the "
            "optimizer."
        )


def _unused_arguments(args: Any) -> list[str]:
    """Return those arguments that differ from their default and that the plan decides."""
    defaults = {field.name: field.default for field in dataclasses.fields(type(args))}
    named = [name for name in _DECIDED if name in defaults and hasattr(args, name)]
    return [f"{name}={_plain(getattr(args, name))!r}" for name in named if _is_set(args, name)]


def _is_set(args: Any, name: str) -> bool:
    (field,) = (each for each in dataclasses.fields(type(args)) if each.name == name)
    value = getattr(args, name)
    if not value and not field.default:  # None, 0, {} and False all say "not set"
        return False
    return bool(_plain(value) != _plain(field.default))


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # the member of an enum


class _Driver(_Callback):  # type: ignore[misc]
    """What stands in the Trainer for a plan: its two factories, and its events."""

    def __init__(
        self,
        trainer: Any,
        plan: Plan,
        audit: bool,
        extend: str | None,
        reuse: dict[str, Any] | None,
    ) -> None:
        self._trainer = trainer
        self._plan, self._audit, self._extend = plan, audit, extend
        self._reuse = reuse
        self._train = trainer.train
        self._compute_length = trainer.set_initial_training_values
        self._get_batches = trainer.get_batch_samples
        self._load_state = trainer._load_optimizer_and_scheduler
        self._told: set[str] = set()
        self._checkpoint: str | None = None
        self._length_checked = False
        self._steps = 0
        self._steps_per_epoch: int | None = None
        self._optimizer: Optimizer | None = None
        self._metrics: MetricFeed | None = None

    # --- instead of methods of the Trainer -----------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **keywords: Any) -> Any:
        """Remember the checkpoint to resume from, which the Trainer loads after the build."""
        self._checkpoint = None
        if isinstance(resume_from_checkpoint, (str, os.PathLike)):
            self._checkpoint = os.fspath(resume_from_checkpoint)
        elif resume_from_checkpoint:
            self._checkpoint = _transformers.trainer_utils.get_last_checkpoint(
                self._trainer.args.output_dir
            )
        arguments = self._trainer.args
        limit = arguments.max_grad_norm
        if clips(self._plan):
            arguments.max_grad_norm = 0.0
        try:
            return self._train(resume_from_checkpoint, *args, **keywords)
        finally:
            arguments.max_grad_norm = limit  # another trainer may be made from these arguments
            self._metrics = None  # an evaluation by hand afterwards is no part of the run
            self._end_reuse()

    def _end_reuse(self) -> None:
        if self._trainer.reused is not None:
            self._trainer.reused.close()

    def note_length(self, *args: Any, **keywords: Any) -> Any:
        """Remember what the Trainer found: optimizer steps in an epoch and in the run."""
        values = self._compute_length(*args, **keywords)
        self._steps = values[-1]
        # Of a loader without a length, the Trainer calls the whole run an epoch.
        self._steps_per_epoch = None if values[0] == sys.maxsize else values[1]
        return values

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Build the optimizer of the plan; anew in each `train()`, as its length may be another."""
        if not self._steps:
            raise PlanError(
                "the length of the run is not known before trainer.train(), which builds the "
                "optimizer of the plan itself. Leave out the call of create_optimizer."
            )
        if self._optimizer is not None:
            self._optimizer.release()
        model = self._trainer.model if model is None else model
        self._optimizer = self._plan.build(
            model,
            steps=self._steps,
            steps_per_epoch=self._steps_per_epoch,
            audit=self._audit,
            resume=self._saved_state(),
            extend=self._extend if self._checkpoint else None,
        )
        self._trainer.optimizer = self._optimizer
        return self._optimizer

    def _saved_state(self) -> dict[str, Any] | None:
        """Return the state to go on from, if only the build can settle another length of the run.

        Otherwise the Trainer loads it, as it loads what is sharded over processes.
        """
        if self._extend is None or self._checkpoint is None:
            return None
        path = os.path.join(self._checkpoint, "optimizer.pt")
        if not os.path.isfile(path):
            raise PlanError(
                f"extend={self._extend!r} needs {path}, and there is none: checkpoints that are "
                "sharded over processes can be resumed only with the same length."
            )
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        """Return a scheduler that changes nothing, from which the Trainer reads the lr."""
        assert self._optimizer is not None
        trainer = self._trainer
        scheduler = self._optimizer.scheduler_view()
        trainer.lr_scheduler = scheduler
        trainer._created_lr_scheduler = True  # so that the next `train()` asks for a new one
        return scheduler

    def load_state(self, checkpoint: str | None) -> None:
        """Load all of the state: with FSDP2, torch would leave out what is frozen for now."""
        assert self._optimizer is not None
        if checkpoint is None or not getattr(self._trainer.accelerator.state, "is_fsdp2", False):
            self._load_state(checkpoint)
            return
        sharded = os.path.join(checkpoint, "optimizer_0")  # so Accelerate names the folder
        if os.path.isdir(sharded):
            load_distributed(self._optimizer, sharded)
        else:
            with self._optimizer.receiving():
                self._load_state(checkpoint)

    def get_batch_samples(self, *args: Any, **keywords: Any) -> Any:
        """Give no batches to a run that the plan had ended before it was saved.

        The Trainer asks whether to stop only after a step.
        """
        if self._ended:
            return [], None
        return self._get_batches(*args, **keywords)

    @property
    def _ended(self) -> bool:
        return self._metrics is None and self._optimizer is not None and self._optimizer.should_stop

    def tell_unused(self) -> None:
        """Warn of arguments that the plan decides: once of each, however often it is asked."""
        unused = [text for text in _unused_arguments(self._trainer.args) if text not in self._told]
        self._told.update(unused)
        if unused:
            tell(
                f"the plan decides what {', '.join(unused)} of the TrainingArguments would have: "
                "these are not used."
            )

    # --- events --------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check what was loaded, and that the metrics which the plan waits for will come."""
        assert self._optimizer is not None
        self.tell_unused()  # a search over hyperparameters sets them in `train()`
        self._length_checked = False
        if self._extend is None:
            refuse_jumps(self._optimizer.last_load, _EXTEND)
        metrics = MetricFeed(self._optimizer)
        if metrics.watched and _plain(args.eval_strategy) == "no":
            raise PlanError(
                f"the plan waits for {metrics.watched[0]!r}, but the Trainer never evaluates "
                "(eval_strategy='no'). Set eval_strategy='epoch', and give an eval_dataset."
            )
        self._metrics = metrics
        self._end_reuse()  # the Trainer begins anew when it looks for a batch size that fits
        trainer = self._trainer
        trainer.reused = begin_reuse(
            trainer.model, trainer.model_wrapped, self._optimizer, self._reuse
        )
        if self._missed_evaluation(args, state):
            self._trainer.evaluate()
        if self._optimizer.should_stop:
            self._metrics = None
            control.should_training_stop = True
            tell("the plan had ended this run when it was saved, so that no step is trained.")

    def _missed_evaluation(self, args: Any, state: Any) -> bool:
        """Return whether the run was saved at the end of an epoch, before its evaluation.

        The Trainer goes on with the next epoch then, and the plan would miss these metrics.
        """
        assert self._metrics is not None
        step = state.global_step
        if not self._metrics.watched or _plain(args.eval_strategy) != "epoch":
            return False
        if not self._checkpoint or not self._steps_per_epoch or step % self._steps_per_epoch:
            return False
        if state.epoch < args.eval_delay:
            return False
        done = [row for row in state.log_history if row.get("step") == step]
        return not any(name.startswith("eval_") for row in done for name in row)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> Any:
        """Report the metrics, and end the training if the plan says so."""
        if self._metrics is not None and self._optimizer is not None:
            self._metrics.report(metrics or {})
            if self._optimizer.should_stop:
                control.should_training_stop = True
        return control

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Raise if the last evaluation had not what the plan waits for, or the length changed."""
        if not self._length_checked and state.max_steps != self._steps:
            raise PlanError(
                f"the run had {self._steps} steps when the optimizer was built, and a callback has "
                f"made them {state.max_steps}: the schedules would not fit. Set max_steps= or "
                "num_train_epochs= of the TrainingArguments; a callback can end a run with "
                "control.should_training_stop."
            )
        self._length_checked = True
        if self._metrics is not None:
            self._metrics.check("the Trainer's evaluation")

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add the learning rate of each group to the Trainer's own entry, for all loggers.

        The Trainer's `learning_rate` is that of the first group, which is often frozen.
        """
        if self._optimizer is None or logs is None or "learning_rate" not in logs:
            return
        added = rates(self._optimizer)
        added["learning_rate"] = max(added.values())
        logs.update(added)
        state.log_history[-1].update(added)  # the Trainer has copied the entry already

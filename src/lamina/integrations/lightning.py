"""A plan for Lightning's Trainer, and for Fabric.

Source of their behaviour: `lightning/pytorch/trainer/trainer.py` and `lightning/fabric/fabric.py`,
version 2.6. `configure_optimizers` is called after the strategy has wrapped the module.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ..checkpoint.distributed import load_distributed
from ..errors import PlanError, StateError, require
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..reuse import Reuse, reuse_settings
from ..state.extend import check_extend
from .common import MetricFeed, as_plan, batches_in, clips, rates, refuse_jumps, tell
from .lightning_checks import (
    check_callbacks,
    check_strategy,
    refuse_several_optimizers,
    trained_part,
)
from .lightning_reuse import LightningReuse
from .reusing import begin_reuse

_pytorch = require("lightning.pytorch", "lightning", "lamina.integrations.lightning")
_Callback: Any = _pytorch.Callback

_EXTEND = (
    "Give PlanCallback(plan, extend='hold') to keep its schedules and, past their end, their last "
    "values, or extend='stretch' to fit them to the new length."
)


class PlanCallback(_Callback):  # type: ignore[misc]
    """Train with a plan in `trainer.fit(module)`.

    The callback stands in for the module's `configure_optimizers`, and takes the length of the run
    from the trainer. Metrics that the plan watches are reported at the end of each validation (or
    training epoch) under the names with which the module logs them; early stopping ends the
    training; the lr of each group is logged as `lr/<group>`.

    Args:
        plan: a plan, or the path of its TOML file.
        submodule: the name of the part of the module whose parameters the plan names, such as
            `"model"` for a plan that was written for the model in `self.model`; nothing else of the
            module may train then.
        steps: the length of the run in optimizer steps, for modules with manual optimization,
            whose steps the trainer cannot foretell.
        audit: prove at every step that nothing moved what is frozen, as in `Plan.build`.
        extend: how a run resumed with another length goes on: `"hold"` or `"stretch"`, as in
            `Plan.build`. Without it, that is an error if values depend on the length.
        reuse: compute the outputs of what is frozen once per example during `fit`, in training and
            validation, with the same bits: True, or settings of `lamina.reuse` such as
            `{"space": "8 GB"}`. It is about the part that `training_step` calls. `callback.reused`
            says what became of it.

    Raises:
        PlanError: when training begins, if the plan and the trainer both clip, another callback
            schedules, freezes or changes the length of the run, the module wants several
            optimizers, or the strategy is not supported; after the first epoch, if a metric that
            the plan waits for was not logged.

    Example:
        >>> callback = PlanCallback(lm.Plan("AdamW", lr=2e-5))  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=3, callbacks=[callback]).fit(module)  # doctest: +SKIP
    """

    def __init__(
        self,
        plan: Plan | str | os.PathLike[str],
        *,
        submodule: str | None = None,
        steps: int | None = None,
        audit: bool = False,
        extend: str | None = None,
        reuse: bool | Mapping[str, Any] = False,
    ) -> None:
        check_extend(extend)
        self._reuse = LightningReuse(reuse_settings(reuse))
        self._plan = as_plan(plan)
        self._submodule = submodule
        self._steps, self._audit, self._extend = steps, audit, extend
        self._module: Any = None
        self._replaced: Any = None
        self._trained: weakref.ref[nn.Module] | None = None
        self._built: tuple[int | None, int | None] = (None, None)
        self._length_checked = False
        self._optimizer: Optimizer | None = None
        self._metrics: MetricFeed | None = None
        # Lightning keeps all metrics in one place, where those of the last epoch stay.
        self._of_training: set[str] = set()
        self._of_validation: set[str] = set()
        self._logged = 0

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the plan has built; there is none before `fit`."""
        if self._optimizer is None:
            raise PlanError("the optimizer of a PlanCallback is built in trainer.fit.")
        return self._optimizer

    @property
    def reused(self) -> Reuse | None:
        """What is reused in this or the last `fit`; None before it begins, and without `reuse=`."""
        return self._reuse.session

    # Lightning gives each callback the module's `log` before it looks whether the module has
    # `configure_optimizers`, and runs no hook of a callback as early. So this is where a module
    # without one gets it; `setup` does it for all others.
    @property
    def log(self) -> Any:
        """The module's `log`, which Lightning gives to each callback."""
        return self._log

    @log.setter
    def log(self, log: Any) -> None:
        self._log = log
        module = getattr(log, "__self__", None)
        if isinstance(module, _pytorch.LightningModule) and _is_fitting(module.trainer):
            self._supply(module)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the trainer, and stand in for the module's `configure_optimizers`."""
        if stage != "fit":
            return
        if trainer.gradient_clip_val and clips(self._plan):
            raise PlanError(
                f"both the Trainer (gradient_clip_val={trainer.gradient_clip_val}) and the plan "
                "clip gradients. Leave gradient_clip_val out."
            )
        check_strategy(trainer.strategy)
        check_callbacks(trainer.callbacks, known_length=self._steps is not None)
        others = [c for c in trainer.callbacks if isinstance(c, PlanCallback) and c is not self]
        if others:
            raise PlanError("this trainer has two PlanCallbacks; one plan trains a module.")
        trained = self._trained() if self._trained else None
        if trainer.ckpt_path is None and trainer.global_step and trained is not pl_module:
            raise PlanError(
                f"this trainer has taken {trainer.global_step} steps already, and would give "
                f"{type(pl_module).__name__} the rest of its run. Make a new Trainer for it."
            )
        if trainer.ckpt_path is None and self._optimizer is not None:
            self._optimizer.release()  # of an earlier fit: the model is built on once more
        self._supply(pl_module)

    def _supply(self, module: Any) -> None:
        if self._module is module:
            return
        base = _pytorch.LightningModule.configure_optimizers
        there = module.configure_optimizers
        ours = isinstance(getattr(there, "__self__", None), PlanCallback)
        if not ours and getattr(there, "__func__", there) is not base:
            tell(
                f"{type(module).__name__}.configure_optimizers is not used: PlanCallback builds "
                "the optimizer from its plan."
            )
        self._module, self._replaced = module, None if ours else there
        module.configure_optimizers = self._configure

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its `configure_optimizers` back, and end the reports of metrics."""
        self._give_back()
        self._reuse.end()
        self._metrics = None  # a validation by hand afterwards is no part of the run

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give it back after a failure too, where Lightning calls no `teardown`."""
        self._give_back()
        self._reuse.end()

    def _give_back(self) -> None:
        if self._module is not None:
            vars(self._module).pop("configure_optimizers", None)
            vars(self._module.trainer.strategy).pop("load_checkpoint", None)
            self._module = None

    def _configure(self) -> dict[str, Any]:
        """Build the optimizer: Lightning calls this once the module is wrapped."""
        module, trainer = self._module, self._module.trainer
        if not module.automatic_optimization:
            refuse_several_optimizers(module, self._replaced)
        self._built = steps, per_epoch = self._length(module)
        resume = self._saved_state(trainer)
        self._optimizer = self._plan.build(
            trained_part(module, self._submodule),
            steps=steps,
            steps_per_epoch=per_epoch,
            audit=self._audit,
            resume=resume,
            extend=self._extend if resume else None,
        )
        self._trained = weakref.ref(module)
        if trainer.strategy.restore_checkpoint_after_setup:
            self._load_sharded(trainer.strategy)
        scheduler = self._optimizer.scheduler_view()  # for those that read the lr from one
        return {
            "optimizer": self._optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "plan"},
        }

    def _length(self, module: Any) -> tuple[int | None, int | None]:
        """Return the optimizer steps of the run and of an epoch, None where nobody knows."""
        trainer = module.trainer
        if not module.automatic_optimization:
            return self._steps, None
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()  # with max_steps, nothing else has asked for the length
        steps = trainer.estimated_stepping_batches
        batches = trainer.num_training_batches
        per_epoch = None
        if math.isfinite(batches):
            per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        if self._steps is not None:
            return self._steps, per_epoch
        return (int(steps) if math.isfinite(steps) and steps >= 0 else None), per_epoch

    def _load_sharded(self, strategy: Any) -> None:
        """Make the strategy load all of the optimizer's state, also of what is frozen for now.

        ModelParallelStrategy leaves the state to torch, which reads only into tensors that exist
        and leaves out what is frozen. Undone in `_give_back`.
        """
        load, optimizer = strategy.load_checkpoint, self.optimizer

        def load_checkpoint(path: str | os.PathLike[str], *args: Any, **keywords: Any) -> Any:
            if self._extend is not None:
                raise StateError(
                    f"extend={self._extend!r} does not work with {type(strategy).__name__}, which "
                    "loads after the optimizer was built. Resume with the same length."
                )
            if not os.path.isdir(path):
                with optimizer.receiving():
                    return load(path, *args, **keywords)
            optimizers, strategy.optimizers = strategy.optimizers, []
            try:
                content = load(path, *args, **keywords)
            finally:
                strategy.optimizers = optimizers
            load_distributed(optimizer, path, key="optimizer_0")
            return content

        strategy.load_checkpoint = load_checkpoint

    def _saved_state(self, trainer: Any) -> dict[str, Any] | None:
        """Return the state to go on from, if only the build can settle another length of the run.

        Otherwise Lightning loads it, as it loads what is sharded over processes. A second `fit` of
        a trainer goes on where the first ended, with the state of that.
        """
        if trainer.ckpt_path is None and trainer.global_step and self._optimizer is not None:
            return self._optimizer.state_dict()
        if self._extend is None or trainer.ckpt_path is None:
            return None
        try:
            saved = torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True)
            state: dict[str, Any] = saved["optimizer_states"][0]
        except Exception as error:
            raise StateError(
                f"extend={self._extend!r} needs the optimizer's state in {trainer.ckpt_path}, "
                f"which cannot be read without running code from it: {error}"
            ) from error
        return state

    # --- events --------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what was loaded, and that the metrics which the plan waits for can come."""
        if self._extend is None:
            refuse_jumps(self.optimizer.last_load, _EXTEND)
        _resume_loaders(trainer.fit_loop)
        self._metrics = MetricFeed(self.optimizer)
        self._length_checked = False
        self._reuse.follow(pl_module, trainer.strategy.model, self.optimizer)
        if self.optimizer.should_stop:
            trainer.should_stop = True
            tell("the plan had ended this run already, so that no step is trained.")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise if the length of the run has changed since the optimizer was built."""
        if self._length_checked:
            return
        self._length_checked = True
        now = self._length(pl_module)
        if now != self._built:
            raise PlanError(
                f"the optimizer was built for {self._built[0]} steps ({self._built[1]} an epoch), "
                f"and now the run has {now[0]} ({now[1]}): the schedules would not fit. Do not "
                "change max_epochs, max_steps, accumulate_grad_batches or the loader in a callback."
            )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember which metrics are there already: these are of the training."""
        if not trainer.sanity_checking:
            self._of_training |= trainer.callback_metrics.keys() - self._of_validation

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what the validation has logged."""
        if not trainer.sanity_checking and self._metrics is not None:
            self._of_validation |= trainer.callback_metrics.keys() - self._of_training
            self._report(trainer, self._of_validation)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report what the training has logged, and notice what nobody logs."""
        assert self._metrics is not None
        self._report(trainer, trainer.callback_metrics.keys() - self._of_validation)
        if self._of_validation or not trainer.enable_validation:
            self._metrics.check("the module's log")

    def _report(self, trainer: Any, names: Collection[str]) -> None:
        assert self._metrics is not None
        self._metrics.report({name: trainer.callback_metrics[name] for name in names})
        if self.optimizer.should_stop:
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the learning rate of each group after a step, as often as the trainer logs."""
        self._reuse.begin()
        clock = self.optimizer.clock
        if clock == self._logged:  # this batch was only accumulated
            return
        self._logged = clock
        if not trainer.log_every_n_steps:  # as in barebones=True
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(rates(self.optimizer), step=trainer.global_step - 1)


def _resume_loaders(loop: Any) -> None:
    """Give resumable loaders the place that a checkpoint says.

    Lightning does it when it sets up the loaders, if it has read the checkpoint by then. But asking
    for the length of the run sets them up in `configure_optimizers`, which comes before.
    """
    if getattr(loop, "_combined_loader_states_to_load", None):
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)  # the one that is there began at the first batch


def _is_fitting(trainer: Any) -> bool:
    return bool(trainer.state.fn == "fit")


def setup(
    fabric: Any,
    plan: Plan | str | os.PathLike[str],
    model: nn.Module,
    *loaders: Any,
    steps: int | None = None,
    epochs: float | None = None,
    accumulate: int = 1,
    audit: bool = False,
    resume: Mapping[str, Any] | None = None,
    extend: str | None = None,
    reuse: bool | Mapping[str, Any] = False,
) -> tuple[Any, ...]:
    """Build a plan for a loop with Fabric: set up loaders, optimizer and model in this order.

    The length is that of the first loader, as each process sees it.

    Args:
        fabric: after `launch()`.
        plan: a plan, or the path of its TOML file.
        model: the model; Fabric wraps it.
        *loaders: data loaders; epochs are counted by the first.
        steps: the length of the run in optimizer steps; or
        epochs: its length in epochs of the first loader.
        accumulate: batches that make one optimizer step.
        audit: as in `Plan.build`.
        resume: as in `Plan.build`.
        extend: as in `Plan.build`.
        reuse: compute the outputs of what is frozen once per example, with the same bits: True, or
            settings of `lamina.reuse` such as `{"space": "8 GB"}`. `fabric.reused` says what became
            of it.

    Returns:
        The model, the optimizer, and the loaders, all set up. The optimizer is Fabric's wrapper,
        which has the methods of lamina's: `report`, `should_stop`, `applied`.

    Raises:
        PlanError: if the plan cannot be carried out on this model; nothing was set up.
    """
    plan = as_plan(plan)
    settings = reuse_settings(reuse)
    ready = [fabric.setup_dataloaders(loader) for loader in loaders]
    optimizer = plan.build(
        model,
        steps=steps,
        epochs=epochs,
        steps_per_epoch=batches_in(ready),
        accumulate=accumulate,
        audit=audit,
        resume=dict(resume) if resume is not None else None,
        extend=extend,
    )
    prepared, wrapped = fabric.setup(model, optimizer)
    fabric.reused = begin_reuse(model, prepared._forward_module, optimizer, settings)
    return (prepared, wrapped, *ready)

"""A plan for Lightning's Trainer, and for Fabric.

Source of their behaviour: `lightning/pytorch/trainer/trainer.py` and `lightning/fabric/fabric.py`,
version 2.6. `configure_optimizers` is called after the strategy has wrapped the module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from .._util.text import listed
from ..errors import PlanError, StateError, did_you_mean, require
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..state.extend import check_extend
from .common import MetricFeed, as_plan, batches_in, clips, rates, refuse_jumps, tell

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

    Raises:
        PlanError: when training begins, if the plan and the trainer both clip, or never validates
            though the plan waits for a metric.

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
    ) -> None:
        check_extend(extend)
        self._plan = as_plan(plan)
        self._submodule = submodule
        self._steps, self._audit, self._extend = steps, audit, extend
        self._module: Any = None
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
        if type(trainer.strategy).__name__.startswith("DeepSpeed"):
            raise PlanError(
                "DeepSpeed makes optimizers of its own from what it is given; a plan does not "
                "work with it. Use the strategy 'ddp', or ModelParallelStrategy for FSDP2."
            )
        others = [c for c in trainer.callbacks if isinstance(c, PlanCallback) and c is not self]
        if others:
            raise PlanError("this trainer has two PlanCallbacks; one plan trains a module.")
        if trainer.ckpt_path is None and self._optimizer is not None:
            self._optimizer.release()  # of an earlier fit; this one begins from the weights
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
        self._module = module
        module.configure_optimizers = self._configure

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its `configure_optimizers` back."""
        self._give_back()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give it back after a failure too, where Lightning calls no `teardown`."""
        self._give_back()

    def _give_back(self) -> None:
        if self._module is not None:
            vars(self._module).pop("configure_optimizers", None)
            self._module = None

    def _configure(self) -> dict[str, Any]:
        """Build the optimizer: Lightning calls this once the module is wrapped."""
        module = self._module
        steps, per_epoch = self._length(module)
        self._optimizer = self._plan.build(
            _part(module, self._submodule),
            steps=steps,
            steps_per_epoch=per_epoch,
            audit=self._audit,
            resume=self._saved_state(module.trainer),
            extend=self._extend if module.trainer.ckpt_path else None,
        )
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
        steps = trainer.estimated_stepping_batches  # reads the loader, so it comes first
        batches = trainer.num_training_batches
        per_epoch = None
        if math.isfinite(batches):
            per_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
        if self._steps is not None:
            return self._steps, per_epoch
        return (int(steps) if math.isfinite(steps) and steps >= 0 else None), per_epoch

    def _saved_state(self, trainer: Any) -> dict[str, Any] | None:
        """Return the state to go on from, if only the build can settle another length of the run.

        Otherwise Lightning loads it, as it loads what is sharded over processes.
        """
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
        clock = self.optimizer.clock
        if clock == self._logged:  # this batch was only accumulated
            return
        self._logged = clock
        if trainer.global_step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics(rates(self.optimizer), step=trainer.global_step - 1)


def _part(module: nn.Module, name: str | None) -> nn.Module:
    """Return the part of a module that a plan is about; nothing outside of it may train."""
    if name is None:
        return module
    parts: dict[str, nn.Module] = dict(module.named_modules())
    if name not in parts:
        raise PlanError(
            f"submodule={name!r}: {type(module).__name__} has no such part."
            f"{did_you_mean(name, parts)}"
        )
    inside = {id(param) for param in parts[name].parameters()}
    others = [
        other
        for other, param in module.named_parameters()
        if param.requires_grad and id(param) not in inside
    ]
    if others:
        raise PlanError(
            f"submodule={name!r}: {listed(others)} would train too and is not in it. Freeze it "
            "(requires_grad_(False)), or leave submodule= out and write patterns for the whole."
        )
    return parts[name]


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

    Returns:
        The model, the optimizer, and the loaders, all set up. The optimizer is Fabric's wrapper,
        which has the methods of lamina's: `report`, `should_stop`, `applied`.

    Raises:
        PlanError: if the plan cannot be carried out on this model; nothing was set up.
    """
    plan = as_plan(plan)
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
    model, wrapped = fabric.setup(model, optimizer)
    return (model, wrapped, *ready)

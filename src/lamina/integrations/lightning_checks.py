"""What a plan cannot train beside in Lightning: named when `fit` begins, before anything is built.

Source of their behaviour: `lightning/pytorch/callbacks/` and `lightning/pytorch/strategies/`,
version 2.6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .._util.text import listed
from ..errors import PlanError, did_you_mean, require
from ..optimizer.optimizer import Optimizer

_pytorch = require("lightning.pytorch", "lightning", "lamina.integrations.lightning")

#: callbacks that do what a plan does, and what to do instead
_REFUSED = {
    "StochasticWeightAveraging": (
        "puts a schedule of its own in the place of the plan's. Write the schedule in the plan, "
        "and average with lightning's WeightAveraging"
    ),
    "BaseFinetuning": (
        "freezes and thaws by itself. Leave it out, and write frozen= and thaw= in the plan"
    ),
    "LearningRateFinder": (
        "writes learning rates over those of the plan. Search with a trainer that has no "
        "PlanCallback"
    ),
    "BatchSizeFinder": (
        "changes the length of the run after the optimizer was built for it. Search with a "
        "trainer that has no PlanCallback, and use the batch size found"
    ),
}
_CHANGES_LENGTH = (
    "changes how many steps an epoch has, which the trainer cannot foretell. Give the length "
    "in optimizer steps: PlanCallback(plan, steps=...)"
)


def check_callbacks(callbacks: Sequence[Any], known_length: bool) -> None:
    """Raise `PlanError` for a callback that schedules, freezes or changes the length of the run.

    Args:
        callbacks: those of the trainer.
        known_length: whether the length was given by hand.
    """
    refused = dict(_REFUSED)
    if not known_length:
        refused["GradientAccumulationScheduler"] = _CHANGES_LENGTH
    for name, reason in refused.items():
        kind = getattr(_pytorch.callbacks, name, ())
        found = [callback for callback in callbacks if isinstance(callback, kind)]
        if found:
            raise PlanError(f"the callback {type(found[0]).__name__} {reason}.")


def check_strategy(strategy: Any) -> None:
    """Raise `PlanError` for a strategy with which a plan does not work."""
    name = type(strategy).__name__
    if name.startswith("DeepSpeed"):
        raise PlanError(
            "DeepSpeed makes optimizers of its own from what it is given; a plan does not "
            "work with it. Use the strategy 'ddp', or ModelParallelStrategy for FSDP2."
        )
    if name == "FSDPStrategy":
        raise PlanError(
            "FSDPStrategy is FSDP1, with which no plan was tried in Lightning. Use "
            "ModelParallelStrategy, which is FSDP2, or the strategy 'ddp'."
        )


def refuse_several_optimizers(module: Any, configure: Callable[[], Any] | None) -> None:
    """Raise `PlanError` if a module with manual optimization makes several optimizers.

    Its `training_step` would step them by turns; a plan is one optimizer. With automatic
    optimization, Lightning takes one only.

    Args:
        module: the module.
        configure: its own `configure_optimizers`, which is called to count them; an error in it
            does not count, because it is not used otherwise.
    """
    if configure is None:
        return
    try:
        made = configure()
    except Exception:
        return
    if isinstance(made, (list, tuple)) and made and isinstance(made[0], (list, tuple)):
        made = made[0]  # optimizers and schedulers
    several = list(made) if isinstance(made, (list, tuple)) else [made]
    for optimizer in several:
        if isinstance(optimizer, Optimizer):
            optimizer.release()
    if len(several) > 1:
        raise PlanError(
            f"{type(module).__name__}.configure_optimizers makes {len(several)} optimizers, which "
            "training_step steps by turns; a plan is one optimizer for the whole module, stepped "
            "once. Give parts their own in its rules (Rule(..., optimizer=...)), or build "
            "plans in configure_optimizers yourself, without a PlanCallback."
        )


def trained_part(module: nn.Module, name: str | None) -> nn.Module:
    """Return the part of a module that a plan is about; nothing outside of it may train.

    Raises:
        PlanError: if there is no part of this name, or something outside of it would train.
    """
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

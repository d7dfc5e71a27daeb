"""A plan for a loop with Accelerate.

Source of its behaviour: `accelerate/accelerator.py`, version 1.15.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import PlanError, require
from ..plan.plan import Plan
from .common import as_plan, batches_in

require("accelerate", "train", "lamina.integrations.accelerate")

#: those that put an optimizer of their own in the place of what they are given
_REFUSED = ("DEEPSPEED", "MEGATRON_LM")


def prepare(
    accelerator: Any,
    plan: Plan | str | os.PathLike[str],
    model: nn.Module,
    *loaders: Any,
    steps: int | None = None,
    epochs: float | None = None,
    audit: bool = False,
    resume: Mapping[str, Any] | None = None,
    extend: str | None = None,
) -> tuple[Any, ...]:
    """Build a plan, and prepare model, optimizer and loaders in the order that works everywhere.

    The loaders come first, because only then is it known how many batches each process gets; model
    and optimizer go in together, as FSDP2 demands. The accelerator's own
    `gradient_accumulation_steps` makes optimizer steps of batches, with a partial last one.

    Args:
        accelerator: an `accelerate.Accelerator`.
        plan: a plan, or the path of its TOML file.
        model: the model; Accelerate wraps it.
        *loaders: data loaders; epochs are counted by the first.
        steps: the length of the run in optimizer steps; or
        epochs: its length in epochs of the first loader.
        audit: as in `Plan.build`.
        resume: as in `Plan.build`; `accelerator.load_state` loads it too.
        extend: as in `Plan.build`.

    Returns:
        The model, the optimizer, and the loaders, all prepared. The optimizer is Accelerate's
        wrapper; `lamina.report`, `lamina.should_stop` and `lamina.unwrap` take it.

    Raises:
        PlanError: if the plan cannot be carried out on this model, or for DeepSpeed and
            Megatron-LM; nothing was prepared but the loaders.

    Example:
        >>> model, optimizer, loader = prepare(
        ...     accelerator, plan, model, loader, epochs=3
        ... )  # doctest: +SKIP
    """
    plan = as_plan(plan)
    _check(accelerator, loaders)
    ready = [accelerator.prepare(loader) for loader in loaders]
    optimizer = plan.build(
        model,
        steps=steps,
        epochs=epochs,
        steps_per_epoch=batches_in(ready),
        accumulate=accelerator.gradient_accumulation_steps,
        audit=audit,
        resume=dict(resume) if resume is not None else None,
        extend=extend,
    )
    model, wrapped = accelerator.prepare(model, optimizer)
    return (model, wrapped, *ready)


def _check(accelerator: Any, loaders: Sequence[Any]) -> None:
    """Refuse what cannot train with a plan, before anything is prepared."""
    kind = accelerator.distributed_type.value
    if kind in _REFUSED:
        raise PlanError(
            f"{kind} makes optimizers of its own from what it is given; a plan does not work "
            "with it. Use DDP, or FSDP2 (fsdp_version=2)."
        )
    if loaders and not accelerator.gradient_state.sync_with_dataloader:
        raise PlanError(
            "with sync_with_dataloader=False, gradients are accumulated over the end of an epoch, "
            "and epochs have no whole number of steps. Leave it at True, or give steps= and "
            "prepare the loaders yourself."
        )

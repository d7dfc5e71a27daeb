"""A plan for a loop with Accelerate.

Source of its behaviour: `accelerate/accelerator.py`, version 1.15.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..checkpoint.distributed import load_distributed
from ..errors import PlanError, require
from ..optimizer.optimizer import Optimizer
from ..plan.plan import Plan
from ..reuse import reuse_settings
from .common import as_plan, batches_in
from .reusing import begin_reuse

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
    reuse: bool | Mapping[str, Any] = False,
) -> tuple[Any, ...]:
    """Build a plan, and prepare model, optimizer and loaders in the order that works everywhere.

    The loaders come first, because only then is it known how many batches each process gets; model
    and optimizer go in together, as FSDP2 demands. The accelerator accumulates gradients by its own
    `gradient_accumulation_steps`, with a partial last step.

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
        reuse: True, or settings of `lamina.reuse`, to compute what is frozen once per example, with
            the same bits; `accelerator.reused` says what became of it.

    Returns:
        The model, the optimizer, and the loaders, all prepared. `lamina.report` and
        `lamina.unwrap` take Accelerate's optimizer.

    Raises:
        PlanError: if the plan cannot be carried out on this model, or for DeepSpeed and
            Megatron-LM; nothing was prepared but the loaders.

    Example:
        >>> made = prepare(accelerator, plan, model, loader, epochs=3)  # doctest: +SKIP
    """
    plan = as_plan(plan)
    settings = reuse_settings(reuse)
    _check(accelerator, loaders)
    ready = [accelerator.prepare(loader) for loader in loaders]
    optimizer = plan.build(
        model,
        steps=steps,
        epochs=epochs,
        steps_per_epoch=batches_in(ready),
        accumulate=accelerator.gradient_accumulation_steps,
        audit=audit,
        resume=None if resume is None else dict(resume),
        extend=extend,
    )
    prepared, wrapped = accelerator.prepare(model, optimizer)
    _load_all_of(accelerator, optimizer, len(accelerator._optimizers) - 1)
    accelerator.reused = begin_reuse(model, prepared, optimizer, settings)
    return (prepared, wrapped, *ready)


def _load_all_of(accelerator: Any, optimizer: Optimizer, index: int) -> None:
    """Let `load_state` load all of an FSDP2 state: torch would leave out what is frozen for now.

    A state in one file finds room for all; one in a folder of shards is loaded by name, and is kept
    from Accelerate meanwhile.

    Args:
        accelerator: its `load_state` is replaced, on this object.
        optimizer: that of the plan.
        index: its place among the optimizers of the accelerator, by which folders are named.
    """
    if not getattr(accelerator.state, "is_fsdp2", False):
        return
    load, optimizers = accelerator.load_state, accelerator._optimizers

    def in_shards() -> bool:
        kind = accelerator.state.fsdp_plugin.state_dict_type
        # Of an optimizer before others Accelerate would take the folder of the next.
        return getattr(kind, "name", "") == "SHARDED_STATE_DICT" and index == len(optimizers) - 1

    def load_state(*args: Any, **keywords: Any) -> None:
        own = optimizers.pop() if in_shards() else None
        try:
            with optimizer.receiving():
                load(*args, **keywords)
        finally:
            if own is not None:
                optimizers.append(own)

    def load_shards(models: list[nn.Module], folder: str) -> None:
        shards = os.path.join(folder, f"optimizer_{index}")
        if os.path.isdir(shards):
            load_distributed(optimizer, shards)

    accelerator.load_state = load_state
    # Accelerate calls it when it has loaded what is sharded, with the folder that it found.
    accelerator.register_load_state_pre_hook(load_shards)


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

"""A run whose model is sharded over its processes: FSDP2, through Accelerate.

Source of its behaviour: `accelerate/utils/fsdp_utils.py`, version 1.15.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from ..errors import LaminaError


def is_sharded(accelerator: Any) -> bool:
    """Return whether a run shards its model, by its own setting or the launcher's."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def fsdp_plugin() -> Any:
    """Return what makes Accelerate shard each repeated block of a model, and what is left."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    try:
        return FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[],
        )
    except TypeError as error:
        raise LaminaError(
            "fsdp=True was given, but this version of accelerate has no FSDP2 "
            f"({error}). Install a newer one: pip install -U accelerate"
        ) from error


def let_shard(accelerator: Any, plugin: Any) -> None:
    """Let an accelerator shard; by itself it offers that for other devices than the CPU only."""
    from accelerate import DistributedType, PartialState

    # In both: Accelerate copies the second into the first whenever somebody asks for its state.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def choose_blocks(accelerator: Any, model: nn.Module) -> None:
    """Tell Accelerate which blocks to shard one by one, unless the launcher has told it.

    Args:
        accelerator: that of the run.
        model: the model, before it is sharded.
    """
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap == []:
        plugin.transformer_cls_names_to_wrap = block_classes(model)


def block_classes(model: nn.Module) -> list[str]:
    """Return the names of the classes of which a list or sequence in the model repeats modules.

    Only modules with parts of their own count: a layer by itself would be gathered for one
    product.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> block_classes(nn.ModuleList([block(), block(), nn.Linear(2, 2)]))
        ['Sequential']
    """
    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            kinds = Counter(type(child).__name__ for child in module if any(child.children()))
            found |= dict.fromkeys(name for name, count in kinds.items() if count > 1)
    return list(found)


def check_supported(accelerator: Any) -> None:
    """Raise for what the launcher asked of Accelerate and a plan cannot train with."""
    kind = accelerator.distributed_type.value
    if kind == "FSDP" and not is_sharded(accelerator):
        raise LaminaError(
            "the launcher asked for FSDP in its first version, with which a run cannot be saved. "
            "Set FSDP_VERSION=2 (fsdp_version: 2 in the configuration of Accelerate), or start "
            "with torchrun and give --fsdp."
        )
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise LaminaError(
            f"the launcher asked for {kind}, which makes optimizers of its own; a plan does not "
            "work with it. Start with torchrun, for FSDP2 with --fsdp."
        )

"""Replayed outputs that require a gradient, where they would have one without reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

#: who registers hooks named `make_inputs_require_grads`
_KNOWN = ("transformers", "peft", "trl")


class _ZeroGradients(torch.autograd.Function):
    """A copy of a tensor, with parameters as inputs that get zeros as gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(param.new_zeros(()).expand_as(param) for param in ctx.params)


def attach(
    tensor: torch.Tensor, params: Sequence[torch.Tensor], *, hooked: bool = False
) -> torch.Tensor:
    """Return a replayed output as part of the graph that it would be in without reuse.

    DistributedDataParallel waits in every backward pass for a gradient of each parameter that it
    holds, also while the parameter is frozen and the plan keeps this gradient at zero. So the
    output of a call that was not made gives these parameters zeros.

    Args:
        tensor: a replayed output.
        params: the frozen parameters that it depends on and that require a gradient.
        hooked: whether a hook would have made it require a gradient.
    """
    if not torch.is_grad_enabled() or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if params:
        attached: torch.Tensor = _ZeroGradients.apply(tensor, *params)  # type: ignore[no-untyped-call]
        return attached
    return tensor.requires_grad_() if hooked else tensor


def asks_for_gradients(module: nn.Module) -> bool:
    """Return whether the only hook of a module makes its output require a gradient.

    Transformers registers one on the embeddings for activation checkpointing, which otherwise gives
    layers above a frozen input no gradient in its reentrant form. It changes no value.
    """
    hooks = list(module._forward_hooks.values())
    names = [str(getattr(hook, "__name__", "")) for hook in hooks]
    owners = [str(getattr(hook, "__module__", "")).partition(".")[0] for hook in hooks]
    return (
        bool(hooks)
        and not module._forward_pre_hooks
        and all(name.startswith("make_inputs_require_grad") for name in names)
        and all(owner in _KNOWN for owner in owners)
    )

"""What identifies an example, and what else its stored outputs depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten

_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)


class UnhashableInputError(Exception):
    """The inputs of a pass do not tell which examples they hold."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of one pass.

    `leaves` are what they hold, `size` is the number of examples, `batched` are the places of the
    tensors whose first dimension counts the examples.
    """

    leaves: list[Any]
    structure: TreeSpec
    size: int
    batched: tuple[int, ...]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], size: int | None) -> Inputs:
        """Read the arguments of a pass.

        Args:
            args: as given to the model.
            kwargs: as given to the model.
            size: how many examples there are; by default what the first tensor says.

        Raises:
            UnhashableInputError: if that cannot be told, or something cannot be compared.
        """
        leaves, structure = tree_flatten((list(args), dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
                raise UnhashableInputError(
                    f"an input of type {type(leaf).__name__} cannot be compared with that of "
                    "another batch; expected tensors, numbers and texts in tuples, lists and dicts"
                )
        if size is None:
            first = next((tensor for tensor in tensors if tensor.ndim), None)
            if first is None:
                raise UnhashableInputError("no input is a tensor with a dimension for the examples")
            size = len(first)
        batched = tuple(
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and leaf.ndim and len(leaf) == size
        )
        if not size or not batched:
            raise UnhashableInputError(f"no input has {size} examples in its first dimension")
        return cls(leaves, structure, size, batched)

    def examples(self, places: Sequence[int] | None = None) -> list[bytes]:
        """Return what identifies each example: a hash of its part of every batched input.

        Args:
            places: of the examples; by default all.
        """
        count = self.size if places is None else len(places)
        hashes = [hashlib.blake2b(digest_size=16) for _ in range(count)]
        for place in self.batched:
            leaf = self.leaves[place]
            rows = row_bytes(leaf if places is None else leaf[list(places)])
            for one, row in zip(hashes, rows, strict=True):
                one.update(row)
        return [one.digest() for one in hashes]

    def form(self) -> str:
        """Return what the inputs look like, but for their sizes: what a trace depends on."""
        return f"{self.structure}{[self._form_of(leaf) for leaf in self.leaves]}"

    def layout(self) -> str:
        """Return the sizes of the inputs."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]
        return f"{self.size}{[(tuple(one.shape), one.stride()) for one in tensors]}"

    def unbatched(self) -> str:
        """Return a hash of every tensor that belongs to no single example.

        The Trainer of Transformers gives the model such a one, the number of words in a step.
        It is another in each batch, but only the loss depends on it.
        """
        whole = hashlib.blake2b(digest_size=16)
        for place, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor) and place not in self.batched:
                whole.update(row_bytes(leaf[None])[0])
        return whole.hexdigest()

    def copied(self) -> Inputs:
        """Return these inputs with a copy of every tensor."""
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        return replace(self, leaves=leaves)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments again."""
        args, kwargs = self.structure.unflatten(self.leaves)
        return args, kwargs

    def rows(self, places: torch.Tensor) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of a batch made of some of these examples."""
        leaves = list(self.leaves)
        for place in self.batched:
            leaves[place] = leaves[place].index_select(0, places.to(leaves[place].device))
        args, kwargs = self.structure.unflatten(leaves)
        return args, kwargs

    @staticmethod
    def _form_of(leaf: Any) -> str:
        if isinstance(leaf, torch.Tensor):
            return f"{leaf.ndim}{leaf.dtype}{leaf.device}{leaf.requires_grad}"
        return repr(leaf)


def row_bytes(tensor: torch.Tensor) -> list[memoryview]:
    """Return the bytes of each row of a tensor."""
    data = as_bytes(tensor.detach()).cpu().numpy()
    return [memoryview(row) for row in data]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's rows as bytes: uint8 of shape (rows, bytes of a row)."""
    flat = tensor.contiguous().reshape(len(tensor), tensor[0].numel())
    return flat.view(torch.uint8)


def context_of(model: nn.Module) -> str:
    """Return what the bits of a pass depend on beside inputs, weights and modes."""
    flags = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.allow_tf32,
        torch.backends.mkldnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cpu.get_cpu_capability(),
    )
    return f"{flags}{autocast_of(device_type(model))}"


def modes_of(model: nn.Module) -> str:
    """Return which modules are in training mode."""
    found = []
    seen = set()
    # At every pass; `model.modules()` takes several times as long.
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in seen:
            seen.add(module)
            found.append("t" if module.training else "e")
            waiting.extend(module._modules.values())
    return "".join(found)


def device_type(model: nn.Module) -> str:
    """Return the type of device that a model is on."""
    return next((param.device.type for param in model.parameters()), "cpu")


def autocast_of(device: str) -> tuple[bool, torch.dtype]:
    """Return whether autocast is on, and its dtype."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

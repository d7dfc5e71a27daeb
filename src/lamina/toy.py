"""A model, data and a loss that are ready at once: what the pages of the documentation train."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]


class Embeddings(nn.Module):
    """A vector for each word, normalized."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the vectors of words."""
        vectors: torch.Tensor = self.LayerNorm(self.word_embeddings(words))
        return vectors


class LayerOutput(nn.Module):
    """The part of a layer that has weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what a dense layer makes of the input, and normalize."""
        output: torch.Tensor = self.LayerNorm(x + torch.tanh(self.dense(x)))
        return output


class Layer(nn.Module):
    """One layer, with the names that BERT's layers have in Transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output = LayerOutput(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer."""
        output: torch.Tensor = self.output(x)
        return output


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the last layer."""
        for layer in self.layer:
            x = layer(x)
        return x


class ToyModel(nn.Module):
    """A classifier of texts: `embeddings`, `encoder.layer.0` and so on, `classifier`."""

    def __init__(self, words: int, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(words, width)
        self.encoder = Encoder(width, layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the logits of each text."""
        logits: torch.Tensor = self.classifier(self.encoder(self.embeddings(words)).mean(1))
        return logits


class ToyProblem(NamedTuple):
    """What `toy_problem` returns; unpack it, or take one of its three parts by name."""

    model: nn.Module
    loader: list[Batch]
    loss: Callable[[nn.Module, Batch], torch.Tensor]


def toy_problem(layers: int = 4) -> ToyProblem:
    """Return a small model, five batches of random texts, and a loss to train it with.

    The model has the layout of a BERT: `embeddings`, `encoder.layer.0` and so on, `classifier`. The
    same call gives the same weights and data, and leaves torch's random state as it was.

    Args:
        layers: how many layers the encoder has.

    Returns:
        `model`, `loader` (a list of batches) and `loss(model, batch)`.

    Example:
        >>> from lamina.toy import toy_problem
        >>> model, loader, loss = toy_problem()
        >>> loss(model, loader[0]).shape
        torch.Size([])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ToyModel(words=20, width=4, layers=layers, classes=2)
        loader = [(torch.randint(20, (8, 5)), torch.randint(2, (8,))) for _ in range(5)]
    return ToyProblem(model, loader, _cross_entropy)


def _cross_entropy(model: nn.Module, batch: Batch) -> torch.Tensor:
    words, classes = batch
    return nn.functional.cross_entropy(model(words), classes)

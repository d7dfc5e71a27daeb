"""What is trained: the example tasks `reviews` and `digits`, and small models for a try."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[2] / "examples" / "tasks"))

Batch = dict[str, Tensor]

#: texts in a batch
SIZE = 32


@dataclass(frozen=True)
class Stage:
    """A part of a model that trains while the rest is frozen; `limit` is the target for it."""

    label: str
    trains: str
    limit: float | None = None


@dataclass(frozen=True)
class Workload:
    """A model, its examples, and the stages at which it is measured.

    `examples` holds batched tensors by name, in groups: the examples of a batch come from one
    group, and have the same form. `tunes` are the parts that train after a linear probe. `rests`
    is frozen at all stages.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    arguments: Callable[[Batch], tuple[Tensor, ...]]
    groups: Sequence[Batch]
    size: int
    stages: tuple[Stage, ...]
    tunes: tuple[Stage, ...]
    rests: str | None = None

    @property
    def count(self) -> int:
        """The number of examples."""
        return sum(len(group["labels"]) for group in self.groups)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.epoch(0))

    def epoch(self, epoch: int, seed: int = 0) -> list[Batch]:
        """The batches of an epoch: other ones, in another order, at each epoch."""
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        batches = [
            {name: tensor[places] for name, tensor in group.items()}
            for group in self.groups
            for places in torch.randperm(len(group["labels"]), generator=generator).split(self.size)
        ]
        random.Random(f"{seed}:{epoch}").shuffle(batches)
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross entropy."""
        return functional.cross_entropy(model(*self.arguments(batch)), batch["labels"])


# --- texts ----------------------------------------------------------------------------------------


def padded(items: Sequence[Any], width: int) -> Batch:
    """Texts as one batch of so many tokens; what is longer is cut."""
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros(len(items), width, dtype=torch.bool)
    for row, item in enumerate(items):
        tokens = item.tokens[:width]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    labels = torch.tensor([item.label for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def text_arguments(batch: Batch) -> tuple[Tensor, ...]:
    """What the sentence encoder is called with."""
    return batch["input_ids"], batch["attention_mask"]


def text_stages(layers: int, *limits: float | None) -> tuple[Stage, ...]:
    """The head alone, the last layer with it, and the last two."""
    top = [f"encoder.layer.{layers - 1 - place}.*" for place in range(2)]
    return (
        Stage("head only", "classifier.*", limits[0]),
        Stage("last layer", f"classifier.* | {top[0]}", limits[1]),
        Stage("last two layers", f"classifier.* | {top[0]} | {top[1]}", limits[2]),
    )


def reviews_of_one_length(width: int = 32, limit: int | None = None) -> Workload:
    """MiniLM with the texts of `reviews` padded to one length."""
    import reviews

    items: Any = reviews.data()["train"].dataset
    stages = text_stages(6, 0.05, 0.40, 0.64)
    return Workload(
        name="reviews",
        title=f"reviews (MiniLM), batches of {SIZE} x {width} tokens",
        model=reviews.model,
        arguments=text_arguments,
        groups=[padded(items.items[:limit], width)],
        size=SIZE,
        stages=stages,
        tunes=(Stage("the last two layers", stages[2].trains, 0.5), Stage("all layers", "*", 0.5)),
    )


def small_texts(count: int = 32) -> Workload:
    """A small encoder with random weights, and random words."""
    stages = text_stages(3, None, None, None)
    return Workload(
        name="texts",
        title="a small encoder with random weights, batches of 8 x 12 words",
        model=small_encoder,
        arguments=text_arguments,
        groups=[padded(random_texts(count), 12)],
        size=8,
        stages=stages,
        tunes=(Stage("all layers", "*"),),
    )


def small_encoder() -> nn.Module:
    """The model of `reviews` with three narrow layers and random weights."""
    from transformers import BertConfig

    from task_helpers.encoder import ReviewClassifier

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return ReviewClassifier(config)


@dataclass(frozen=True)
class Text:
    """Numbers of words, and a class."""

    tokens: list[int]
    label: int


def random_texts(count: int, seed: int = 0) -> list[Text]:
    """Random words; the class says whether many of them have high numbers."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = [draw.randrange(1, 50) for _ in range(draw.randrange(4, 13))]
        found.append(Text(words, int(sum(words) > 25 * len(words))))
    return found


# --- images ---------------------------------------------------------------------------------------

IMAGE_STAGES = (
    Stage("head only", "_fc.*"),
    Stage("last block", "_fc.* | _conv_head.* | _blocks.15.*"),
    Stage("last four blocks", "_fc.* | _conv_head.* | _blocks.1[2345].*"),
)


def digits() -> Workload:
    """EfficientNet-Lite0 with the images of the task `digits`."""
    import digits as task

    images: Any = task.data()["train"].dataset
    return image_workload(
        "digits", "digits (EfficientNet-Lite0)", task.model, task.collate(list(images)), SIZE
    )


def small_images(count: int = 16) -> Workload:
    """EfficientNet-Lite0 with random weights, and random images."""
    from task_helpers.lite0 import Lite0

    generator = torch.Generator().manual_seed(0)
    examples = {
        "images": torch.randn(count, 3, 32, 32, generator=generator),
        "labels": torch.arange(count) % 10,
    }
    title = "EfficientNet-Lite0 with random weights"
    return image_workload("images", title, lambda: Lite0(10), examples, 8)


def image_workload(
    name: str, title: str, model: Callable[[], nn.Module], examples: Batch, size: int
) -> Workload:
    """The image network; its BatchNorm rests at all stages, as in the plan of `digits`."""
    side = examples["images"].shape[-1]
    return Workload(
        name=name,
        title=f"{title}, batches of {size} images of {side} x {side}",
        model=model,
        arguments=lambda batch: (batch["images"],),
        groups=[examples],
        size=size,
        stages=IMAGE_STAGES,
        tunes=(Stage("the last four blocks", IMAGE_STAGES[2].trains), Stage("all layers", "*")),
        rests="type:BatchNorm2d",
    )

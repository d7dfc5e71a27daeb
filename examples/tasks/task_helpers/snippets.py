"""Short texts with human ratings: reading, labelling, splitting, batching."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lamina.errors import TaskError

THRESHOLD = 0.5
Batch = dict[str, Tensor]


class Snippet(NamedTuple):
    """A text and its class: 1 positive, 0 negative."""

    text: str
    label: int


class Encoded(NamedTuple):
    """A tokenised text."""

    tokens: list[int]
    label: int


def label_of(rating: float) -> int | None:
    """The sign of a rating; None where the raters saw neither (absolute value at most 0.5)."""
    return None if not abs(rating) > THRESHOLD else int(rating > 0)


def read_snippets(path: Path) -> list[Snippet]:
    """The clearly rated texts of a file with lines `id <tab> mean rating <tab> text`."""
    snippets = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                _, rating, text = line.rstrip("\r\n").split("\t", 2)
                label = label_of(float(rating))
            except ValueError:
                raise TaskError(
                    f"{path}, line {number}: expected 'id <tab> rating <tab> text', got "
                    f"{line[:60]!r}. Remove the folder {path.parent} to fetch it anew."
                ) from None
            if label is not None:
                snippets.append(Snippet(text.strip(), label))
    return snippets


def same_words(text: str) -> str:
    """A key that texts share if they differ only in case, punctuation and spacing."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def distinct(snippets: Iterable[Snippet]) -> list[Snippet]:
    """The first of each set of texts with the same words."""
    first: dict[str, Snippet] = {}
    for snippet in snippets:
        first.setdefault(same_words(snippet.text), snippet)
    return list(first.values())


def split(
    snippets: Iterable[Snippet], train: int, validation: int, seed: int
) -> tuple[list[Snippet], list[Snippet]]:
    """A training and a held-out set that share no text; the same ones for the same seed."""
    pool = distinct(snippets)
    if len(pool) < train + validation:
        raise TaskError(
            f"{train} training and {validation} held-out texts were asked for, but there are only "
            f"{len(pool)} distinct ones. Ask for fewer."
        )
    random.Random(seed).shuffle(pool)
    return pool[validation : validation + train], pool[:validation]


class EncodedTexts(Dataset[Encoded]):
    """Tokenised texts in memory."""

    def __init__(self, items: Sequence[Encoded]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Encoded:
        return self.items[index]


def collate(items: Sequence[Encoded]) -> Batch:
    """Pad to the longest text of the batch."""
    width = max(len(item.tokens) for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask = torch.zeros(len(items), width, dtype=torch.bool)
    for row, item in enumerate(items):
        ids[row, : len(item.tokens)] = torch.tensor(item.tokens)
        mask[row, : len(item.tokens)] = True
    labels = torch.tensor([item.label for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class BySimilarLength(Sampler[int]):
    """A random order in which the texts of a batch have similar lengths, so little is padding.

    The order is a function of (seed, epoch). The epoch moves on by itself at each pass, or is set.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return iter(self.order(epoch))

    def order(self, epoch: int) -> list[int]:
        """Sort by length with some noise, cut into batches, shuffle the full batches."""
        draw = random.Random(f"{self.seed}:{epoch}")
        noisy = [(length * draw.uniform(0.8, 1.25), i) for i, length in enumerate(self.lengths)]
        indices = [i for _, i in sorted(noisy)]
        size = self.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        last = [batches.pop()] if batches and len(batches[-1]) < size else []
        draw.shuffle(batches)
        return [i for batch in batches + last for i in batch]


def loaders(
    train: Sequence[Encoded], validation: Sequence[Encoded], batch_size: int, seed: int
) -> dict[str, DataLoader[Encoded]]:
    """Training batches in a seeded random order; held-out batches in a fixed order, by length."""
    sampler = BySimilarLength([len(item.tokens) for item in train], batch_size, seed)
    by_length = sorted(validation, key=lambda item: len(item.tokens))
    return {
        "train": DataLoader(
            EncodedTexts(train), batch_size=batch_size, sampler=sampler, collate_fn=collate
        ),
        "validation": DataLoader(
            EncodedTexts(by_length), batch_size=2 * batch_size, collate_fn=collate
        ),
    }

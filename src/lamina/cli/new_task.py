"""`lamina new-task`: a complete small task file, to be changed into one's own."""

from __future__ import annotations

from keyword import iskeyword
from pathlib import Path

from ..errors import TaskError, printable
from ..files.atomic import atomic

TEMPLATE = '''"""Which of two spirals does a point lie on?

A task is a Python file with the functions below. Try it with: lamina run {name}
"""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

# How it trains. `lamina show {name}` prints what this means, before anything is trained.
PLAN = """
optimizer = "AdamW"
lr = 0.01
weight_decay = 0.01
schedule = "warmup(5%) >> cosine(to=0.01)"
clip_norm = 1.0

[[rule]]
match = "*.bias"
weight_decay = 0.0

[[rule]]  # the first layer rests for a fifth of the run
match = "0.*"
thaw = "20%"
"""

DEFAULTS = {{"epochs": 20, "batch_size": 32, "seed": 0}}


def model():
    """Return a fresh model."""
    return nn.Sequential(
        *(nn.Linear(2, 64), nn.ReLU()),
        *(nn.Linear(64, 64), nn.ReLU()),
        nn.Linear(64, 2),
    )


def data(batch_size, seed):
    """Return the loaders of the training and the held-out examples."""
    generator = torch.Generator().manual_seed(seed)
    angle = 3 * math.pi * torch.rand(800, generator=generator).sqrt()
    label = torch.arange(800) % 2
    turned = angle + math.pi * label
    points = torch.stack([turned.cos(), turned.sin()], dim=1) * angle[:, None] / 10
    points = points + 0.02 * torch.randn(800, 2, generator=generator)
    train = TensorDataset(points[:600], label[:600])
    held_out = TensorDataset(points[600:], label[600:])
    return {{
        "train": DataLoader(train, batch_size, shuffle=True, generator=generator),
        "validation": DataLoader(held_out, 100),
    }}


def loss(model, batch):
    """Return the mean loss of a batch."""
    points, label = batch
    return nn.functional.cross_entropy(model(points), label)


def metrics(model, batch):
    """Return one number per example, by name; lamina averages them over all batches."""
    points, label = batch
    scores = model(points)
    return {{
        "loss": nn.functional.cross_entropy(scores, label, reduction="none"),
        "accuracy": (scores.argmax(dim=1) == label).float(),
    }}
'''


def write_task(path: Path) -> None:
    """Write a small task file that can be run as it is.

    Args:
        path: where to write it; a new file whose name ends with .py.

    Raises:
        TaskError: if the name cannot be that of a task file, the folder is missing, or the file
            exists; nothing was written.
    """
    shown = printable(str(path))
    if path.suffix != ".py" or not path.stem.isidentifier() or iskeyword(path.stem):
        raise TaskError(
            f"{shown}: expected the name of a Python file that can be imported (letters, digits "
            "and underscores, no keyword), such as my_task.py."
        )
    if not path.parent.is_dir():
        raise TaskError(f"{shown}: there is no such folder; make it first, or give another path.")
    try:
        path.touch(exist_ok=False)  # of two commands at once, one has the name
    except FileExistsError:
        raise TaskError(
            f"{shown}: this file exists, and is left as it is; give another name."
        ) from None
    except OSError as error:
        raise TaskError(f"{shown}: cannot be written ({error.strerror or error}).") from error
    with atomic(path) as file:
        file.write(TEMPLATE.format(name=path.name).encode())

"""The embedded tasks: something real to train at once, and the pattern for a task of one's own.

A task is a module or a Python file that gives

    model() -> nn.Module
    data() -> {"train": DataLoader, "validation": DataLoader}
    loss(model, batch) -> the mean loss of a batch, a scalar tensor

and, if it likes,

    metrics(model, batch) -> {name: one float per example}; averaged exactly over all batches and
                             processes. If it has "loss", validation calls nothing else.
    baseline(data) -> {name: value}, figures from the same data to compare the result with
    PLAN      the default plan: TOML text or the path of a file
    DEFAULTS  {"epochs": ..., "batch_size": ..., "seed": ...}; with these, data() takes
              batch_size and seed as keywords
"""

from __future__ import annotations

BUILTIN = {"reviews": "lamina.tasks.reviews", "digits": "lamina.tasks.digits"}
DEFAULT = "reviews"

__all__ = ["BUILTIN", "DEFAULT"]

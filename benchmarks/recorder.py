"""The cost of a recorder, as a share of a training step: `python -m benchmarks.recorder`.

A transformer of MiniLM's size (6 layers, width 384) is trained on random numbers with a plan that
clips, by itself and with a recorder that measures every step, with and without updates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import lamina as lm

from .measure import interleave

WIDTH, LAYERS, HEADS = 384, 6, 12
KINDS = {
    "no recorder": None,
    "gradients and weights": {"every": 1, "updates": False},
    "updates too": {"every": 1},
    "updates, every 10th step": {"every": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recorder", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    batch = torch.randn(arguments.batch, arguments.tokens, WIDTH)
    trained = {kind: training(kind, batch) for kind in KINDS}
    for train in trained.values():
        train()
    times = interleave(trained, lambda: None, arguments.rounds)
    alone = times["no recorder"]
    for kind, its in times.items():
        print(f"{kind:<26} {its.median:8.1f} ms   x {its.ratio(alone):.3f}")


def training(kind: str, batch: torch.Tensor) -> Callable[[], None]:
    """One training step of a model of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    rules = [lm.Rule("layers.{depth}.*", lr=lm.by_depth(0.8))]
    optimizer = lm.Plan("AdamW", lr=1e-6, clip_norm=1.0, rules=rules).build(model)
    if KINDS[kind] is not None:
        optimizer.recorder(**KINDS[kind])

    def train() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return train


if __name__ == "__main__":
    main()

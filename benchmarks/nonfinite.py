"""The cost of looking at every gradient, as a share of a step: `python -m benchmarks.nonfinite`.

A transformer of MiniLM's size (6 layers, width 384) is trained on random numbers, once with
`nonfinite_check="all"` (the default) and once with `"norms"`, which without a norm looks at none.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import lamina as lm

from .measure import interleave

WIDTH, LAYERS, HEADS = 384, 6, 12


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nonfinite", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    batch = torch.randn(arguments.batch, arguments.tokens, WIDTH)
    optimizers, losses = {}, {}
    for check in ("all", "norms"):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        plan = lm.Plan("AdamW", lr=1e-6, nonfinite_check=check)
        optimizers[check] = plan.build(model)
        losses[check] = lambda model=model: model(batch).square().mean()

    def step(check: str) -> None:
        optimizers[check].step()

    def train(check: str) -> None:
        optimizers[check].zero_grad()
        losses[check]().backward()
        optimizers[check].step()

    for check in optimizers:
        train(check)
    steps = interleave(
        {check: lambda check=check: step(check) for check in optimizers},
        lambda: None,
        arguments.rounds,
    )
    whole = interleave(
        {check: lambda check=check: train(check) for check in optimizers},
        lambda: None,
        arguments.rounds,
    )
    for name, times in (("optimizer step", steps), ("training step", whole)):
        print(
            f"{name}: with the check {times['all'].median:.1f} ms, without "
            f"{times['norms'].median:.1f} ms, x {times['all'].ratio(times['norms']):.3f}"
        )
    cost = steps["all"].median - steps["norms"].median
    share = cost / whole["norms"].median
    print(f"the check takes {cost:.1f} ms: {100 * share:.1f} % of a training step")


if __name__ == "__main__":
    main()

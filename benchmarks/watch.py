"""What `lamina.watch` costs, as a share of a training step: `python -m benchmarks.watch`.

A transformer of MiniLM's size (22 million parameters) is trained by AdamW on random tokens, 16
texts of 32 tokens a batch; with `--reviews` it is the example task of that name. Steps without a
watch, with one that looks closely, and with one that does not are taken in turns, in one process.
The processor time inside of the watch is printed too: on a machine with other work it says more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import lamina as lm
from lamina.watch.steps import is_sampled

from .measure import interleave

WIDTH, LAYERS, HEADS, WORDS = 384, 6, 12, 30522
#: steps of an optimizer at which a watch looks at model and gradients, and at neither
CLOSE, OTHER = 30, 31


class Encoder(nn.Module):
    """Embeddings, six layers and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.classifier = nn.Linear(WIDTH, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(self.words(tokens)).mean(1))


def random_task(texts: int, tokens: int):
    model = Encoder()
    batch = torch.randint(WORDS, (texts, tokens)), torch.randint(2, (texts,))
    return model, lambda: nn.functional.cross_entropy(model(batch[0]), batch[1])


def reviews_task():
    sys.path.append(str(Path(__file__).parents[1] / "examples" / "tasks"))
    import reviews

    model = reviews.model()
    batch = next(iter(reviews.data()["train"]))
    return model, lambda: reviews.loss(model, batch)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--reviews", action="store_true", help="the task `reviews`")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, loss = (
        reviews_task() if arguments.reviews else random_task(arguments.batch, arguments.tokens)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    watching = lm.watch(model, optimizer)
    taps, observer = watching._taps, watching._observer
    (steps,) = [observer.built(optimizer)]
    assert steps is not None

    inside: dict[int, list[float]] = {CLOSE: [], OTHER: []}
    spent = 0.0
    call = watching._guard.call

    def timed(function, *given):
        nonlocal spent
        begin = time.thread_time()
        try:
            return call(function, *given)
        finally:
            spent += time.thread_time() - begin

    watching._guard.call = timed  # type: ignore[method-assign]

    def train() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    def watched(at: int) -> None:
        nonlocal spent
        steps.steps, spent = at, 0.0
        taps.install()
        begin = time.thread_time()
        train()
        whole = time.thread_time() - begin
        taps.disconnect()
        inside[at].append(spent / (whole - spent))

    candidates = {
        "without": train,
        "close": lambda: watched(CLOSE),
        "other": lambda: watched(OTHER),
    }
    times = interleave(candidates, lambda: None, arguments.rounds)
    assert len(observer.seen.record.series("group 0", "grad_norm")[0]) > 0
    base = times["without"].median
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, ", end="")
    print(f"{torch.get_num_threads()} threads, {arguments.rounds} rounds")
    print(f"a training step without a watch: {base:.1f} ms")
    share = {}
    for name, at, what in (("close", CLOSE, "looks closely"), ("other", OTHER, "counts only")):
        wall = times[name].ratio(times["without"]) - 1
        share[name] = statistics.median(inside[at])
        print(
            f"where the watch {what}: {100 * share[name]:.2f} % of a step inside of it; "
            f"step time {100 * wall:+.1f} %"
        )
    for length in (100, 1000, 10000):
        close = sum(is_sampled(step) for step in range(length)) / length
        mean = close * share["close"] + (1 - close) * share["other"]
        print(f"a run of {length:,} steps, {100 * close:.1f} % of them close: {100 * mean:.2f} %")


if __name__ == "__main__":
    main()

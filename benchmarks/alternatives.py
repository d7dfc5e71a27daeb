"""Ways to compute a step that were tried, beside the one used; for docs/explanation/kernels.md.

    python -m benchmarks.alternatives [--rounds 15]

- norms in hooks: each gradient's norm as soon as backward has made it, while it may still be in the
  cache, in place of one pass over all gradients before the update.
- chunks: how many elements a thread takes at a time.
- halves: one half of the chunks for each of two threads, in place of many small chunks.
- threads: those of Python in place of torch's own, just after an operation of torch, whose threads
  then wait busily for the next one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

import lamina as lm
from lamina.compiled import chunks
from lamina.compiled.openmp import torch_team
from lamina.gradients.norms import each_norm

from .measure import interleave
from .shapes import minilm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    show("Norms: a backward pass with them", norms(), rounds)
    show("Chunks: an AdamW step of MiniLM", steps(), rounds)
    show("Threads: a large addition and an AdamW step of MiniLM", threads(), rounds)


def show(title: str, candidates: dict[str, Callable[[], object]], rounds: int) -> None:
    print(f"\n{title}")
    times = interleave(candidates, lambda: None, rounds)
    base = next(iter(times.values()))
    for name, timing in times.items():
        print(f"  {name:<28} {timing.median:9.3f} ms  x {timing.ratio(base):.3f}")


def norms() -> dict[str, Callable[[], object]]:
    """A stack of layers as large as those of MiniLM, with both ways to its gradients' norms."""
    model = nn.Sequential(
        *(block for _ in range(6) for block in (nn.Linear(384, 1536), nn.Linear(1536, 384)))
    )
    batch = torch.randn(64, 384)
    found: list[torch.Tensor] = []

    def forward_and_back() -> None:
        model.zero_grad()
        model(batch).square().mean().backward()

    def after() -> None:
        forward_and_back()
        each_norm([param.grad for param in model.parameters() if param.grad is not None])

    def hook(param: torch.Tensor) -> None:
        if param.grad is not None:
            found.append(each_norm([param.grad])[0])

    def inside() -> None:
        found.clear()
        handles = [param.register_post_accumulate_grad_hook(hook) for param in model.parameters()]
        forward_and_back()
        for handle in handles:
            handle.remove()

    return {"after backward (used)": after, "in hooks": inside}


def steps() -> dict[str, Callable[[], object]]:
    """Steps of one optimizer for each size of chunks."""
    shapes = list(minilm().values())
    used = chunks.CHUNK
    found: dict[str, Callable[[], object]] = {}
    for size in (used, used // 8, used // 2, used * 4, sum(map(_numel, shapes)) // 2):
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = lm.AdamW(params, lr=1e-4)
        name = f"{size:,} elements" if size != used else f"{size:,} elements (used)"
        found["halves of all" if size > 10 * used else name] = _in_chunks(optimizer, size, used)
    return found


def threads() -> dict[str, Callable[[], object]]:
    """One optimizer on both kinds of threads."""
    params = [nn.Parameter(torch.randn(shape)) for shape in minilm().values()]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = lm.AdamW(params, lr=1e-4)
    busy = torch.ones(4_000_000)

    def on_torchs() -> None:
        busy.add_(1.0)
        optimizer.step()

    def on_pythons() -> None:
        with mock.patch("lamina.compiled.workers.torch_team", return_value=None):
            on_torchs()

    if torch_team() is None:
        return {"Python's (torch's cannot be reached)": on_torchs}
    return {"torch's (used)": on_torchs, "Python's": on_pythons}


def _in_chunks(optimizer: lm.AdamW, size: int, used: int) -> Callable[[], object]:
    chunks.CHUNK = size
    try:
        for _ in range(3):  # the table is made again after the first, which allocates the state
            optimizer.step()
    finally:
        chunks.CHUNK = used
    return optimizer.step


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


if __name__ == "__main__":
    main()

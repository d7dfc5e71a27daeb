"""How long previews take, and how many lines they have: `python -m benchmarks.preview`.

Long runs of many groups, a Llama of 70 billion parameters on the meta device, and a model of
10,000 tensors in 1,000 groups. Each time is the median of several: seconds of the processor, which
other work on the machine does not change much, and seconds of the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import lamina as lm
from benchmarks.starter_plans import transformers_model

REPEATS = 5
LLAMA_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
SCHEDULE = lm.warmup("10%") >> lm.cosine(to=0.01)


class Layers(nn.Module):
    """Layers of some small tensors each, on the meta device."""

    def __init__(self, layers: int, tensors: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList()
        for _ in range(layers):
            layer = nn.Module()
            for place in range(tensors):
                weight = nn.Parameter(torch.empty(2, 2, device="meta"))
                layer.register_parameter(f"w{place}", weight)
            self.layer.append(layer)


def by_layer(match: str = "layer.{depth}.*", rate: float = 0.99) -> lm.Plan:
    """A plan with a group for each layer."""
    return lm.Plan(
        "AdamW", lr=1e-3, schedule=SCHEDULE, rules=[lm.Rule(match, lr=lm.by_depth(rate))]
    )


def report(name: str, action: Callable[[], Any], told: Callable[[Any], str]) -> None:
    """Print how long an action takes, and something of what it returns."""
    processor, clock, result = [], [], None
    for _ in range(REPEATS):
        began = time.process_time(), time.perf_counter()
        result = action()
        processor.append(time.process_time() - began[0])
        clock.append(time.perf_counter() - began[1])
    times = [f"{statistics.median(each):7.2f} s" for each in (processor, clock)]
    print(f"{name:<66}{''.join(times)}  {told(result)}")


def lines(text: str) -> str:
    return f"{len(text.splitlines())} lines"


def main() -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), median of {REPEATS}\n")
    print(f"{'':<66}processor    clock")
    long, plan = Layers(100, 1), by_layer()
    steps = 1_000_000
    report(
        "preview and table of 1,000,000 steps x 100 groups",
        lambda: str(plan.preview(long, steps=steps)),
        lines,
    )
    report("its hash", lambda: plan.preview(long, steps=steps).hash, lambda text: text[:12])
    llama = transformers_model("llama", "LlamaForCausalLM", **LLAMA_70B)
    numbers = sum(parameter.numel() for parameter in llama.parameters())
    on_layers = by_layer("model.layers.{depth}.*")
    report(
        f"preview and table of a Llama with {numbers:,} parameters",
        lambda: str(on_layers.preview(llama, steps=10_000)),
        lines,
    )
    report("its starter plan", lambda: str(lm.starter_plan(llama)), lines)
    report(
        "the difference of two plans on it",
        lambda: str(lm.diff(on_layers, by_layer("model.layers.{depth}.*", 0.9), llama, steps=1000)),
        lines,
    )
    many, finer = Layers(1000, 10), by_layer(rate=0.999)
    report(
        "preview and table of 10,000 tensors in 1,000 groups",
        lambda: str(finer.preview(many, steps=1000)),
        lines,
    )
    report(
        "the difference of two plans on them",
        lambda: str(lm.diff(finer, by_layer(rate=0.998), many, steps=1000)),
        lines,
    )
    print("\n" + finer.preview(many, steps=1000).text(width=100))


if __name__ == "__main__":
    main()

"""16-bit weights: what share of them moves, what a task learns, and what each rounding costs.

`python -m benchmarks.low_precision` prints three tables. The task takes most of the time:
`--seeds`, `--epochs`, `--ways` and `--skip-task` shorten it. A CPU without instructions for
bfloat16 takes many times as long in it as in float32; `--compute float32` then keeps weights, their
gradients and state in bfloat16, and computes the model itself in float32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

import lamina as lm
from lamina import kernels

from .measure import interleave
from .shapes import minilm

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tasks"))
import reviews

SHARE_LR = 1e-5


class Way(NamedTuple):
    """A dtype of the weights, and the settings of a plan that go with it."""

    name: str
    dtype: torch.dtype
    settings: dict[str, Any]


WAYS = (
    Way("float32", torch.float32, {}),
    Way("float32, state bfloat16", torch.float32, {"state_dtype": "bfloat16"}),
    Way("bfloat16, nearest", torch.bfloat16, {}),
    Way("bfloat16, stochastic", torch.bfloat16, {"rounding": "stochastic"}),
    Way("bfloat16, kahan", torch.bfloat16, {"rounding": "kahan"}),
    Way(
        "bfloat16, kahan, state float32",
        torch.bfloat16,
        {"rounding": "kahan", "state_dtype": "float32"},
    ),
    Way("bfloat16, master", torch.bfloat16, {"rounding": "master"}),
    Way(
        "bfloat16, master, state bfloat16",
        torch.bfloat16,
        {"rounding": "master", "state_dtype": "bfloat16"},
    ),
)


# --- the share of weights that move ------------------------------------------------------------


def share_table(steps: int = 20) -> None:
    """Print how many weights of 0.05 typical size move at lr 1e-5, and how far on average."""
    print(f"\nshare of 2^20 normal weights (std 0.05) at lr {SHARE_LR:g}, constant gradients")
    print(f"  {'optimizer':<10} {'weights':<34} {'1 step':>8} {f'{steps} steps':>9} {'way':>7}")
    for name in ("AdamW", "RMSprop", "SGD"):
        ways = [way for way in WAYS if "state" not in way.name]
        distances = {way.name: _moved(name, way, steps) for way in ways}
        whole = distances["float32"][2]
        for way, (first, last, length) in distances.items():
            print(f"  {name:<10} {way:<34} {first:8.1%} {last:9.1%} {length / whole:7.2f}")


def _moved(name: str, way: Way, steps: int) -> tuple[float, float, float]:
    """Return the share that moved in one step and in all, and the mean change downhill."""
    torch.manual_seed(0)
    start = torch.randn(2**20).mul_(0.05).bfloat16()
    param = nn.Parameter(start.to(way.dtype, copy=True))
    param.grad = torch.randn(2**20).sign().to(way.dtype)
    settings = {**way.settings, **({"weight_decay": 0.0} if name == "AdamW" else {})}
    optimizer = getattr(lm.optim, name)([("weight", param)], lr=SHARE_LR, **settings)
    shares = []
    for _ in range(steps):
        optimizer.step()
        shares.append(float((param.float() != start.float()).float().mean()))
    change = (start.float() - param.detach().float()) * param.grad.float()
    return shares[0], shares[-1], float(change.mean())


# --- the task ----------------------------------------------------------------------------------


def task_table(epochs: int, seeds: int, ways: list[Way], wide: bool) -> None:
    """Print what `reviews` comes to in each way: means over seeds, with the extremes."""
    how = "computed in float32" if wide else "computed in the dtype of the weights"
    print(f"\ntask reviews, {how}, {epochs} epochs, {seeds} seeds: mean (lowest to highest)")
    print(f"  {'weights':<34} {'training loss':>26} {'validation loss':>24} {'accuracy':>22}")
    for way in ways:
        rows = [_trained(way, epochs, seed, wide) for seed in range(seeds)]
        cells = [_spread([row[place] for row in rows]) for place in range(3)]
        print(f"  {way.name:<34} {cells[0]:>26} {cells[1]:>24} {cells[2]:>22}", flush=True)


def _trained(way: Way, epochs: int, seed: int, wide: bool) -> tuple[float, float, float]:
    """Return the loss over the last epoch, the validation loss and the accuracy of one run."""
    torch.manual_seed(seed)
    model = reviews.model().to(way.dtype)
    loaders = reviews.data(seed=seed)
    plan = lm.Plan.from_toml(reviews.PLAN.read_text())
    settings = {**dict(plan.settings), **way.settings}
    plan = lm.Plan(plan.optimizer, **settings, rules=plan.rules)
    length = len(loaders["train"])
    optimizer = plan.build(model, epochs=epochs, steps_per_epoch=length)
    computed: Any = _in_float32(model) if wide else model
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        model.train()
        for batch in loaders["train"]:
            loss = reviews.loss(computed, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    model.eval()
    found: dict[str, list[torch.Tensor]] = {"loss": [], "accuracy": []}
    with torch.no_grad():
        for batch in loaders["validation"]:
            for key, values in reviews.metrics(computed, batch).items():
                found[key].append(values.float())
    means = {key: float(torch.cat(values).mean()) for key, values in found.items()}
    return statistics.mean(losses), means["loss"], means["accuracy"]


def _in_float32(model: nn.Module) -> Callable[..., torch.Tensor]:
    """Return the model as a function whose gradients come to the weights of 16 bits."""

    def compute(*inputs: torch.Tensor) -> torch.Tensor:
        weights = {name: param.float() for name, param in model.named_parameters()}
        logits: torch.Tensor = functional_call(model, weights, inputs)
        return logits

    return compute


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


# --- time and memory ---------------------------------------------------------------------------


def cost_table(rounds: int) -> None:
    """Print the time of a step over MiniLM's shapes, and the bytes of weights and state."""
    print("\nAdamW over the tensors of MiniLM: a step, and bytes for each weight")
    print(f"  {'weights':<34} {'ms':>8} {'kernel':>10} {'weights':>9} {'state':>7}")
    for name, optimizer, times in _timed(rounds):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        count = sum(param.numel() for param in params)
        state = sum(
            value.numel() * value.element_size()
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if key != "step"
        )
        [batch] = optimizer._collect(optimizer.param_groups)
        kernel = kernels.choose(batch)[0].name
        print(
            f"  {name:<34} {times:8.1f} {kernel:>10} {params[0].element_size():9} "
            f"{state / count:7.1f}"
        )


def _timed(rounds: int) -> Iterator[tuple[str, Any, float]]:
    """Yield each way with its optimizer over MiniLM's shapes, and the milliseconds of a step."""
    optimizers = {}
    for way in WAYS:
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape).mul_(0.05).to(way.dtype)) for shape in minilm().values()
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        named = [(str(place), param) for place, param in enumerate(params)]
        optimizers[way.name] = lm.optim.AdamW(named, lr=SHARE_LR, **way.settings)
    steps: dict[str, Callable[[], Any]] = {key: each.step for key, each in optimizers.items()}
    times = interleave(steps, lambda: None, rounds)
    for key, optimizer in optimizers.items():
        yield key, optimizer, times[key].median


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=reviews.DEFAULTS["epochs"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--compute", choices=["weights", "float32"], default="weights")
    parser.add_argument(
        "--ways", nargs="+", choices=[way.name for way in WAYS], help="rows of the task"
    )
    parser.add_argument("--skip-tables", action="store_true", help="only the task")
    parser.add_argument("--skip-task", action="store_true", help="only shares, time and memory")
    given = parser.parse_args()
    began = time.perf_counter()
    if not given.skip_tables:
        share_table()
        cost_table(given.rounds)
    if not given.skip_task:
        ways = [way for way in WAYS if given.ways is None or way.name in given.ways]
        task_table(given.epochs, given.seeds, ways, given.compute == "float32")
    print(f"\n{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

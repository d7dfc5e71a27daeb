"""Step, and clip + step, of lamina beside torch: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import lamina as lm

from .candidates import Bench, against_torch, layer_adaptive
from .measure import Timing, interleave
from .shapes import MODELS, numbers
from .thaw import thaw_rows

#: what is timed, and the goal of lamina against torch fused
GOALS = {"step": 1.05, "clip+step": 0.95}


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    plan = lm.Plan(lm.AdamW, lr=1.0)
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "non-finite gradients": f"{plan.nonfinite} (checked: {plan.nonfinite_check})",
    }
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    if arguments.thaw:
        results = thaw_rows(arguments.rounds, arguments.device)
    else:
        results = [*torch_rows(arguments), *adaptive_rows(arguments)]
    if arguments.json:
        text = json.dumps({"about": about, "results": results}, indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {arguments.json}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (default: 25)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "SGD"])
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 101])
    parser.add_argument("--what", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--no-adaptive", action="store_true", help="leave LayerAdaptiveAdam out")
    parser.add_argument("--thaw", action="store_true", help="only a top-down thaw of MiniLM")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--json", type=Path, help="write every round's milliseconds here")
    return parser.parse_args()


def torch_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model in arguments.models:
        for groups in arguments.groups:
            for name in arguments.optimizers:
                for what in arguments.what:
                    bench = Bench(MODELS[model](), groups, arguments.device)
                    candidates = against_torch(bench, name, clip=what == "clip+step")
                    times = interleave(candidates, bench.restore, arguments.rounds)
                    title = f"{model}, {name}, {what}, groups: {bench.groups}"
                    rows.append(show(title, times, "torch fused", GOALS[what]))
    return rows


def adaptive_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model in [] if arguments.no_adaptive else arguments.models:
        for groups in arguments.groups:
            bench = Bench(MODELS[model](), groups, arguments.device)
            times = interleave(layer_adaptive(bench), bench.restore, arguments.rounds)
            title = f"{model}, LayerAdaptiveAdam, step, groups: {bench.groups}"
            rows.append(show(title, times, "naive, .item() per tensor", None))
    return rows


def show(title: str, times: dict[str, Timing], base: str, goal: float | None) -> dict[str, Any]:
    """Print one table and return it for the file."""
    print(f"\n{title}")
    row: dict[str, Any] = {"title": title, "base": base, "goal": goal, "candidates": {}}
    for name, timing in times.items():
        ratio = timing.ratio(times[base])
        spread = sorted(timing.rounds)
        low, high = (spread[len(spread) // 4], spread[-1 - len(spread) // 4])
        verdict = ""
        if goal is not None and name.startswith("lamina"):
            verdict = f"  goal {goal}: {'met' if ratio <= goal else 'missed'}"
        if name.endswith("again"):
            verdict = "  same against same"
        print(
            f"  {name:<26} {timing.median:9.3f} ms  [{low:.3f}, {high:.3f}]  x {ratio:.3f}{verdict}"
        )
        row["candidates"][name] = {
            "median_ms": timing.median,
            "ratio": ratio,
            "rounds_ms": list(timing.rounds),
        }
    return row


if __name__ == "__main__":
    print(f"model sizes: {', '.join(f'{k} {numbers(v()):,}' for k, v in MODELS.items())}")
    main()

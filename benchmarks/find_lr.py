"""The range test on the example tasks: its suggestion beside the lr that was set by hand.

    python -m benchmarks.find_lr [--quick] [--tasks digits reviews] [--seeds 2]

For each task: the suggestion of three repeats (other batches and seeds) and each of them, then the
accuracy on the held-out examples after training by the task's own plan, and after training by the
same plan with every lr times the suggested factor. `--quick` takes two fifths of the steps and
trains for a third of an epoch, which shows that it all works and no more.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import lamina as lm
from lamina.training import fit
from lamina.training.example_tasks import example_tasks
from lamina.training.load import choose_plan, load_task
from lamina.training.range_test import find_lr_of_task
from lamina.training.task import Task

NAMES = ("digits", "reviews")


def accuracies(task: Task, plan: lm.Plan, seeds: int, epochs: float | None) -> list[float]:
    found = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            result = fit(task, plan, seed=seed, epochs=epochs, cpu=True, out=out)
        found.append(result.metrics["accuracy"])
    return found


def scaled(plan: lm.Plan, factor: float) -> lm.Plan:
    last = lm.Rule("*", lr=lm.times(factor))
    return lm.Plan(
        plan.optimizer,
        rules=[*plan.rules, last],
        nonfinite=plan.nonfinite,
        nonfinite_check=plan.nonfinite_check,
        stop=plan.stop,
        **dict(plan.settings),
    )


def shown(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it works")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=int, default=2, help="trainings with each plan")
    given = parser.parse_args()
    steps, epochs, seeds = (40, 1 / 3, 1) if given.quick else (100, None, given.seeds)
    print(
        "| task | plan | highest lr at the held step | each repeat | accuracy (seeds) |", flush=True
    )
    print("|---|---|---|---|---|", flush=True)
    for name in given.tasks:
        task = load_task(name, example_tasks())
        plan, _ = choose_plan(task, None)
        found = find_lr_of_task(task, cpu=True, steps=steps)
        now = found.now[found.reference]
        by_hand = shown(accuracies(task, plan, seeds, epochs))
        print(f"| {name} | set by hand | {now:.2g} | | {by_hand} |", flush=True)
        if found.factor is None or found.suggestion is None:
            print(f"| {name} | no suggestion: {found.reason} | | | |", flush=True)
            continue
        each = ", ".join(f"{curve.read().lr:.2g}" for curve in found.curves)
        suggested = shown(accuracies(task, scaled(plan, found.factor), seeds, epochs))
        row = f"| {name} | every lr times {found.factor:.2g} | {found.suggestion:.2g} | {each} "
        print(f"{row}| {suggested} |", flush=True)


if __name__ == "__main__":
    main()

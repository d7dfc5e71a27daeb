"""What reuse saves, and whether it changes anything: `python -m benchmarks.reuse --help`.

Three parts. `stages`: a step and an epoch of MiniLM and EfficientNet-Lite0 at some stages of a
thaw, with and without reuse. `tunes`: a linear probe, then fine-tuning. `accuracy`: full
fine-tuning of `reviews` beside a staged plan with reuse, both tuned. The first two train twins step
by step in turns, and compare the bits of losses and weights. All is written as JSON, which
`python -m benchmarks.page` makes into a part of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lamina.files.atomic import atomic

from ..machine import about_machine
from . import tables
from .accuracy import (
    LIMIT,
    first_of_each,
    reviews_texts,
    search_and_judge,
    sides,
    small_accuracy_texts,
)
from .timing import stage_rows, tune_rows
from .workloads import Workload, digits, reviews_of_one_length, small_images, small_texts

JSON = Path(__file__).parents[2] / "build" / "reuse.json"
PARTS = ("stages", "tunes", "accuracy")


def main() -> None:
    start = time.monotonic()
    given = parse()
    if given.threads:
        torch.set_num_threads(given.threads)
    results: dict[str, Any] = {
        "about": {
            "torch": torch.__version__,
            **about_machine(),
            "threads": torch.get_num_threads(),
        },
        "targets": [],
        "stages": [],
        "tunes": [],
    }
    if given.goes_on:
        results = json.loads(given.json.read_text(encoding="utf-8"))
    print("\n".join(f"{key}: {value}" for key, value in results["about"].items()), flush=True)
    for text in measured(given, results):
        print(f"\n{text}", flush=True)
        results["targets"] = tables.targets(results)
        save(given.json, results)
    if results["targets"]:
        print(f"\n{tables.target_table(results['targets'])}")
    print(f"\n{time.monotonic() - start:.0f} s; written: {given.json}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, to see that it works")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--epochs", type=int, default=3, help="of each stage (default: 3)")
    parser.add_argument("--seeds", type=int, default=5, help="of the accuracy (default: 5)")
    parser.add_argument(
        "--continue",
        dest="goes_on",
        action="store_true",
        help="keep the other parts of the JSON, and go on with the accuracy where it ended",
    )
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--json", type=Path, default=JSON, help=f"default: build/{JSON.name}")
    given = parser.parse_args()
    if given.epochs < 2 or given.seeds < 1:
        parser.error("expected at least two epochs, as the first one stores, and one seed")
    return given


def workloads(quick: bool) -> list[Workload]:
    return [small_texts(), small_images()] if quick else [reviews_of_one_length(), digits()]


def measured(given: argparse.Namespace, results: dict[str, Any]) -> Iterator[str]:
    """Add each result as soon as it is there, and yield its table."""
    if "stages" in given.parts:
        for workload in workloads(given.quick):
            for stage in workload.stages:
                results["stages"].append(stage_rows(workload, stage, given.epochs))
                yield f"{workload.title}\n{tables.stages(results['stages'][-1:])}"
    if "tunes" in given.parts:
        for workload in workloads(given.quick):
            for stage in workload.tunes:
                epochs = (2, 1) if given.quick else (5, 2)
                results["tunes"].append(tune_rows(workload, stage, *epochs))
                yield f"{workload.title}\n{tables.tunes(results['tunes'][-1:])}"
    if "accuracy" in given.parts:
        yield from accuracy(given, results)


def accuracy(given: argparse.Namespace, results: dict[str, Any]) -> Iterator[str]:
    """Search, then one seed after another."""
    texts = small_accuracy_texts() if given.quick else reviews_texts()
    tried = first_of_each(sides(3)) if given.quick else sides(6)
    earlier = results.get("accuracy")
    for found in search_and_judge(texts, tried, 1 if given.quick else given.seeds, earlier):
        words = "random words" if given.quick else "the texts of `reviews`"
        found["limit"] = None if given.quick else LIMIT
        found["title"] = f"Full fine-tuning and a staged plan with reuse, {words}"
        results["accuracy"] = found
        if found.get("differences"):
            yield f"{tables.judged(found)}\n{tables.verdict(found)}"
        elif len(found["search"]) == len(tried):
            yield tables.search(found)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(f"{json.dumps(results, indent=1)}\n".encode())


if __name__ == "__main__":
    main()

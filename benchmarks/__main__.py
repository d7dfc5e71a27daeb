"""lamina beside torch and other packages, in one run: `python -m benchmarks --help`.

Every candidate of a case takes its turn in every round. Medians, the middle half of the rounds and
all rounds are written as JSON, which `python -m benchmarks.page` makes into a page and a picture.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lamina.files.atomic import atomic

from . import tables
from .cases import CASES, Case
from .compare import Options, compare
from .machine import about_machine
from .probe import probe_all
from .targets import target_rows
from .training import THAWS, thaw_rows, training_rows

JSON = Path(__file__).parents[1] / "build" / "benchmarks.json"
PARTS = ("cases", "first-step", "training", "thaw")
PROBED = (
    "torch default",
    "torch foreach",
    "torch fused",
    "torch compiled",
    "torch-optimi foreach",
    "lamina plan",
    "lamina drop-in",
)
PROBED_QUICKLY = ("torch fused", "lamina plan")
QUICK_THAWS = ("digits",)
#: rounds; a whole training step takes much longer than a step of an optimizer
ROUNDS, QUICK_ROUNDS, TRAINING_ROUNDS, QUICK_TRAINING_ROUNDS = 25, 5, 9, 3


def main() -> None:
    start = time.monotonic()
    given = parse()
    if given.threads:
        torch.set_num_threads(given.threads)
    options = Options(
        rounds=given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS),
        kept=given.kept_gradients,
        device=given.device,
        compiled=not (given.no_compile or given.quick),
    )
    results: dict[str, Any] = {"about": about(options), "targets": []}
    print("\n".join(f"{key}: {value}" for key, value in results["about"].items()), flush=True)
    for part, made in measured(given, options):
        results.setdefault(part, []).append(made)
        print(f"\n{tables.TEXTS[part](made)}", flush=True)
        results["targets"] = target_rows(results.get("cases", []))
        save(given.json, results)
    print(f"\n{tables.targets(results['targets'])}")
    print(f"\n{time.monotonic() - start:.0f} s; written: {given.json}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, no compilation")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their title")
    parser.add_argument("--rounds", type=int, default=0, help=f"timed rounds (default: {ROUNDS})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--kept-gradients",
        action="store_true",
        help="the same gradient tensors at every step, as zero_grad(set_to_none=False) leaves them",
    )
    parser.add_argument("--device", default="cpu", help="for the cases; the rest is on the CPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch (default: its own)")
    parser.add_argument("--json", type=Path, default=JSON, help=f"default: build/{JSON.name}")
    return parser.parse_args()


def about(options: Options) -> dict[str, Any]:
    """The machine, the versions and the options, which the figures hold for."""
    versions = {}
    for package in ("numba", "torch-optimi", "pytorch_optimizer", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "torch": torch.__version__,
        **versions,
        **about_machine(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "gradients": "kept" if options.kept else "new at every step",
    }


def chosen(given: argparse.Namespace) -> list[Case]:
    """The cases that were asked for; `--only` also finds those that are not quick."""
    found = [case for case in CASES if given.only in case.title]
    if not found:
        titles = "\n".join(case.title for case in CASES)
        raise SystemExit(f"No case has {given.only!r} in its title. The cases are:\n{titles}")
    return [case for case in found if case.quick or not given.quick or given.only]


def measured(given: argparse.Namespace, options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table as soon as it is there, with the part it belongs to."""
    if "cases" in given.parts:
        for case in chosen(given):
            yield "cases", compare(case, options)
    if "first-step" in given.parts:
        names = PROBED_QUICKLY if given.quick else PROBED
        if given.no_compile:
            names = tuple(name for name in names if "compiled" not in name)
        yield "first-step", probe_all(names)
    rounds = QUICK_TRAINING_ROUNDS if given.quick else TRAINING_ROUNDS
    for name in THAWS:
        if "training" in given.parts:
            yield "training", training_rows(name, rounds, kept=options.kept)
    for name in QUICK_THAWS if given.quick else THAWS:
        if "thaw" in given.parts:
            yield "thaw", thaw_rows(name, rounds)


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write(f"{json.dumps(results, indent=1)}\n".encode())


if __name__ == "__main__":
    main()

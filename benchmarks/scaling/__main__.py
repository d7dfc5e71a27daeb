"""What a plan costs at scale: the tables of docs/explanation/scaling.md on standard output.

Measured: resolve, preview, build, step and state of models with many tiny tensors, and every
collective of training steps on 2 and 4 gloo processes. Computed: the same for more processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from . import tables
from .collectives import CASES, agrees, computed, count
from .local import PLANS, costs

WRAPPERS = ("DDP", "FSDP2")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 5_000])
    parser.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    cases = [(wrapper, case) for wrapper in WRAPPERS for case in CASES]
    rows, wrong = [], 0
    for ranks in arguments.ranks:
        with tempfile.TemporaryDirectory() as folder:
            counted = count(Path(folder), ranks, cases)[0]
        for (wrapper, case), row in zip(cases, counted, strict=True):
            formula = computed(wrapper, case, ranks)
            rows.append((row, formula))
            wrong += not agrees(row, formula)
    cores = os.cpu_count()
    print(f"torch {torch.__version__}, {cores} cores, one of them used; gloo on this machine")
    for title, lines in {
        **tables.local(costs(arguments.sizes, arguments.plans)),
        **tables.collectives(rows),
        **tables.traffic(),
    }.items():
        print("", f"**{title}**", "", *lines, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

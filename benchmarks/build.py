"""What it costs to make an optimizer and to move its state, by tensors and by rules.

Prints the tables of the section "Build and state" of docs/explanation/scaling.md: processor
seconds, the
memory at the peak, and the powers by which they grow, beside torch's AdamW. Each row is the median
of several processes. `--imports` prints what `import lamina` costs instead.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lamina as lm
from lamina.resolve.resolve import resolve_plan
from lamina.schedules.duration import Run

from .scaling.local import IN_BLOCK, STEPS, exponent, make_model
from .scaling.tables import Tables, table

ROOT = Path(__file__).parents[1]
SIZES = (1_000, 10_000, 50_000)
COUNTS = (1, 10, 100, 1_000)
#: tensors of the model that is given more and more rules
TENSORS = 10_000
KINDS = ("names", "globs", "re:", "types")
#: patterns, tensors and rules of what is measured; "mixed" takes the kinds in turn
Case = tuple[str, int, int]
BY_TENSORS: dict[int, list[Case]] = {
    rules: [("mixed", size, rules) for size in SIZES] for rules in (COUNTS[0], COUNTS[-1])
}
BY_RULES: list[Case] = [("mixed", TENSORS, count) for count in COUNTS]
BY_KIND: list[Case] = [(kind, TENSORS, COUNTS[-1]) for kind in KINDS]
SIZED = [case for cases in BY_TENSORS.values() for case in cases]
CASES = list(dict.fromkeys([*SIZED, *BY_RULES, *BY_KIND]))
#: seconds that one process may take
LIMIT = 1800
TIMES = ("resolve", "preview", "build", "explain", "state_dict", "load", "check")
TORCH = ("torch build", "torch state_dict", "torch load")
#: the operations whose memory is measured too, and the name of its amount
TRACED = ("build", "state_dict", "load", *TORCH)
PEAKS = tuple(f"{name} peak" for name in TRACED)
MIB = 2**20
Costs = dict[str, float]


def pattern(kind: str, place: int, layers: int) -> str:
    """Return a pattern that selects some tensors of one layer: the layers in turn."""
    layer = place % layers
    kind = KINDS[place % len(KINDS)] if kind == "mixed" else kind
    return {
        "names": f"layers.{layer}",
        "globs": f"layers.{layer}.*.weight",
        "re:": rf"re:layers\.{layer}\.(qkv|out)\..*",
        "types": f"type:Linear & layers.{layer}.*",
    }[kind]


def plan_of(kind: str, rules: int, tensors: int) -> lm.Plan:
    """Return a plan with so many rules, each for a part of one layer."""
    layers = max(1, tensors // IN_BLOCK)
    made = [
        lm.Rule(pattern(kind, place, layers), lr=lm.times(1 - place / 1e5))
        for place in range(rules)
    ]
    schedule = lm.warmup("10%") >> lm.cosine(to=0.05)
    return lm.Plan(lm.AdamW, lr=1e-3, schedule=schedule, clip_norm=1.0, rules=made)


def operations(plan: lm.Plan, model: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is measured, in order; each is called before the next is asked for."""
    names = [name for name, _ in model.named_parameters()]
    yield "resolve", lambda: resolve_plan(plan, model, Run(STEPS))
    yield "preview", lambda: str(plan.preview(model, steps=STEPS))
    made: dict[str, Any] = {}
    yield "build", lambda: made.update(it=plan.build(model, steps=STEPS))
    optimizer = made["it"]
    chosen = names[:: max(1, len(names) // 100)]
    yield "explain", lambda: [str(optimizer.explain(name)) for name in chosen]
    yield "state_dict", lambda: made.update(state=optimizer.state_dict())
    yield "load", lambda: optimizer.load_state_dict(made["state"])
    yield "check", lambda: optimizer.check(model)
    keys = ("params", "lr", "weight_decay")
    groups = [{key: group[key] for key in keys} for group in optimizer.param_groups]
    yield "torch build", lambda: made.update(it=torch.optim.AdamW(groups))
    other = made["it"]
    _give_state(other)
    yield "torch state_dict", lambda: made.update(state=other.state_dict())
    yield "torch load", lambda: other.load_state_dict(made["state"])


def _give_state(optimizer: torch.optim.Optimizer) -> None:
    """Take a step, so that torch's optimizer has the state that lamina's has from the build."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()


def measure(kind: str, tensors: int, rules: int, traced: bool) -> Costs:
    """Measure every operation once, in a process of its own.

    Returns:
        Processor seconds; if `traced`, the bytes that Python allocated at the peak of each.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    small = make_model(4 * IN_BLOCK)
    for _, work in operations(plan_of("globs", 1, 4 * IN_BLOCK), small):
        work()  # pays for imports
    plan, model = plan_of(kind, rules, tensors), make_model(tensors)
    found: Costs = {"tensors": sum(1 for _ in model.parameters())}
    for name, work in operations(plan, model):
        if traced:
            if name not in TRACED:
                continue
            tracemalloc.start()
            work()
            found[f"{name} peak"] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        else:
            begin = time.process_time()
            work()
            found[name] = time.process_time() - begin
    found["process"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def median_of(repeats: int, case: Case) -> Costs:
    """Return the medians of several processes; of the sizes also the peaks of one traced."""
    runs = [_process(case, traced=False) for _ in range(repeats)]
    costs = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    peaks = _process(case, traced=True) if case in SIZED else {}
    print(f"measured: {case}", file=sys.stderr, flush=True)
    return {**peaks, **costs}


def _process(case: Case, traced: bool) -> Costs:
    command = [sys.executable, "-m", "benchmarks.build", "--one", *map(str, case)]
    command += ["--traced"] if traced else []
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
    )
    costs: Costs = json.loads(done.stdout.splitlines()[-1])
    return costs


def tables_of(costs: dict[Case, Costs]) -> Tables:
    """Return the tables of what was measured, the costs of all `CASES`."""
    powers = [
        ["mixed", f"{SIZES[0]:,} to {SIZES[-1]:,}", f"{rules:,}", *_powers(SIZES, cases, costs)]
        for rules, cases in BY_TENSORS.items()
    ]
    counts = f"{COUNTS[0]:,} to {COUNTS[-1]:,}"
    powers.append(["mixed", f"{TENSORS:,}", counts, *_powers(COUNTS, BY_RULES, costs)])
    head = ["patterns", "tensors", "rules"]
    shown = ("process", *PEAKS)
    return {
        "Build and state: processor seconds": table(
            [*head, *TIMES, *TORCH],
            [_line(case, costs[case], (*TIMES, *TORCH), 1.0) for case in CASES],
        ),
        "Build and state: the power by which the times grow": table(
            [*head, *TIMES, *TORCH], powers
        ),
        "Build and state: memory at the peak, MiB": table(
            [*head, *(name.removesuffix(" peak") for name in shown)],
            [_line(case, costs[case], shown, MIB) for case in SIZED],
        ),
    }


def _line(case: Case, cost: Costs, names: Sequence[str], unit: float) -> list[str]:
    kind, _, rules = case
    return [
        kind,
        f"{cost['tensors']:,.0f}",
        f"{rules:,}",
        *(f"{cost[name] / unit:.3g}" for name in names),
    ]


def _powers(sizes: Sequence[int], cases: Sequence[Case], costs: dict[Case, Costs]) -> list[str]:
    found = []
    for name in (*TIMES, *TORCH):
        amounts = [costs[case][name] for case in cases]
        found.append(f"{exponent(list(sizes), amounts):.2f}")
    return found


def import_times(repeats: int) -> list[str]:
    """Return a table of the seconds of an import in a new process, and of what lamina adds."""
    rows = []
    for name in ("torch", "lamina"):
        runs = [_import_seconds(name) for _ in range(repeats)]
        own = [sum(own for module, own in run if module.split(".")[0] == name) for run in runs]
        whole = statistics.median(sum(seconds for _, seconds in run) for run in runs)
        rows.append([name, f"{whole:.2f}", f"{statistics.median(own):.2f}"])
    return table(["import", "in all, s", "modules of its own, s"], rows)


def _import_seconds(name: str) -> list[tuple[str, float]]:
    """Return the modules that an import loads, each with its own seconds."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines()]
    rows = [line for line in lines if len(line) == 3 and line[0].strip().isdigit()]
    return [(module.strip(), int(own) / 1e6) for own, _, module in rows]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--imports", action="store_true")
    given = parser.parse_args()
    if given.one:
        kind, tensors, rules = given.one
        print(json.dumps(measure(kind, int(tensors), int(rules), given.traced)))
        return 0
    cores = os.cpu_count()
    print(f"torch {torch.__version__}, {cores} cores; medians of {given.repeats}")
    if given.imports:
        print("", *import_times(given.repeats), sep="\n")
        return 0
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(pool.map(partial(median_of, given.repeats), CASES))
    costs = dict(zip(CASES, found, strict=True))
    for title, lines in tables_of(costs).items():
        print("", f"**{title}**", "", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

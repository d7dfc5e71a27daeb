"""The tables of docs/explanation/scaling.md, as markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .collectives import FLOAT, METRICS, Case, Counted, Traffic, in_report, in_step, on_the_wire
from .local import Cost, exponent

Tables = dict[str, list[str]]
RANKS = (1, 2, 8, 64, 1_000, 10_000)
#: tensors, clip scopes, groups and numbers of the models that are computed
SIZES = ((101, 3, 8, 22_600_000), (1_000, 10, 100, 10**9), (100_000, 1_000, 10_000, 10**12))
#: tensors for which the times are computed from those that were measured
LARGEST = 100_000
TIMES = ("resolve", "preview", "build", "step", "state_dict", "load")
_MICRO = 1e6


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a markdown table; all columns but the first two are numbers."""
    lines = [head, [" --- " if place < 2 else " ---: " for place in range(len(head))], *rows]
    return ["|" + "|".join(f" {str(cell).strip()} " for cell in line) + "|" for line in lines]


def local(costs: Sequence[Cost]) -> Tables:
    """Return what one process pays: for each tensor, and by which power of their number."""
    head = ["groups", "tensors", *(f"{name}, µs" for name in TIMES), "step / torch's", "memory, kB"]
    head += ["file, B", "torch's file, B"]
    rows, powers = [], []
    for plan in dict.fromkeys(cost.plan for cost in costs):
        its = [cost for cost in costs if cost.plan == plan]
        sizes = [cost.tensors for cost in its]
        grown = {name: exponent(sizes, [getattr(cost, name) for cost in its]) for name in TIMES}
        rows += [*map(_measured, its), _computed(its[-1], grown)]
        powers.append(
            [plan, f"{sizes[0]:,} to {sizes[-1]:,}", *(f"{p:.2f}" for p in grown.values())]
        )
    return {
        "Measured in one process: for each tensor": table(head, rows),
        "Measured in one process: the power of the number of tensors": table(
            ["groups", "tensors", *TIMES], powers
        ),
    }


def _measured(cost: Cost) -> list[Any]:
    return [
        cost.plan,
        f"{cost.tensors:,}",
        *(f"{_MICRO * getattr(cost, name) / cost.tensors:.3g}" for name in TIMES),
        f"{cost.step / cost.torch_step:.2f}",
        f"{cost.memory / cost.tensors / 1000:.1f}",
        f"{cost.saved / cost.tensors:.0f}",
        f"{cost.torch_saved / cost.tensors:.0f}",
    ]


def _computed(last: Cost, grown: dict[str, float]) -> list[Any]:
    """Return a row for a size that was not measured: the last one, with the powers found."""
    ratio = LARGEST / last.tensors
    times = (
        _MICRO * getattr(last, name) / last.tensors * ratio ** (power - 1)
        for name, power in grown.items()
    )
    return [last.plan, f"{LARGEST:,} (computed)", *(f"{time:.3g}" for time in times), *[""] * 4]


def _sent(traffic: Traffic | None) -> str:
    return "" if traffic is None else f"{traffic[0]}: {traffic[1]:,} B"


def collectives(rows: Sequence[tuple[Counted, Counted]]) -> Tables:
    """Return what was counted in training steps beside the formulas."""
    head = ["wrapper", "plan", "processes", "forward, backward: counted", "computed"]
    head += ["step: counted", "computed", "report: counted", "computed", "should_stop"]
    lines = [
        [
            counted.wrapper,
            counted.case,
            counted.ranks,
            *(_sent(each.backward) for each in (counted, formula)),
            *(_sent(each.step) for each in (counted, formula)),
            *(_sent(each.report) for each in (counted, formula)),
            _sent(counted.should_stop),
        ]
        for counted, formula in rows
    ]
    return {"Counted and computed: collectives, and their bytes": table(head, lines)}


def traffic() -> Tables:
    """Return by formula what each process sends in a step, for more processes than fit here."""
    head = ["tensors, scopes, groups", "what", "collectives", *(f"n = {n:,}" for n in RANKS)]
    rows: list[list[Any]] = []
    for tensors, scopes, groups, numbers in SIZES:
        name = f"{tensors:,}, {scopes:,}, {groups:,}"
        clipped = in_step("FSDP2", Case({}, scoped=tensors))
        lamb = in_step("FSDP2", Case({}, scoped=tensors, norms=(2 * tensors // groups,) * groups))
        weights = FLOAT * numbers
        sent = {
            "DDP: gradients (the wrapper)": ("", "all_reduce", weights),
            "DDP: step": (0, "all_reduce", 0),
            "FSDP2: gradients summed (the wrapper)": ("", "reduce_scatter", weights),
            "FSDP2: step, clip_norm": (clipped[0], "all_reduce", clipped[1]),
            "FSDP2: step, clip_norm, LAMB": (lamb[0], "all_reduce", lamb[1]),
        }
        rows += [
            [name, what, calls, *(size(on_the_wire(kind, amount, n)) for n in RANKS)]
            for what, (calls, kind, amount) in sent.items()
        ]
    calls, amount = in_report()
    metric = ", ".join(METRICS)
    broadcast = [size(on_the_wire("broadcast", amount, n)) for n in RANKS]
    rows.append(["any", f"report({metric}=...)", calls, *broadcast])
    rows.append(["any", "should_stop", 0, *(size(0) for _ in RANKS)])
    return {"Computed: what each process sends, in a ring": table(head, rows)}


def size(amount: float) -> str:
    """Return bytes as people say them."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount:.0f} B" if amount else "0"


def skeleton(lines: Sequence[str]) -> list[str]:
    """Return a table with every number as `#`: what must be the same in the page."""
    return [re.sub(r"(nan|\d[\d,.]*(e[+-]?\d+)?)", "#", line) for line in lines]

"""The results as text for the terminal, and as tables in Markdown for the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from . import bound

Rows = dict[str, dict[str, Any]]
LAMINA = ("lamina plan", "lamina drop-in")


def again_of(rows: Rows) -> tuple[str, str] | None:
    """The candidate that ran twice, and its second name: how much the machine itself varies."""
    second = next((name for name in rows if name.endswith(" again")), None)
    return None if second is None else (second.removesuffix(" again"), second)


def fastest_other(rows: Rows) -> str | None:
    """The fastest candidate that is not lamina's, with the case's own number of groups."""
    names = [name for name in rows if not _is_aside(name)]
    return min(names, key=lambda name: rows[name]["median_ms"], default=None)


def _is_aside(name: str) -> bool:
    # "..., 1 group" is another case; Adafactor and the bound follow other rules
    return (
        name.startswith(("lamina", "Adafactor", "bandwidth"))
        or name.endswith(" again")
        or "," in name
    )


def ratio(rows: Rows, name: str, base: str) -> float:
    """How long against another: the ratio of the medians."""
    found: float = rows[name]["median_ms"] / rows[base]["median_ms"]
    return found


def case_text(case: dict[str, Any]) -> str:
    rows: Rows = case["rows"]
    base = fastest_other(rows)
    lines = [f"{case['title']}  ({case['tensors']:,} tensors, {case['numbers']:,} numbers)"]
    for name, row in rows.items():
        low, high = row["middle_half_ms"]
        against = f"x {ratio(rows, name, base):.3f}" if base else ""
        note = {base: "fastest other"}.get(name, "")
        if name.endswith(" again"):
            note = "same against same"
        if name in case["differs"]:
            note = f"DIFFERS by {case['differs'][name]:.2g} of the way"
        lines.append(
            f"  {name:<32} {row['median_ms']:10.3f} ms  [{low:.3f}, {high:.3f}]  {against}  {note}"
        )
        if row.get("kernels"):
            lines.append(f"  {'':<32} {row['kernels']}")
    lines += [f"  {name:<32} absent: {reason}" for name, reason in case["absent"].items()]
    return "\n".join(line.rstrip() for line in lines)


def cases(found: Sequence[dict[str, Any]]) -> str:
    """One row for each case: lamina beside the fastest other."""
    head = (
        "case",
        *(f"{name}, ms" for name in LAMINA),
        "fastest other, ms",
        "bound, ms",
        "plan / other",
        "drop-in / other",
        "same / same",
    )
    return markdown(head, [_case_row(case) for case in found])


def _case_row(case: dict[str, Any]) -> list[str]:
    rows: Rows = case["rows"]
    base, again = fastest_other(rows), again_of(rows)
    own = [f"{rows[name]['median_ms']:.3f}" if name in rows else "–" for name in LAMINA]
    other = "–" if base is None else f"{base}: {rows[base]['median_ms']:.3f}"
    against = [
        f"{ratio(rows, name, base):.2f}" if base and name in rows else "–" for name in LAMINA
    ]
    noise = "–" if again is None else f"{ratio(rows, again[1], again[0]):.2f}"
    least = f"{rows[bound.NAME]['median_ms']:.3f}" if bound.NAME in rows else "–"
    return [case["title"], *own, other, least, *against, noise]


def first_step(found: dict[str, Any]) -> str:
    head = (
        "candidate",
        "first step, s",
        "with compiled code, s",
        "memory of the process, MB",
        "operators",
        "tensors",
        "allocated, MB",
        "at one time, MB",
        "Python, kB",
    )
    body = []
    for name, row in found["rows"].items():
        if "failed" in row:
            body.append([name, row["failed"], *[""] * (len(head) - 2)])
            continue
        step, resident = row["step"], row["peak_resident_bytes"]
        body.append(
            [
                name,
                f"{row['cold_ms'] / 1e3:.2f}",
                f"{row['first_ms'] / 1e3:.2f}",
                f"{resident / 1e6:.0f}" if resident else "–",
                f"{step['operators']:,}",
                f"{step['tensors']:,}",
                f"{step['allocated_bytes'] / 1e6:.2f}",
                f"{step['peak_bytes'] / 1e6:.2f}",
                f"{step['python_peak_bytes'] / 1e3:.1f}",
            ]
        )
    return markdown(head, body)


def training(found: dict[str, Any]) -> str:
    head = ("candidate", "step, ms", "middle half, ms", "of it clip and optimizer, ms", "share")
    body = [
        [
            name,
            f"{row['median_ms']:.1f}",
            _span(row),
            f"{row['optimizer_ms']:.2f}",
            f"{100 * row['optimizer_share']:.1f} %",
        ]
        for name, row in found["rows"].items()
    ]
    return markdown(head, body)


def thaw(found: dict[str, Any]) -> str:
    rows: Rows = found["rows"]
    base = next(iter(rows))
    head = ("stage", "step, ms", "middle half, ms", "ratio", "trains", "state, MB", "step, MB")
    body = [
        [
            name,
            f"{row['median_ms']:.1f}",
            _span(row),
            f"{ratio(rows, name, base):.2f}",
            f"{row['trainable']:,}",
            f"{row['state_bytes'] / 1e6:.1f}",
            f"{row['peak_bytes'] / 1e6:.1f}",
        ]
        for name, row in rows.items()
    ]
    return markdown(head, body)


def targets(found: Sequence[dict[str, Any]]) -> str:
    head = ("case", "candidate", "against", "at most", "measured", "verdict")
    body = [
        [
            row["case"],
            row["candidate"],
            row["fastest"] or row["against"],
            f"{row['limit']:.2f}",
            "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
            row["verdict"],
        ]
        for row in found
    ]
    return markdown(head, body)


def _span(row: dict[str, Any]) -> str:
    low, high = row["middle_half_ms"]
    return f"{low:.1f} to {high:.1f}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table whose columns are as wide as in the terminal."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [_line(head, widths), "|" + "|".join("-" * (width + 2) for width in widths) + "|"]
    return "\n".join([*lines, *(_line(row, widths) for row in body)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def _titled(table: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    return lambda found: f"{found['title']}\n{table(found)}"


#: how each part is printed while the command runs
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cases": case_text,
    "first-step": _titled(first_step),
    "training": _titled(training),
    "thaw": _titled(thaw),
}

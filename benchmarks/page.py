"""The figures of docs/benchmarks.md: `python -m benchmarks.page build/benchmarks.json`.

Copies the results to docs/benchmarks/results.json, draws docs/benchmarks/steps.png from them, and
writes their tables between the markers of the page. What `python -m benchmarks.reuse` wrote
(build/reuse.json) goes to docs/benchmarks/reuse.json, with its tables between markers of their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lamina.files.atomic import atomic

from . import tables
from .reuse import tables as reuse_tables

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
REUSE = "<!-- reuse: begin -->", "<!-- reuse: end -->"
NO_REUSE = (
    "There are no figures yet: run `python -m benchmarks.reuse`, then "
    "`python -m benchmarks.page build/reuse.json`."
)
NOT_MEASURED = "There are no figures yet: run `make bench`, then `python -m benchmarks.page`."
COLORS = {"lamina": "#d9661f", "bandwidth": "#3b7d4f", "other": "#8fa3b8"}
#: panels of the picture
MOST = 12


def figures(results: dict[str, Any] | None) -> str:
    """All tables of a run in Markdown."""
    if results is None:
        return NOT_MEASURED
    about = "; ".join(f"{key}: {value}" for key, value in results["about"].items())
    parts = [f"{about}.", "### Targets", tables.targets(results["targets"])]
    if results.get("cases"):
        parts += ["![medians of each candidate](benchmarks/steps.png)"]
        parts += ["### Steps", tables.cases(results["cases"])]
    for part, heading, table in (
        ("first-step", "First step and memory", tables.first_step),
        ("training", "Whole training steps", tables.training),
        ("thaw", "Stages of a thaw", tables.thaw),
    ):
        if results.get(part):
            parts.append(f"### {heading}")
        for found in results.get(part, []):
            parts += [f"{found['title']}:", table(found)]
    return "\n\n".join(parts)


def reuse_figures(results: dict[str, Any] | None) -> str:
    """All tables of a run of `python -m benchmarks.reuse` in Markdown."""
    return NO_REUSE if results is None else reuse_tables.figures(results)


def replaced(page: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """The page with this text between the markers."""
    first, last = markers
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"the page lacks the lines {first} and {last}, between which figures go")
    return f"{before}{first}\n\n{text}\n\n{last}{after}"


def read(path: Path) -> dict[str, Any]:
    """The results of a run; anything else ends the command with a message."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}. Run: make bench") from error
    if not isinstance(results, dict) or not {"about", "targets"} <= results.keys():
        raise SystemExit(f"{path} is not what `make bench` writes: 'about' or 'targets' is missing")
    return results


def write(results: dict[str, Any], docs: Path) -> None:
    """Write results, picture and page; the page last, so that it never shows what is not there."""
    page, folder = docs / "benchmarks.md", docs / "benchmarks"
    text = page.read_text(encoding="utf-8")
    if "stages" in results:
        name, text = "reuse.json", replaced(text, reuse_figures(results), REUSE)
    else:
        name, text = "results.json", replaced(text, figures(results))
    folder.mkdir(exist_ok=True)
    if results.get("cases"):
        draw(results["cases"], folder / "steps.png")
    _save(folder / name, json.dumps(results, indent=1) + "\n")
    _save(page, text)


def _save(path: Path, text: str) -> None:
    with atomic(path) as file:
        file.write(text.encode())


def draw(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each case that has a target, else for the first ones; bars are medians."""
    from matplotlib.figure import Figure

    from .paths import save
    from .targets import TARGETS

    wanted = {target.case.title for target in TARGETS}
    shown = ([case for case in cases if case["title"] in wanted] or list(cases))[:MOST]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(10, 2.5 * rows), dpi=90, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).ravel()
    for place, case in zip(axes, shown, strict=False):
        _panel(place, case)
    for place in axes[len(shown) :]:
        place.set_axis_off()
    save(figure, path)


def _panel(axes: Any, case: dict[str, Any]) -> None:
    rows = {name: row for name, row in case["rows"].items() if not name.endswith(" again")}
    names = sorted(rows, key=lambda name: -rows[name]["median_ms"])
    medians = [rows[name]["median_ms"] for name in names]
    halves = [rows[name]["middle_half_ms"] for name in names]
    errors = [
        [max(0.0, median - low) for median, (low, _) in zip(medians, halves, strict=True)],
        [max(0.0, high - median) for median, (_, high) in zip(medians, halves, strict=True)],
    ]
    colors = [COLORS.get(name.split()[0], COLORS["other"]) for name in names]
    axes.barh(names, medians, xerr=errors, color=colors, ecolor="#444444", height=0.7)
    axes.set_title(case["title"], fontsize=9)
    axes.set_xlabel("ms", fontsize=8)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("results", type=Path, help="what a benchmark wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of benchmarks.md")
    given = parser.parse_args()
    write(read(given.results), given.docs)
    print(f"written: {given.docs / 'benchmarks.md'} and {given.docs / 'benchmarks'}")


if __name__ == "__main__":
    main()

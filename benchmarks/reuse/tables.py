"""The results as tables in Markdown, for the terminal and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..tables import markdown

MEGABYTE = 10**6


def stages(found: Sequence[dict[str, Any]]) -> str:
    """One row for each stage and way to store."""
    head = (
        "trains",
        "",
        "step of the first epoch, ms",
        "step, ms",
        "middle half, ms",
        "epochs, s",
        "ratio",
        "predicted",
        "stored, MB",
        "predicted, MB",
        "same bits",
    )
    return markdown(head, [_stage_row(each, name) for each in found for name in each["rows"]])


def _stage_row(found: dict[str, Any], name: str) -> list[str]:
    row = found["rows"][name]
    low, high = row["middle_half_ms"]
    plain = "stored_bytes" not in row
    return [
        found["stage"],
        name,
        f"{row['first_epoch_step_ms']:.1f}",
        f"{row['median_ms']:.1f}",
        f"{low:.1f} to {high:.1f}",
        " / ".join(f"{value / 1e3:.2f}" for value in row["epochs_ms"]),
        f"{row['ratio']:.3f}",
        "" if plain else f"{1 - found['estimated_saved']:.3f}",
        "" if plain else f"{row.get('disk_bytes', row['stored_bytes']) / MEGABYTE:.1f}",
        "" if plain else f"{found['estimated_bytes'] / MEGABYTE:.1f}",
        "" if plain else _yes(row["same_bits"]),
    ]


def tunes(found: Sequence[dict[str, Any]]) -> str:
    """One row for each run of a linear probe and fine-tuning."""
    head = (
        "epochs",
        "then trains",
        "without, s",
        "with, s",
        "ratio",
        "stored, MB",
        "predicted, MB",
        "same bits",
    )
    body = []
    for each in found:
        without, reused = each["seconds"].values()
        body.append(
            [
                " + ".join(map(str, each["epochs"])),
                each["then"],
                f"{without:.1f}",
                f"{reused:.1f}",
                f"{each['ratio']:.2f}",
                f"{each['stored_bytes'] / MEGABYTE:.1f}",
                f"{each['estimated_bytes'] / MEGABYTE:.1f}",
                _yes(each["same_bits"]),
            ]
        )
    return markdown(head, body)


def search(found: dict[str, Any]) -> str:
    """The settings that were tried, with what they came to on the texts of the search."""
    body = [
        [name, run["label"], f"{run['accuracy']:.4f}", f"{run['seconds']:.1f}"]
        for name, runs in found["search"].items()
        for run in runs
    ]
    return markdown(("side", "setting", "accuracy in the search", "training, s"), body)


def judged(found: dict[str, Any]) -> str:
    """Both sides with their seeds."""
    head = ("side", "setting", "epochs", "accuracy", "spread", "lowest to highest", "training, s")
    body = []
    for name, side in found["sides"].items():
        values = [run["accuracy"] for run in side["runs"]]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "–"
        seconds = statistics.median(run["seconds"] for run in side["runs"])
        body.append(
            [
                name,
                side["chosen"],
                str(side["epochs"]),
                f"{statistics.mean(values):.4f}",
                spread,
                f"{min(values):.4f} to {max(values):.4f}",
                f"{seconds:.1f}",
            ]
        )
    return markdown(head, body)


def verdict(found: dict[str, Any]) -> str:
    """The difference in accuracy beside its standard error, and the ratio of the times."""
    values = found["differences"]
    text = f"Accuracy of the staged plan minus full fine-tuning, over {len(values)} seeds: "
    text += f"{statistics.mean(values):+.4f}"
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
        text += f" (standard error {error:.4f})"
    return (
        f"{text}. Time of the training: {found['time_ratio']:.2f} of that of full fine-tuning; "
        f"processor time: {found['processor_ratio']:.2f}."
    )


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target with what was measured."""
    rows = []
    for each in results["stages"]:
        if each["limit"] is not None:
            case = f"{each['workload']}, {each['stage']}: time of a step"
            rows.append(_target(case, each["limit"], each["rows"]["reuse"]["ratio"]))
    for each in results["tunes"]:
        if each["limit"] is not None:
            epochs = " + ".join(map(str, each["epochs"]))
            case = f"{each['workload']}, {epochs} epochs, then {each['then']}: time of the run"
            rows.append(_target(case, each["limit"], each["ratio"]))
    found = results.get("accuracy")
    if found and found["limit"] is not None and "time_ratio" in found:
        case = "reviews, staged with reuse: time of the training"
        rows.append(_target(case, found["limit"], found["time_ratio"]))
    return rows


def _target(case: str, limit: float, ratio: float) -> dict[str, Any]:
    verdict = "met" if ratio <= limit else "missed"
    return {"case": case, "limit": limit, "ratio": ratio, "verdict": verdict}


def target_table(rows: Sequence[dict[str, Any]]) -> str:
    """The targets as a table."""
    body = [
        [row["case"], f"{row['limit']:.2f}", f"{row['ratio']:.3f}", row["verdict"]] for row in rows
    ]
    return markdown(("case", "at most", "measured", "verdict"), body)


def figures(results: dict[str, Any]) -> str:
    """All tables of a run in Markdown."""
    about = "; ".join(f"{key}: {value}" for key, value in results["about"].items())
    parts = [f"{about}."]
    if results["targets"]:
        parts.append(target_table(results["targets"]))
    for part, table in (("stages", stages), ("tunes", tunes)):
        for title in dict.fromkeys(each["title"] for each in results[part]):
            chosen = [each for each in results[part] if each["title"] == title]
            parts += [f"{title}:", table(chosen)]
    found = results.get("accuracy")
    if found and found.get("differences"):
        parts += [f"{found['title']}:", search(found), judged(found), verdict(found)]
    return "\n\n".join(parts)


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"

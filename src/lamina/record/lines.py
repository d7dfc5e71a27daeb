"""A record as JSON lines: one line for each curve, event and finding; the lines of a run too."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError, shortened
from ..files.atomic import atomic, wrap_read_errors
from ..model.finding import Finding

FORMAT = 1
_LAST_STEP = 2**53
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
#: what a line that is no record's may raise when it is read as one
_WRONG = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


def plain_number(value: float) -> float | str:
    """Return a number as JSON can hold it: NaN and infinity as text."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "nan"
    return "inf" if value > 0 else "-inf"


def number_of(value: Any) -> float:
    """Return the number that `plain_number` wrote; null is NaN."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        return _SPECIAL[value]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


# --- writing -----------------------------------------------------------------------------------


def save(record: Any, path: Path) -> None:
    """Write a record; see `Record.save`."""
    with atomic(path) as file:
        for line in _lines_of(record):
            text = json.dumps(line, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
            # A name with half of a surrogate pair is no text that UTF-8 can hold.
            file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def _lines_of(record: Any) -> Iterator[dict[str, Any]]:
    yield {"kind": "record", "format": FORMAT, "groups": list(record.groups)}
    for group, name, steps, values in record.curves():
        yield {
            "kind": "series",
            "group": group,
            "name": name,
            "steps": steps.tolist(),
            "values": [plain_number(value) for value in values.tolist()],
        }
    for event in record.events:
        fields = {"step": event.step, "event": event.kind, "text": event.text}
        yield {"kind": "event", **fields, "groups": list(event.groups)}
    for finding in record.findings:
        fields = {"code": finding.code, "message": finding.message, "fix": finding.fix}
        yield {"kind": "finding", **fields}


# --- reading -----------------------------------------------------------------------------------


def read(record: Any, path: Path) -> None:
    """Read a file into an empty record; see `Record.load`."""
    understood, cut_off = False, b""
    with wrap_read_errors(path), path.open("rb") as file:
        for raw in file:
            if not raw.strip():
                continue
            try:
                row = json.loads(raw)
                _READERS[row["kind"]](record, row)
                understood = True
            except _WRONG:
                if raw.endswith(b"\n"):
                    record.damaged_lines += 1
                else:  # a kill has cut it off, or it is being written
                    cut_off = raw
    foreign = cut_off and not cut_off.lstrip().startswith(b"{")
    if not understood and (record.damaged_lines or foreign):
        raise StateError(
            f"{path}: no line of this file is one of a record. Give the folder of a run, its "
            "metrics.jsonl, or a file that Record.save wrote."
        )


def _step_of(row: Mapping[str, Any]) -> int:
    step = row["step"]
    if type(step) is not int or not 0 <= step < _LAST_STEP:
        raise ValueError(f"{shortened(repr(step))} is no step")
    return step


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{shortened(repr(value))} is no text")
    return value


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    return {_text(name): number_of(value) for name, value in values.items()}


def _read_header(record: Any, row: Mapping[str, Any]) -> None:
    for group in row["groups"]:
        record.add(0, _text(group))


def _read_series(record: Any, row: Mapping[str, Any]) -> None:
    steps = [_step_of({"step": step}) for step in row["steps"]]
    values = [number_of(value) for value in row["values"]]
    if len(steps) != len(values):
        raise ValueError("a value is missing")
    record.put(_text(row["group"]), _text(row["name"]), steps, values)


def _read_event(record: Any, row: Mapping[str, Any]) -> None:
    groups = tuple(map(_text, row.get("groups", ())))
    record.event(_step_of(row), _text(row["event"]), _text(row["text"]), groups)


def _read_finding(record: Any, row: Mapping[str, Any]) -> None:
    record.finding(Finding(_text(row["code"]), _text(row["message"]), _text(row["fix"])))


def _read_step(record: Any, row: Mapping[str, Any]) -> None:
    """Read one step of a run; its lr stand apart from what was measured of some steps only."""
    step = _step_of(row)
    by_group = {_text(group): {"lr": number_of(lr)} for group, lr in row.get("lr", {}).items()}
    for group, values in row.get("groups", {}).items():
        by_group.setdefault(_text(group), {}).update(_numbers(values))
    run = _numbers(row.get("metrics", {}))
    if "loss" in row:
        run["loss"] = number_of(row["loss"])
    for scope, norm in row.get("norms", {}).items():
        run[f"norm/{_text(scope)}"] = number_of(norm)
    for group, values in by_group.items():
        if values.get("weight_norm") and "update_norm" in values:
            values["ratio"] = values["update_norm"] / values["weight_norm"]
        record.add(step, group, **values)
    record.metrics(step, **run)


def _read_validation(record: Any, row: Mapping[str, Any]) -> None:
    averages = _numbers(row["averages"])
    record.metrics(_step_of(row), **{f"val_{name}": value for name, value in averages.items()})


_READERS: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "record": _read_header,
    "series": _read_series,
    "event": _read_event,
    "finding": _read_finding,
    "step": _read_step,
    "validation": _read_validation,
}

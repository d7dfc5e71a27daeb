"""What a saved file holds, in words, without the model or the task that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import StateError, printable, shortened
from ..files.atomic import wrap_read_errors
from ..state.schema import short
from . import FOLDER, is_whole, load_safely, newest, read

_LARGEST = 5
#: what the checkpoint of a run has
_RUN = {"format", "task", "clock", "model", "optimizer"}
_OF_A_RUN = ("format", "task", "processes", "clock", "steps", "epoch", "batches", "seconds")
_CHECKED = {True: "OK", False: "WRONG: the file is damaged", None: "not in the file name"}


def inspect(path: Path) -> str:
    """Describe a checkpoint, the newest good one of a run, or another file of tensors.

    Args:
        path: a file, or the folder of a run or of checkpoints.

    Raises:
        StateError: if it cannot be read, or holds more than state.
    """
    path, content, whole, damaged = _opened(path)
    lines = [f"{name}: checksum {_CHECKED[False]}" for name in damaged]
    lines.append(str(path))
    lines.append(f"checksum {_CHECKED[whole]}")
    try:
        return "\n".join(map(printable, [*lines, *_described(content)]))
    except Exception as error:  # whatever is in a file that something else wrote
        raise _strange(path, error) from error


def inspect_values(path: Path) -> dict[str, Any]:
    """Return what `inspect` describes as plain values, for JSON.

    Args:
        path: a file, or the folder of a run or of checkpoints.

    Returns:
        `path`, `checksum` ("right", "wrong" or "none"), `damaged` (names of newer checkpoints that
        are), `kind` ("run", "optimizer", "model" or "other"), `tensors` with name, dtype and shape,
        and `groups` of the optimizer; of a run also `run`, what it is and how far.

    Raises:
        StateError: if it cannot be read, or holds more than state.
    """
    path, content, whole, damaged = _opened(path)
    checksum = {True: "right", False: "wrong", None: "none"}[whole]
    values = {"path": str(path), "checksum": checksum, "damaged": damaged}
    try:
        return {**values, **_values(content)}
    except Exception as error:  # whatever is in a file that something else wrote
        raise _strange(path, error) from error


def _opened(path: Path) -> tuple[Path, Any, bool | None, list[str]]:
    """Return the file that a path means, its content, whether it is whole, and damaged ones."""
    with wrap_read_errors(path):
        is_folder, is_there = path.is_dir(), path.exists()
    if is_folder:
        inner = path / FOLDER
        found = newest(inner if inner.is_dir() else path)
        return found.path, found.content, True, [each.name for each in found.damaged]
    if not is_there:
        raise StateError(f"{path}: there is no such file; check the path.")
    whole = is_whole(path)
    return path, load_safely(path) if whole is None else read(path), whole, []


def _strange(path: Path, error: Exception) -> StateError:
    return StateError(
        f"{path}: the file looks like a checkpoint, but its parts are not what they should be "
        f"({type(error).__name__}: {shortened(str(error))}); it was changed by hand, or "
        "written by something else."
    )


def _values(content: Any) -> dict[str, Any]:
    """Return kind, tensors and groups of what a file holds."""
    kind, groups, more = "other", [], {}
    parts = content if isinstance(content, Mapping) else {"": content}
    if isinstance(content, Mapping):
        if set(content) >= _RUN:
            kind, groups = "run", content["optimizer"]["param_groups"]
            parts = {key: content[key] for key in ("model", "optimizer")}
            known = (*_OF_A_RUN, "settings", "versions", "validation", "best", "plan")
            more = {"run": {key: _plain(content[key]) for key in known}}
        elif {"state", "param_groups"} <= set(content):
            kind, groups, parts = "optimizer", content["param_groups"], {"state": content["state"]}
        elif content and all(isinstance(value, torch.Tensor) for value in content.values()):
            kind = "model"
    found = [each for name, part in parts.items() for each in _walk(part, str(name))]
    tensors = [
        {"name": name, "dtype": str(each.dtype).removeprefix("torch."), "shape": _sizes(each)}
        for name, each in found
    ]
    rows = [
        {
            "name": str(group.get("name", f"group {index}")),
            "optimizer": _plain(group.get("optimizer")),
            "parameters": len(group["params"]),
            "lr": _plain(group.get("lr")),
        }
        for index, group in enumerate(groups)
    ]
    return {"kind": kind, **more, "tensors": tensors, "groups": rows}


def _sizes(tensor: torch.Tensor) -> list[int] | None:
    return None if tensor.is_nested else list(tensor.shape)


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: of a tensor with one number that, of others the kind."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    return _kind(value)


def _described(content: Any) -> list[str]:
    if not isinstance(content, Mapping):
        return [f"not a state: the file holds {_kind(content)}", *_tensors({"": content})]
    if set(content) >= _RUN:
        return _run(content)
    if {"state", "param_groups"} <= set(content):
        tensors = _tensors({"state": content["state"]})
        return ["the state of an optimizer", *tensors, *_groups(content)]
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return ["the state of a model, without an optimizer", *_tensors({"model": content})]
    keys = ", ".join(map(str, list(content)[:10])) or "nothing"
    lines = [f"a torch file that holds: {keys}", *_tensors(content)]
    for value in content.values():
        if isinstance(value, Mapping) and {"state", "param_groups"} <= set(value):
            lines += _groups(value)
    return lines


def _run(content: Mapping[str, Any]) -> list[str]:
    settings = content["settings"]
    where = f"epoch {content['epoch'] + 1}, batch {content['batches']}"
    lines = [
        f"checkpoint of a run of task {content['task']!r} (format {content['format']}, "
        f"{content['processes']} process{'es' if content['processes'] != 1 else ''})",
        f"step {content['clock']} of {content['steps']} · {where}"
        f"{', validated' if content['validated'] else ''} · {content['seconds']:.1f} s of training",
    ]
    if content["validation"] is not None:
        last = content["validation"]
        figures = ", ".join(f"{name} {value:.4g}" for name, value in last["averages"].items())
        lines.append(f"last validation, at step {last['step']}: {figures}")
    if content["best"] is not None:
        best = content["best"]
        lines.append(f"best {best['metric']} so far: {best['value']:.4g} at step {best['step']}")
    lines.append("settings: " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    lines.append(
        "written by: " + ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    )
    parts = {key: content[key] for key in ("model", "optimizer", "random")}
    lines += [*_tensors(parts), *_groups(content["optimizer"]), "plan:"]
    return lines + [f"  {line}" for line in content["plan"].splitlines()]


def _tensors(parts: Mapping[str, Any]) -> list[str]:
    """Count, elements and bytes of each part, and the largest tensors but those of randomness."""
    everything: list[tuple[str, torch.Tensor]] = []
    lines = ["tensors:"]
    for name, part in parts.items():
        found = list(_walk(part, str(name)))
        everything += found if name != "random" else []
        elements = sum(tensor.numel() for _, tensor in found)
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in found)
        lines.append(f"  {name or 'all'}: {len(found)}, {elements:,} elements, {size:,} bytes")
    largest = sorted(everything, key=lambda item: -item[1].numel())[:_LARGEST]
    for place, tensor in largest:
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"    {place} {dtype} {_shape(tensor)}")
    return lines if everything else ["no tensors"]


def _walk(value: Any, place: str, within: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Return the tensors in nested values; what lies in itself is passed over."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif id(value) not in within:
        inside = (*within, id(value))
        if isinstance(value, Mapping):
            for key, item in value.items():
                yield from _walk(item, f"{place}.{key}" if place else str(key), inside)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                yield from _walk(item, f"{place}[{index}]", inside)


def _shape(tensor: torch.Tensor) -> str:
    if tensor.is_nested:  # which has no single one
        return f"nested, of {tensor.size(0)} tensors"
    return str(tuple(tensor.shape))


def _groups(state: Mapping[str, Any]) -> list[str]:
    """Return the groups of an optimizer, with lr and whether they train."""
    lines = ["groups of the optimizer:"]
    for index, group in enumerate(state["param_groups"]):
        count = len(group["params"])
        name = group.get("name", f"group {index}")
        kind = f" · {group['optimizer']}" if "optimizer" in group else ""
        lr = group.get("lr")
        shown = _figure(lr) if lr is not None else "none"
        rounding = group.get("rounding")
        rounded = f" · rounding {short(rounding)}" if rounding is not None else ""
        lines.append(
            f"  {name}{kind} · {count} parameter{'s' if count != 1 else ''} · "
            f"lr {shown}{rounded}{_rest(state, group)}"
        )
    return lines


def _rest(state: Mapping[str, Any], group: Mapping[str, Any]) -> str:
    """Return what an lr of 0 means, as far as the state tells."""
    if _figure(group.get("lr")) != "0" or "clock" not in group:
        return ""
    steps = [state["state"].get(index, {}).get("step", 0) for index in group["params"]]
    if group["clock"] == 0:
        return " (frozen, or its schedule begins at 0)"
    never = all(_figure(step) == "0" for step in steps)
    return " (frozen)" if never else " (frozen again, or its schedule is at 0)"


def _figure(value: Any) -> str:
    """Return a number in four digits; of anything else what it is."""
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return short(value)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {_shape(value)}"
    return f"a {type(value).__name__}"

"""One parameter's saved entry, made to fit the parameter and the optimizer that it has now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from ..algorithms.base import ROUNDING_ENTRIES, Algorithm, state_dtype_of
from ..algorithms.registry import OPTIMIZERS, algorithm_of, method_of, optimizer_name
from ..algorithms.rounding import entry_dtype, needed_entry
from ..algorithms.trial import trial_of
from ..errors import StateError
from ..guests.packing import unpack
from ..kernels.base import short as dtype_name
from ..model.parameters import ParamInfo
from ..optim.updates import initial_state
from ..resolve.resolved import Cell
from .schema import MOMENTUM, Entry, number_of_steps

_EMPTY = torch.empty(0)
_REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX = (torch.complex64, torch.complex128, torch.complex32)
#: entries of L-BFGS that are as long as all its parameters together
_FLAT = ("d", "prev_flat_grad", "old_dirs", "old_stps")


def belongs(entry: Entry, cell: Cell) -> bool:
    """Return whether a saved entry is of the optimizer that a cell has now.

    A state of torch's does not say whose it is: then the entries and the hyperparameters tell.
    """
    saved = entry.group.get("optimizer")
    if isinstance(saved, str):
        if saved == optimizer_name(cell.optimizer):
            return True
        before = algorithm_of(OPTIMIZERS[saved]) if saved in OPTIMIZERS else None
        return before is not None and _family(before) is _family(cell.algorithm)
    if cell.algorithm is not None:
        keys = {key for key, value in (entry.values or {}).items() if value is not None}
        known = {*cell.algorithm.tensors, "step"}
        numbers = cell.algorithm.defaults.keys() - cell.algorithm.options
        return keys <= known and numbers <= entry.group.keys()
    method = method_of(cell.optimizer)
    if method is None:  # what its constructor puts into the groups, where that is known
        made = trial_of(cell.optimizer).made or {"lr": None}
        return cell.constants.keys() & made.keys() <= entry.group.keys()
    return method.defaults.keys() <= entry.group.keys()


def has_state(entry: Entry) -> bool:
    """Return whether an entry holds more than the count of no update."""
    values = {key: value for key, value in (entry.values or {}).items() if value is not None}
    step = values.pop("step", 0)
    return bool(values) or number_of_steps("a parameter", step) > 0


def keeps_nothing(entry: Entry, cell: Cell) -> bool:
    """Return whether an entry is of an optimizer of torch's that had nothing to keep: plain SGD.

    lamina has the count of updates then, which was lost where it is not.
    """
    algorithm = cell.algorithm
    if algorithm is None or "clock" in entry.group or entry.group.get("momentum") != 0:
        return False
    kept = algorithm.init(_EMPTY, {**algorithm.defaults, "momentum": 0.0})
    return not kept and belongs(entry, cell)


def _family(algorithm: Algorithm | None) -> type | None:
    """Return the rule that an algorithm is a form of: Adam and AdamW share theirs."""
    bases = [] if algorithm is None else type(algorithm).__mro__
    rules = [base for base in bases if issubclass(base, Algorithm) and base is not Algorithm]
    return rules[-1] if rules else None


def converted(name: str, entry: Entry, fitted: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name and dtypes, the saved one first, of a parameter whose state changed its dtype."""
    for key, value in (entry.values or {}).items():
        now = fitted.get(key)
        if key == "step" or not isinstance(value, torch.Tensor) or now is None:
            continue
        if value.dtype is not now.dtype:
            return [(name, dtype_name(value.dtype), dtype_name(now.dtype))]
    return []


def another_rounding(
    name: str, entry: Entry, param: torch.Tensor, cell: Cell
) -> list[tuple[str, str, str]]:
    """Return the name, the saved and the present entry of a rounding, where these differ."""
    values = {key: value for key, value in (entry.values or {}).items() if value is not None}
    saved = next((key for key in ROUNDING_ENTRIES if key in values), "")
    now = needed_entry(param, cell.constants) or ""
    updated = number_of_steps(name, values.get("step", 0)) > 0
    return [(name, saved, now)] if updated and saved != now else []


def check_shape(info: ParamInfo, what: str, shape: Sequence[int]) -> None:
    """Raise `StateError`, with the way around it, unless a shape is the parameter's."""
    if tuple(shape) != info.shape:
        raise StateError(
            f"the saved {what} of {info.name!r} has shape {tuple(shape)}, but the parameter has "
            f"{info.shape}; nothing was loaded. To begin its state anew, load with "
            f"renamed={{{info.name!r}: None}}; if it had another name, with "
            f"renamed={{old name: {info.name!r}}}."
        )


def _check_numbers(info: ParamInfo, key: str, value: Any, param: torch.Tensor) -> None:
    """Raise `StateError` unless a value is a dense tensor of numbers such as the parameter has."""
    known = _COMPLEX if param.is_complex() else _REAL
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
    elif value.layout != torch.strided or value.is_nested:
        kind = "a sparse or nested tensor"
    elif value.dtype not in known:
        kind = str(value.dtype)
    else:
        return
    raise StateError(
        f"the saved {key} of {info.name!r} is of type {kind}; expected a dense tensor of "
        f"{'complex' if param.is_complex() else 'real'} floating point numbers; nothing was "
        "loaded."
    )


def own_entry(
    info: ParamInfo, param: torch.Tensor, entry: Entry, cell: Cell
) -> tuple[dict[str, Any], list[str]]:
    """Convert a saved entry to the state of lamina's algorithm; also return unused keys.

    Tensors are copies on the parameter's device. They get the dtype that the plan asks for; where
    it asks for none the parameter's, as new state would, but never one that cannot hold what was
    saved: resuming loses no digits.

    Raises:
        StateError: if a value is not what the algorithm keeps.
    """
    algorithm = cell.algorithm
    assert algorithm is not None
    saved = {key: value for key, value in (entry.values or {}).items() if value is not None}
    steps = number_of_steps(info.name, saved.pop("step")) if "step" in saved else None
    fitted = initial_state(param, steps or 0)
    left = [key for key in saved if key not in algorithm.tensors]
    wanted = needed_entry(param, cell.constants)
    # In this order on every process, or their collectives mix it up.
    keys = algorithm.buffers if wanted is None else (*algorithm.buffers, wanted)
    if steps == 0 and not any(map(_filled, saved.values())):
        return fitted, left  # never updated: at most room was made for its tensors
    for key in keys:
        if key not in saved:
            continue
        value = saved[key]
        _check_numbers(info, key, value, param)
        check_shape(info, key, value.shape)
        dtype = state_dtype_of(param, cell.constants)
        if key == wanted:
            dtype = entry_dtype(param, key)
        elif cell.constants.get("state_dtype") is None:
            dtype = torch.promote_types(value.dtype, dtype)
        fitted[key] = value.detach().to(device=param.device, dtype=dtype, copy=True)
    needed = algorithm.init(_EMPTY, algorithm.defaults).keys() - {MOMENTUM}
    if _has_momentum(entry, cell):
        needed |= {MOMENTUM} & set(algorithm.buffers)
    lost = sorted(needed - fitted.keys())
    if steps and lost:
        raise StateError(
            f"the saved state of {info.name!r} counts {steps} updates but has no "
            f"{' and no '.join(lost)}: a part of the state was lost before it came here. "
            "With torch.distributed.checkpoint, load with lamina.load_distributed(optimizer, "
            "folder), or inside `with optimizer.receiving():`."
        )
    if steps is None and needed & fitted.keys() and "exp_avg_sq" in needed:
        raise StateError(
            f"the saved state of {info.name!r} has no step, without which {algorithm.name} cannot "
            "correct its running means; nothing was loaded."
        )
    return fitted, left


def _filled(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or bool(value.any())


def _has_momentum(entry: Entry, cell: Cell) -> bool:
    """Return whether momentum was and is constant: then its buffer must exist."""
    moves = "momentum" in dict(cell.moving) or entry.group.get("overrides", "[]") not in ("[]", [])
    return bool(entry.group.get("momentum") and cell.constants.get("momentum") and not moves)


def guest_entry(param: torch.Tensor, entry: Entry) -> dict[str, Any]:
    """Copy the saved state of a guest's parameter; empty before its first update."""
    saved = dict(entry.values or {})
    if set(saved) == {"step"} and not float(saved["step"]):
        return {}  # lamina's own count begins at build; guests begin with nothing
    own = any(entry.group.get(key) for key in ("capturable", "fused"))
    return {
        key: unpack(copied(value, None if key == "step" and not own else param.device))
        for key, value in saved.items()
    }


def whole_entry(
    infos: Sequence[ParamInfo], param: torch.Tensor, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the memory of L-BFGS, which lies with the first parameter; raises `StateError`."""
    fitted = initial_state(param) | {
        key: copied(value, param.device) for key, value in values.items() if key != "step"
    }
    places = fitted.get("places")
    try:
        chosen = infos if places is None else [infos[place] for place in places]
        vectors = [vector for key in _FLAT for vector in _listed(fitted.get(key))]
        lengths = {vector.numel() for vector in vectors}
    except (TypeError, IndexError, AttributeError) as error:
        raise StateError(f"the saved memory of L-BFGS cannot be read: {error}.") from None
    size = sum(info.numel * (2 if info.dtype.startswith("complex") else 1) for info in chosen)
    if lengths - {size}:
        raise StateError(
            f"the saved memory of L-BFGS is of {min(lengths - {size})} numbers, but the parameters "
            f"have {size}; nothing was loaded."
        )
    return fitted


def evaluations(group: Mapping[str, Any]) -> Any:
    """Return `max_eval` of L-BFGS as torch saves it: its default as a number."""
    limit = group["max_eval"]
    return group["max_iter"] * 5 // 4 if limit is None else limit


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def copied(value: Any, device: torch.device | None) -> Any:
    """Return a copy of a nested value, its tensors on a device (None: where they are)."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.clone() if device is None else value.to(device=device, copy=True)
    if isinstance(value, Mapping):
        return {key: copied(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(each, device) for each in value)
    return deepcopy(value)

"""The form that each setting of a rule must have; texts are parsed, never evaluated."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from .._util.grammar import WORDS, parse
from .._util.numbers import check_amount, is_number, python_number
from ..algorithms.base import dtype_name
from ..algorithms.registry import optimizer_class
from ..algorithms.rounding import rounding_name
from ..errors import HyperparameterError, PlanError, TimeUnitError
from ..gradients.operations import OPERATIONS, Apply, Operation
from ..model.suggestions import written_as
from ..schedules import SCHEDULES, Schedule, cosine, from_function
from ..schedules import duration as time
from .operators import Times, TopDown, by_depth, times, top_down
from .reactions import REACTIONS, EarlyStop, OnPlateau, Plateau, Reaction

#: every name that an expression in a plan may call
NAMES: Mapping[str, Callable[..., Any]] = ChainMap(
    {"times": times, "by_depth": by_depth, "top_down": top_down, **REACTIONS, **OPERATIONS},
    SCHEDULES,  # looked up live: users register schedules of their own
)

_COSINE = cosine(to=0.0)
#: settings of a rule that are not hyperparameters of an optimizer
CONTROLS = (
    *("optimizer", "schedule", "feedback", "frozen", "thaw", "freeze", "rewarm"),
    *("clip_norm", "gradients", "hold", "frozen_state"),
)
WINDOW = ("frozen", "thaw", "freeze")


_BEYOND_FLOATS = 10**308


def check_settings(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the settings with texts parsed, each of the form that its place needs."""
    for key, value in settings.items():
        _refuse_endless_numbers(key, value, where)
    given = {key: _check_setting(key, value, where) for key, value in settings.items()}
    if given.get("frozen") is not None and ("thaw" in given or "freeze" in given):
        raise PlanError(
            f"{where}: frozen={given['frozen']} and thaw or freeze contradict each other; "
            "give frozen=True for never trained, or the times."
        )
    _check_lone_thaw(given, where)
    if "clip_norm" in given and "gradients" in given:
        raise PlanError(
            f"{where}: clip_norm and gradients are one setting; put clip_norm(...) into gradients, "
            "at its place in the order."
        )
    return given


def _refuse_endless_numbers(key: str, value: Any, where: str) -> None:
    """Refuse an integer that no float can hold; Python does not even print very long ones."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, int) and abs(item) >= _BEYOND_FLOATS:
            # Python refuses to print integers of thousands of digits.
            shown = f"{str(item)[:12]}..." if item.bit_length() < 10_000 else "an endless number"
            raise PlanError(
                f"{where}, {key}={shown}: a whole number of {item.bit_length()} bits was given; "
                "expected a number that a float can hold, less than 1e308."
            )


def _check_lone_thaw(given: Mapping[str, Any], where: str) -> None:
    """Refuse beside `thaw` what only known times can be combined with."""
    thaw, freeze = given.get("thaw"), given.get("freeze")
    if isinstance(thaw, OnPlateau) and freeze is not None:
        raise PlanError(
            f"{where}: thaw={thaw!r} waits for a metric, so that freeze={freeze!r} could come "
            "before it; leave freeze= out."
        )
    if isinstance(thaw, TopDown) and isinstance(freeze, tuple):
        raise PlanError(
            f"{where}: thaw={thaw!r} thaws each layer once, but freeze={freeze!r} has "
            f"{len(freeze)} times; give one, or write the thaws as a list of times."
        )


def _check_setting(key: str, value: Any, where: str) -> Any:
    place = f"{where}, {key}"
    _refuse_uncalled(key, value, where)
    is_number = key in CONTROLS or not isinstance(value, (Schedule, Reaction))
    if not is_number and (meant := written_as(key, value)):
        raise HyperparameterError(f"{place}: there is no setting {key!r}.{meant}")
    if key == "optimizer":
        return optimizer_class(value)
    if key == "state_dtype":
        return dtype_name(where, None if value == "none" else value)  # as TOML writes it
    if key == "rounding":
        return rounding_name(where, None if value == "none" else value)
    if isinstance(value, str) and key not in CONTROLS and _is_word(value):
        return value  # an option such as line_search_fn="strong_wolfe"; its optimizer judges it
    if key == "frozen_state":
        return _frozen_state(value, place)
    if key in ("thaw", "freeze"):
        return _moments(key, value, place)
    if isinstance(value, str) and not (key in ("frozen", "hold") and value not in WORDS):
        value = parse(value, NAMES, place)
    check = _CHECKS.get(key, _hyperparameter)
    return check(value, place)


def _refuse_uncalled(key: str, value: Any, where: str) -> None:
    """Raise `PlanError` for a constructor, such as `lamina.cosine`, in the place of its value."""
    name = next((name for name, made in NAMES.items() if made is value), None)
    if name is None:
        return
    fitting = (text for text in _calls(name, value) if _fits(key, text, where))
    example = next((f"lamina.{text}" for text in fitting), f"lamina.{name}(...)")
    raise PlanError(f"{where}: {key}={name} is not called; write {key}={example}.")


def _calls(name: str, constructor: Callable[..., Any]) -> list[str]:
    """Return calls of a constructor: without arguments, as in its example, with usual ones."""
    shown = re.search(rf">>> .*?({name}\([^()]*\))", constructor.__doc__ or "")
    example = [shown[1]] if shown else []
    return [f"{name}()", *example, f"{name}(to=0.0)", f"{name}(1.0, 0.0)"]


def _fits(key: str, text: str, where: str) -> bool:
    try:
        check_settings({key: parse(text, NAMES, where)}, where)
    except PlanError:
        return False
    return True


def _is_word(text: str) -> bool:
    factor = re.fullmatch(r"x\d+", text)  # such as "x2", a factor of the grammar
    return text.isidentifier() and text not in WORDS and not factor


def _frozen_state(value: Any, place: str) -> str:
    if not isinstance(value, str) or value not in ("keep", "drop"):
        raise PlanError(f"{place}={value!r}: expected 'keep' or 'drop'.")
    return value


def _moments(key: str, value: Any, place: str) -> Any:
    """Return a time, or several in a tuple; for a thaw also what stands in the place of a time."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise PlanError(f"{place}=[] is empty; give it a time, or leave it out.")
        listed = tuple(_listed_time(item, f"{place}[{i}]") for i, item in enumerate(value))
        return listed if len(listed) > 1 else listed[0]
    if isinstance(value, bool) or value is None:
        raise TimeUnitError(
            f"{place}={value!r} is not a time; frozen=True never trains, and frozen=False trains "
            f"all the time. A time is such as {key}='1 epochs', {key}=500 or {key}='10%'."
        )
    if isinstance(value, str) and "(" in value:
        value = parse(value, NAMES, place)
    if key == "thaw" and isinstance(value, (TopDown, OnPlateau)):
        return value
    return _time(value, place)


def _listed_time(value: Any, place: str) -> time.TimeLike:
    read = parse(value, NAMES, place) if isinstance(value, str) and "(" in value else value
    if isinstance(read, (TopDown, OnPlateau)):
        raise PlanError(
            f"{place}={read!r}: a list holds times alone; give it as the rule's only thaw=."
        )
    return _time(read, place)


def _time(value: Any, place: str) -> time.TimeLike:
    try:
        return time.parse(value).text
    except TimeUnitError as error:
        raise TimeUnitError(f"{place}: {error}") from error


def _factor(value: Any, place: str) -> Schedule | None:
    if isinstance(value, Plateau):
        raise PlanError(
            f"{place}={value!r}: a plateau is not a function of the step; give it as feedback=, "
            "and it multiplies whatever the schedule gives."
        )
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Schedule) for v in value):
        raise PlanError(
            f"{place}={value!r}: schedules one after the other are written "
            f"{' >> '.join(map(repr, value))}."
        )
    if isinstance(value, LRScheduler):
        raise PlanError(
            f"{place} is a {type(value).__name__} of torch, which drives an optimizer itself; a "
            f"plan takes a function of the step, or a schedule such as lamina.{_COSINE!r}."
        )
    if value is not None and not isinstance(value, Schedule):
        if not callable(value):
            raise PlanError(
                f"{place}={value!r}: expected a schedule, a function of the step, or None."
                f"{_as_schedule(value)}"
            )
        value = from_function(value)
    schedule: Schedule | None = value
    if schedule is not None and schedule.kind == "value":
        raise PlanError(
            f"{place}={schedule!r} is a value (it has a start), but it multiplies lr here; "
            f"give a factor, without a start, or write lr={schedule!r}.{_as_factor(schedule)}"
        )
    return schedule


def _as_schedule(value: Any) -> str:
    number = is_number(value) and value >= 0
    return f" A number that multiplies lr all the time is constant({value!r})." if number else ""


def _as_factor(schedule: Schedule) -> str:
    """Return how a schedule is written whose only number was meant as its end."""
    text = re.sub(r"^(\w+)\(([\d.e+-]+)\)$", r"\1(to=\2)", repr(schedule))
    return f" To end at a share of lr, write schedule={text}." if text != repr(schedule) else ""


def _threshold(value: Any, place: str) -> Any:
    value = python_number(value)
    if value is None or (isinstance(value, Schedule) and value.kind != "factor"):
        return value
    if isinstance(value, Schedule):
        raise PlanError(f"{place}={value!r} is a factor; a threshold is a value: give it a start.")
    if isinstance(value, Operation):
        raise PlanError(f"{place}={value!r} is an operation: write gradients={value!r}.")
    if isinstance(value, Times):
        raise PlanError(f"{place}={value!r}: a threshold belongs to its rule; give a number.")
    check_amount(place, "", value)
    if value == 0:
        raise HyperparameterError(f"{place}=0 would clip every gradient away; use frozen=True.")
    return value


def _operations(value: Any, place: str) -> tuple[Operation, ...] | None:
    if value is None:
        return None
    listed = value if isinstance(value, (list, tuple)) else (value,)
    operations = []
    for item in listed:
        read = parse(item, NAMES, place) if isinstance(item, str) else item
        if callable(read) and not isinstance(read, Operation):
            read = Apply(read)
        if is_number(read) and read > 0:
            raise PlanError(
                f"{place}={read!r}: expected gradient operations; to clip the norm, write "
                f"clip_norm={read!r} or gradients=clip_norm({read!r})."
            )
        if not isinstance(read, Operation):
            raise PlanError(
                f"{place}={read!r}: expected gradient operations such as clip_norm(1.0), or a "
                "function (grads, infos) -> grads."
            )
        operations.append(read)
    return tuple(operations)


def _check_lr(value: Any, place: str) -> None:
    """Raise `HyperparameterError` for several values of lr, or for none."""
    if isinstance(value, (list, tuple)):
        comma = f" A comma at the end makes a tuple: write lr={value[0]!r}." * (len(value) == 1)
        raise HyperparameterError(
            f"{place}={value!r}: expected one number; parts with a learning rate of their own get "
            f"a rule, such as Rule('encoder.*', lr=1e-4).{comma}"
        )
    if isinstance(value, bool) or value is None:
        raise HyperparameterError(f"{place}={value!r}: expected a number, such as lr=1e-3.")


def _hyperparameter(value: Any, place: str) -> Any:
    value = python_number(value)
    if isinstance(value, torch.Tensor):
        raise HyperparameterError(f"{place} is a tensor; expected a number, such as float(tensor).")
    if isinstance(value, Schedule) and value.kind == "factor":
        raise PlanError(
            f"{place}={value!r} is a factor, not a value; write the value as the number and the "
            f"factor as schedule= (for lr) or times({value!r}), or give it a start."
        )
    if isinstance(value, dict):
        raise PlanError(
            f"{place}={value!r}: expected a number. Each part gets a rule of its own, such as "
            "Rule('encoder.*', lr=1e-4)."
        )
    if place.endswith(", lr"):
        _check_lr(value, place)
    if isinstance(value, (list, tuple)):
        return tuple(
            _hyperparameter(
                parse(item, NAMES, place) if isinstance(item, str) else item, f"{place}[{index}]"
            )
            for index, item in enumerate(value)
        )
    if isinstance(value, Plateau):
        raise PlanError(f"{place}={value!r}: a plateau multiplies lr; write feedback={value!r}.")
    if isinstance(value, Operation):
        raise PlanError(f"{place}={value!r}: an operation on gradients; write gradients={value!r}.")
    if isinstance(value, (TopDown, Reaction, str)):
        raise PlanError(f"{place}={value!r}: expected a number, a schedule, or a factor.")
    if is_number(value):
        check_amount(place, "", value)
    return value


def _flag(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{place}={value!r}: expected True or False.")
    return value


def _feedback(value: Any, place: str) -> Plateau | None:
    if isinstance(value, EarlyStop):
        raise PlanError(f"{place}={value!r} is for the whole plan: Plan(..., stop={value!r}).")
    if value is not None and not isinstance(value, Plateau):
        raise PlanError(f"{place}={value!r}: expected plateau(...), or None to exempt.")
    return value


#: what checks the value of each setting that is no hyperparameter
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "frozen": _flag,
    "hold": _flag,
    "schedule": _factor,
    "rewarm": _factor,
    "feedback": _feedback,
    "clip_norm": _threshold,
    "gradients": _operations,
}

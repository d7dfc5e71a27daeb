"""Plans as TOML, both ways, without loss; text is parsed by a grammar and never evaluated."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from .._util.grammar import Expression, to_source
from ..algorithms.registry import OPTIMIZERS, optimizer_name
from ..errors import LaminaError, PlanError, printable, shortened
from ..gradients.operations import Apply
from ..schedules import from_function as FromFunction

#: no plan is larger, and a parser should not be handed a file of gigabytes
_LARGEST = 1_000_000
#: tomllib remembers every beginning of a dotted key, which takes gigabytes for a long one
_ENDLESS_KEY = re.compile(r"(?<![\w.-])(?:[\w-]*+\.){40}")
_BETWEEN_PARTS = re.compile(r"[ \t\"']+")
#: what a value can cause that no check foresaw: a number beyond all floats, endless nesting
_CAUSED_BY_TEXT = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


#: what holds for a whole plan rather than for its parameters, and its defaults
_POLICY = {"nonfinite": "raise", "nonfinite_check": "all", "stop": None}

#: makes a plan of its rules and its settings, or a rule of its pattern and its settings
Make = Callable[..., Any]


def read(source: str | os.PathLike[str], make_plan: Make, make_rule: Make) -> Any:
    """Read a plan from a TOML file, or from TOML text (a string with a newline or '=')."""
    if isinstance(source, str) and ("\n" in source or "=" in source):
        return _plan(source, "plan text", make_plan, make_rule)
    path = Path(source)
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:
        raise PlanError(f"{path}: there is no such plan file; check the path.") from None
    except (OSError, ValueError) as error:  # a ValueError: no text, or no path (a NUL in it)
        shown = printable(shortened(str(path)))
        raise PlanError(
            f"{shown}: cannot be read as a plan file ({shortened(str(error))})."
        ) from error
    return _plan(text, str(path), make_plan, make_rule)


def _plan(text: str, where: str, make_plan: Make, make_rule: Make) -> Any:
    if len(text) > _LARGEST:
        raise PlanError(
            f"{where}: a plan has at most {_LARGEST:,} characters; this is longer, and not read."
        )
    try:
        if _ENDLESS_KEY.search(_BETWEEN_PARTS.sub("", text)):
            raise ValueError("a key of more than 40 parts; the keys of a plan have one")
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number with too many digits is a ValueError
        raise PlanError(
            f"{where}: this is not TOML ({shortened(str(error))}). "
            'A plan looks like: optimizer = "AdamW", '
            'lr = 2e-5, then [[rule]] tables with match = "...".'
        ) from error
    rules = table.pop("rule", [])
    if "rules" in table:
        raise PlanError(f"{where}: 'rules' is unknown; write each rule as a [[rule]] table.")
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise PlanError(f"{where}: 'rule' is not a list of tables; write each as [[rule]].")
    if "optimizer" not in table:
        hint = _misspelled("optimizer", table)
        raise PlanError(f"{where}: the key 'optimizer' is missing, such as \"AdamW\".{hint}")
    for key, value in table.items():
        if isinstance(value, dict):
            raise PlanError(f"{where}: [{key}] is a table, but a plan has only [[rule]] tables.")
    try:
        made = [_rule(rule, index, make_rule) for index, rule in enumerate(rules, 1)]
        return make_plan(rules=made, **table)
    except LaminaError as error:
        raise type(error)(f"{where}: {error}") from error
    except _CAUSED_BY_TEXT as error:
        raise PlanError(
            f"{where}: this cannot be a plan ({type(error).__name__}: {shortened(str(error))})."
        ) from error


def _misspelled(key: str, table: dict[str, Any]) -> str:
    close = difflib.get_close_matches(key, table, n=1)
    return f" Is {close[0]!r} a misspelling of it?" if close else ""


def _rule(table: dict[str, Any], index: int, make_rule: Make) -> Any:
    if not isinstance(table.get("match"), str):
        hint = "" if "match" in table else _misspelled("match", table)
        raise PlanError(f"rule {index}: 'match' is missing or not a text pattern.{hint}")
    settings = {key: value for key, value in table.items() if key != "match"}
    try:
        # TOML has no None; the text "none" exempts, as in schedule = "none".
        return make_rule(table["match"], **settings)
    except LaminaError as error:
        raise type(error)(f"rule {index}: {error}") from error


def policy(plan: Any) -> dict[str, Any]:
    """Return what a plan says of itself as a whole, without what is the default anyway."""
    given = {key: getattr(plan, key) for key in _POLICY}
    return {key: value for key, value in given.items() if value != _POLICY[key]}


def write(plan: Any) -> str:
    """Write a plan as TOML text that `read` turns back into an equal plan."""
    table: dict[str, Any] = {"optimizer": _registered(plan.optimizer, "plan")}
    table |= {key: _value(value, f"plan, {key}") for key, value in plan.settings}
    table |= {key: _value(value, f"plan, {key}") for key, value in policy(plan).items()}
    rules = []
    for rule in plan.rules:
        if not isinstance(rule.match, str):
            raise PlanError(
                f"the pattern {rule.label} is a Python function, which TOML cannot hold; "
                "write it as a pattern text, or keep the plan in Python."
            )
        where = f"rule {rule.match!r}"
        row = {key: _value(value, f"{where}, {key}") for key, value in rule.settings}
        rules.append({"match": rule.match, **row})
    # tomli_w would write short tables inline; one [[rule]] block each reads better in a diff.
    return "\n[[rule]]\n".join([tomli_w.dumps(table), *map(tomli_w.dumps, rules)])


def _value(value: Any, where: str) -> Any:
    if isinstance(value, type):
        return _registered(value, where)
    if isinstance(value, Expression):
        _refuse_functions(value, where)
        return to_source(value, quote=False)
    if isinstance(value, tuple):
        return [_value(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if value is None:
        return "none"
    if isinstance(value, (bool, int, float, str)):
        return value
    raise PlanError(
        f"{where}: {value!r} is a Python object that TOML cannot hold; keep the plan in Python."
    )


def _refuse_functions(value: Any, where: str) -> None:
    if isinstance(value, (FromFunction, Apply)):
        raise PlanError(
            f"{where}: {value!r} is a Python function, which TOML cannot hold; "
            "keep the plan in Python."
        )
    for part in vars(value).values():
        for item in part if isinstance(part, tuple) else (part,):
            if isinstance(item, Expression):
                _refuse_functions(item, where)


def _registered(optimizer: type, where: str) -> str:
    name = optimizer_name(optimizer)
    if OPTIMIZERS.get(name) is not optimizer:
        package = optimizer.__module__.split(".")[0]
        free = f"{package}_{name}" if name in OPTIMIZERS else name
        raise PlanError(
            f"{where}: the optimizer {package}'s {name} has no registered name that TOML could "
            f"hold; register it with lamina.register_optimizer({free!r}, {name})."
        )
    return name

"""The exception tree.

    LaminaError
    ├── PlanError (also ValueError)
    │   ├── PatternError            a pattern that cannot be read, or matches nothing
    │   ├── ScheduleError           a schedule of the wrong kind, length or value
    │   ├── TimeUnitError           a length of time that cannot be read or resolved
    │   └── HyperparameterError     unknown, or out of its range
    ├── OwnershipError              something else wrote what the plan owns
    ├── FrozenMovedError            a frozen parameter is not what it was
    ├── NonFiniteError (also ArithmeticError)   a gradient is NaN or infinite
    ├── StateError (also ValueError)            a state that cannot be loaded
    ├── MismatchError (also ValueError)         a parameter, its gradient and its state differ
    ├── TaskError                   a task or its data is missing or broken
    └── MissingExtraError (also ImportError)    an optional package is missing or too old

    LaminaWarning (a UserWarning)   legal, but a known trap: the message names the way around it

Every message is one paragraph: what was given, what was expected, the fix.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from types import ModuleType

_LONGEST_MESSAGE = 2000


class LaminaError(Exception):
    """Base of every error that lamina raises on purpose.

    Of a very long message the middle is left out: what it quotes may come from a broken file.
    """

    def __init__(self, message: str = "", *more: object) -> None:
        if isinstance(message, str) and len(message) > _LONGEST_MESSAGE:
            message = f"{message[:1200]} [...] {message[-600:]}"
        super().__init__(message, *more)


class PlanError(LaminaError, ValueError):
    """A plan that cannot be carried out as written."""


class PatternError(PlanError):
    """A pattern that cannot be read, or that matches no parameter."""


class ScheduleError(PlanError):
    """A schedule of the wrong kind, with a wrong length, or giving a wrong value."""


class TimeUnitError(PlanError):
    """A length of time that cannot be read, or that lacks what its unit needs."""


class HyperparameterError(PlanError):
    """A hyperparameter that does not exist or is out of its range."""


class OwnershipError(LaminaError):
    """A value that the plan owns was written by something else."""


class FrozenMovedError(LaminaError):
    """A frozen parameter is not what it was when it was frozen."""


class NonFiniteError(LaminaError, ArithmeticError):
    """A gradient is NaN or infinite; the weights were not changed."""


class StateError(LaminaError, ValueError):
    """A state that does not fit; the live optimizer was not changed."""


class MismatchError(LaminaError, ValueError):
    """A parameter does not fit its gradient or its state any more; nothing was updated."""


class TaskError(LaminaError):
    """A training task, its model or its data is missing or broken."""


class MissingExtraError(LaminaError, ImportError):
    """An optional package is not installed."""


class LaminaWarning(UserWarning):
    """Something legal that is a known trap; shown once, with the way around it."""


def did_you_mean(given: str, known: Iterable[str], limit: int = 3) -> str:
    """Return a clause that names the closest known words, or an empty string."""
    by_lower = {word.lower(): word for word in known}
    near = difflib.get_close_matches(given.lower(), list(by_lower), n=limit, cutoff=0.6)
    close = [by_lower[word] for word in near]
    return f" Did you mean {' or '.join(repr(word) for word in close)}?" if close else ""


def shortened(text: str, limit: int = 200) -> str:
    """Return a text for an error message; of a long one its beginning."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def printable(text: str) -> str:
    """Escape control characters; names may come from untrusted files."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


#: the oldest versions of optional packages that work, as in pyproject.toml: a package that was not
#: installed through an extra of lamina may be older
OLDEST = {
    "accelerate": "1.1",
    "filelock": "3.13",
    "lightning": "2.6",
    "matplotlib": "3.10",
    "plotly": "6.0",
    "rich": "13.7",
    "transformers": "4.46",
    "numba": "0.61",
    "typer": "0.16",
}


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        MissingExtraError: if it is not installed, cannot be imported, or is too old.
    """
    _check_version(module.partition(".")[0], purpose)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module.split('.')[0]!r}, which cannot be imported "
            f"({error}). Install it with: pip install 'lamina[{extra}]'"
        ) from error


def _check_version(package: str, purpose: str) -> None:
    """Raise `MissingExtraError` if an installed package is older than those that work.

    It is not imported for that: what is too old may fail in many ways while it is imported.
    """
    oldest = OLDEST.get(package)
    if oldest is None:
        return
    try:
        found = version_of(package)
    except metadata.PackageNotFoundError:
        return  # the import will say so
    if release_of(found) < release_of(oldest):
        raise MissingExtraError(
            f"{purpose} needs {package} {oldest} or newer, but {found} is installed. Update it "
            f"with: pip install --upgrade '{package}>={oldest}'"
        )


def version_of(package: str) -> str:
    """Return the version of an installed package.

    Raises:
        PackageNotFoundError: of `importlib.metadata`, if it is not installed.
    """
    return _read_once(metadata.version, package)


@cache
def _read_once(read: Callable[[str], str], package: str) -> str:
    """Read a version once: to find it, all that a package says of itself is parsed."""
    return read(package)


def release_of(version: str) -> list[int]:
    """Return the numbers that a version begins with: [2, 6, 0] of "2.6.0+cu124"."""
    leading = re.match(r"\d+(?:\.\d+)*", version)
    return [int(number) for number in leading[0].split(".")] if leading else []

"""Whether compiled loops can be used here, and the loops."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

from ..errors import OLDEST, release_of


@cache
def unavailable() -> str:
    """Return why there are no compiled loops, or "" if there are."""
    try:
        import numba
    except Exception as error:  # not there, or it does not fit this NumPy or this system
        if isinstance(error, ModuleNotFoundError) and error.name == "numba":
            return 'Numba is not installed: pip install "lamina[fast]"'
        return f"Numba cannot be imported: {error}"
    oldest = OLDEST["numba"]
    if release_of(numba.__version__) < release_of(oldest):
        return f'Numba {numba.__version__} is too old: pip install "numba>={oldest}"'
    if numba.config.DISABLE_JIT:
        return "Numba is switched off by NUMBA_DISABLE_JIT"
    return ""


_MODULES = ("access", "weights16", "rules", "tensor_rules")


@cache
def loop(name: str) -> Any:
    """Return a compiled function by its name."""
    return next(getattr(module, name) for module in _modules() if hasattr(module, name))


def failure(calls: Mapping[str, tuple[Any, ...]]) -> str:
    """Compile loops by calling each with tables of nothing; return why this fails, or "".

    A cache on disk that is damaged makes this fail too, so that a second try goes without it.
    """
    try:
        _call(calls)
    except Exception:
        _leave_cache()
    else:
        return ""
    try:
        _call(calls)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"Numba could not compile {', '.join(calls)}: {first}"
    return ""


def _call(calls: Mapping[str, tuple[Any, ...]]) -> None:
    for name, arguments in calls.items():
        loop(name)(*arguments)


def _leave_cache() -> None:
    """Let this process compile for itself from here on."""
    from numba.core.caching import NullCache

    for module in _modules():
        for made in vars(module).values():
            if hasattr(made, "py_func"):
                made._cache = NullCache()


def _modules() -> list[Any]:
    package = __name__.rpartition(".")[0]
    return [importlib.import_module(f"{package}.{each}") for each in _MODULES]

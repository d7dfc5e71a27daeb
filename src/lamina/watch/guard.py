"""Keep failures of the watcher away from the script that it watches."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

#: after so many failures of its own the watcher sees no more
_MOST_FAILURES = 20


class Guard:
    """Runs the watcher's code so that none of its errors reaches the script.

    It does nothing in processes that were forked from the one that made it, such as the workers of
    a DataLoader, and nothing once it is closed.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._open = True
        self._failures = 0
        #: the first failure, as text
        self.failure: str | None = None

    @property
    def is_here(self) -> bool:
        """Return whether this is the watching process, and not a fork of it."""
        return os.getpid() == self._process

    @property
    def is_open(self) -> bool:
        """Return whether this is the watching process, and it still watches."""
        return self._open and self.is_here

    def close(self) -> None:
        """Run nothing more."""
        self._open = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of the watcher; an error is kept for the end, and goes no further.

        Returns:
            What the function returned, or None if it was not called or failed.
        """
        if not self.is_open:
            return None
        try:
            return function(*arguments)
        except Exception as error:
            self._failures += 1
            if self.failure is None:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{os.path.basename(last.filename)}:{last.lineno}"
                self.failure = f"{type(error).__name__} in {where}: {error}"
            if self._failures >= _MOST_FAILURES:
                self._open = False
        return None

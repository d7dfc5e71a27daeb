"""Ctrl-C waits until a step is whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

try:  # without the conversions to enums, which take longer than a small step
    import _signal as plain  # type: ignore[import-not-found]
except ImportError:  # not in every Python
    plain = signal

_SIGINT = int(signal.SIGINT)


class HeldInterrupt:
    """Delay the KeyboardInterrupt of a first Ctrl-C to the end of a `with` block.

    Weights that have moved and a clock that has not would stay apart for good. A second Ctrl-C is
    not delayed, as something may hang. Other handlers than Python's own are left alone, and so are
    threads, in which no signal arrives.
    """

    __slots__ = ("_before", "_came")

    def __enter__(self) -> None:
        self._came = False
        self._before: Any = None
        if threading.get_ident() != threading.main_thread().ident:
            return
        if plain.getsignal(_SIGINT) is signal.default_int_handler:
            self._before = plain.signal(_SIGINT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            plain.signal(_SIGINT, self._before)
            if self._came:
                raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True

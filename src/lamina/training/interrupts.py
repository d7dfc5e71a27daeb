"""Ctrl-C: the first lets the current step finish, the second stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def patient(enabled: bool = True) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed.

    Not `enabled` where several processes train: they would stop at different steps and wait for
    each other for ever, so there it interrupts at once, as everywhere.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)

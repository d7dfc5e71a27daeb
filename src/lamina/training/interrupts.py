"""Ctrl-C and SIGTERM: the first lets the current step finish, the second stops at once.

Batch systems (SLURM, Kubernetes) send SIGTERM some seconds before they kill, so that a run can be
saved; it is treated as Ctrl-C is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived where nothing could be finished first."""


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """Return the signal that an interruption came from."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


@contextmanager
def raising_on_terminate() -> Iterator[None]:
    """Let SIGTERM raise `Terminated`, as Ctrl-C raises `KeyboardInterrupt`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handled(signal.SIGTERM, stop):
        yield


@contextmanager
def graceful_interrupt(enabled: bool = True) -> Iterator[Callable[[], signal.Signals | None]]:
    """Give a function that returns the signal that asked the run to stop, or None.

    Args:
        enabled: false where several processes train: they would stop at different steps and wait
            for each other for ever, so there a signal interrupts at once, as everywhere.
    """
    if not enabled:
        with raising_on_terminate():
            yield lambda: None
        return
    asked: signal.Signals | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked is not None:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        asked = signal.Signals(number)

    with _handled(signal.SIGINT, note), _handled(signal.SIGTERM, note):
        yield lambda: asked


@contextmanager
def _handled(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    """Handle a signal, unless it is ignored (as under nohup) or this is no main thread."""
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)

"""Ctrl-C while the command line is being imported, which takes seconds.

This is the first thing that `import lamina` runs, and it does nothing unless the process is the
command line's. Until the first command begins, and after the last one, a signal then ends the
process with one line and the usual exit code instead of a traceback of half-imported modules.
"""

import os
import signal
import sys
import threading
from types import FrameType


def is_command_line() -> bool:
    """Return whether this process was started as `lamina` or `python -m lamina`."""
    given = sys.orig_argv[1:]
    if "-m" in given and given[given.index("-m") + 1 :][:1] == ["lamina"]:
        return True
    return os.path.basename(sys.argv[0] if sys.argv else "") in ("lamina", "lamina.exe")


def end_quietly_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the process at once, unless they are ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def raise_on_ctrl_c() -> None:
    """Give Ctrl-C back its ordinary meaning, and SIGTERM too."""
    for number, meaning in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is _end:
            signal.signal(number, meaning)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"lamina: interrupted.\n")
    os._exit(128 + number)


if is_command_line():
    end_quietly_on_signals()

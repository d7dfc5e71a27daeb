"""Run a script as Python would, under a watch."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ..errors import TaskError
from .session import Seen, watch


def check_script(script: str) -> None:
    """Refuse a script that cannot be run.

    Raises:
        TaskError: if there is no such file.
    """
    path = Path(script)
    if path.is_dir() and not (path / "__main__.py").exists():
        raise TaskError(f"{script}: is a folder; name the Python file to run in it.")
    if not path.exists():
        near = sorted(each.name for each in Path(path.parent).glob("*.py"))[:3]
        hint = f" In that folder there are {', '.join(near)}." if near else ""
        raise TaskError(
            f"{script}: there is no such file; name the script to run.{hint} For a module, "
            "as in python -m package.module, write: lamina watch -m package.module"
        )


def run_script(
    name: str,
    arguments: Sequence[str],
    as_module: bool,
    ended: Callable[[Seen], None],
    began: Callable[[Seen], None] = lambda seen: None,
) -> int:
    """Run a script or module under a watch, as `__main__`, with its own arguments.

    Args:
        name: the path of a script, or the name of a module.
        arguments: what follows in `sys.argv`.
        as_module: whether it is a module, as in `python -m`.
        ended: called once with what was seen, however the script ends, `os._exit` and
            SIGTERM included.
        began: called with what is seen, before the script begins.

    Returns:
        The exit code that Python would have ended with; 130 after Ctrl-C.
    """
    script = name if as_module else os.path.abspath(name)
    sys.argv = [name, *arguments]
    sys.path[0] = os.getcwd() if as_module else os.path.dirname(script)
    with watch() as seen, _before_exit(seen, ended):
        began(seen)
        try:
            if as_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            elif os.path.isdir(name):
                runpy.run_path(name, run_name="__main__")
            else:
                _run_file(script)
        except SystemExit as error:
            return _exit_code(error.code)
        except KeyboardInterrupt:
            print("\nlamina: the script was interrupted.", file=sys.stderr)
            return 130
        except BaseException as error:
            own = _without_runner(error.__traceback__)
            sys.excepthook(type(error), error.with_traceback(own), own)
            return 1
    return 0


class _MainLoader(SourceFileLoader):
    """Loads a script; its bytecode is not kept, as Python keeps none of a main module."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0) -> None:
        """Write nothing."""


def _run_file(path: str) -> None:
    """Run a file as the main module, which it stays: classes are pickled by it, also at exit.

    `runpy.run_path` would take the module away afterwards, and change `sys.argv[0]`.
    """
    loader = _MainLoader("__main__", path)
    module = types.ModuleType("__main__")
    module.__file__, module.__loader__ = path, loader
    sys.modules["__main__"] = module
    loader.exec_module(module)


def _exit_code(code: Any) -> int:
    """Return the exit code of a SystemExit, as Python takes it; a text is printed."""
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _without_runner(trace: TracebackType | None) -> TracebackType | None:
    """Return a traceback from the first frame on that is the script's."""
    runners = (__file__, runpy.__file__)
    begin = trace
    while begin is not None:
        name = begin.tb_frame.f_code.co_filename
        if name not in runners and not name.startswith("<frozen"):
            return begin
        begin = begin.tb_next
    return trace


@contextmanager
def _before_exit(seen: Seen, ended: Callable[[Seen], None]) -> Iterator[None]:
    """Settle what was seen at the end of the block, or before SIGTERM or `os._exit` ends all."""
    leave = os._exit
    done = False

    def finish() -> None:
        nonlocal done
        if done or not seen.is_here:
            return
        done = True
        try:
            seen.settle()
            ended(seen)
        except Exception:  # the script has run: its exit code stays what it is
            with suppress(Exception):  # it may have closed stderr
                traceback.print_exc(limit=-1)

    def finish_and_leave(status: int) -> None:
        finish()
        with suppress(Exception):
            sys.stderr.flush()
        leave(status)

    def finish_and_die(number: int, frame: FrameType | None) -> None:
        finish()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    os._exit = finish_and_leave  # type: ignore[assignment]
    default = threading.current_thread() is threading.main_thread()
    default = default and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if default:
        signal.signal(signal.SIGTERM, finish_and_die)
    try:
        yield
    finally:
        os._exit = leave
        if default and signal.getsignal(signal.SIGTERM) is finish_and_die:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        finish()

"""The threads of torch's own OpenMP runtime, for compiled loops.

Between two operations torch's threads wait busily for the next one, for some milliseconds. A thread
of another pool would have to share a core with one of them, and often begin late. So loops run on
torch's threads themselves: `GOMP_parallel` is what a compiler makes of `#pragma omp parallel`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None)


class Team:
    """All threads of an OpenMP runtime.

    Args:
        library: a loaded library that is linked with the runtime.
        enter: the address of `ENTER` in `entrance.py`.
    """

    def __init__(self, library: Any, enter: int) -> None:
        self._enter = enter
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(
        self, function: Callable[..., None], arguments: tuple[Any, ...], wanted: int, threads: int
    ) -> None:
        """Call a function at the same time on several threads of the team, and wait for all.

        Args:
            function: what to call; it takes what is left to do, so that more or fewer calls do no
                harm.
            arguments: for it.
            wanted: how many calls to make.
            threads: how many threads the team has. A team of another size would make the runtime
                end threads, and start them again for torch. Those that are not wanted do not wait
                for the interpreter lock.
        """
        errors: list[BaseException] = []
        done: list[bool] = []

        def call() -> None:
            try:
                function(*arguments)
                done.append(True)
            except BaseException as error:  # it must not pass through code in C
                errors.append(error)

        body = _BODY(call)
        words = (ctypes.c_int64 * 3)(0, wanted, ctypes.cast(body, ctypes.c_void_p).value or 0)
        self._parallel(self._enter, ctypes.byref(words), threads, 0)
        if errors:
            raise errors[0]
        if not done:  # the only thread that came was interrupted before its call began
            function(*arguments)


@cache
def torch_team() -> Team | None:
    """Return torch's own threads, or None where they cannot be reached.

    They can on Linux, where torch is built with OpenMP.
    """
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    try:
        from .entrance import ENTER  # Numba is there where a loop is to run
    except Exception:  # it cannot be compiled; there are other threads, and the step has begun
        return None
    for library in _libraries():
        if _is_torchs(library):
            return Team(library, ENTER.address)
    return None


def _libraries() -> Iterator[Any]:
    """Yield what functions of OpenMP are looked up in, in the order in which torch found its own.

    First what all of the process sees, such as a runtime in LD_PRELOAD, then what torch is linked
    with.
    """
    for path in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with suppress(OSError):
            yield ctypes.CDLL(path)


def _is_torchs(library: Any) -> bool:
    """Return whether the runtime is the one of torch; others may be in the process too."""
    threads = torch.get_num_threads()
    if not all(hasattr(library, name) for name in ("GOMP_parallel", "omp_set_num_threads")):
        return False
    library.omp_set_num_threads(threads + 1)
    try:
        return torch.get_num_threads() == threads + 1
    finally:
        library.omp_set_num_threads(threads)

"""The threads of torch's own OpenMP runtime, for compiled loops.

Between two operations torch's threads wait busily for the next one, for some milliseconds. A thread
of another pool would have to share a core with one of them, and often begin late. So loops run on
torch's threads themselves: `GOMP_parallel` is what a compiler makes of `#pragma omp parallel`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
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
            function: what to call.
            arguments: for it.
            wanted: how many calls to make.
            threads: how many threads the team has. A team of another size would make the runtime
                end threads, and start them again for torch. Those that are not wanted do not wait
                for the interpreter lock.
        """
        errors: list[BaseException] = []

        def call() -> None:
            try:
                function(*arguments)
            except BaseException as error:  # it must not pass through code in C
                errors.append(error)

        body = _BODY(call)
        words = (ctypes.c_int64 * 3)(0, wanted, ctypes.cast(body, ctypes.c_void_p).value or 0)
        self._parallel(self._enter, ctypes.byref(words), threads, 0)
        if errors:
            raise errors[0]


@cache
def torch_team() -> Team | None:
    """Return torch's own threads, or None where they cannot be reached.

    They can on Linux, where torch is built with OpenMP. The functions are looked up in what torch
    is linked with: another runtime in the process, such as that of scikit-learn, is not meant.
    """
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    from .entrance import ENTER  # Numba is there where a loop is to run

    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = Team(library, ENTER.address)
        threads = torch.get_num_threads()  # first: torch may set the runtime up now
        return team if library.omp_get_max_threads() == threads else None
    except (OSError, AttributeError):
        return None

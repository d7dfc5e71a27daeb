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

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Team:
    """All threads of an OpenMP runtime.

    Args:
        library: a loaded library that is linked with the runtime.
    """

    def __init__(self, library: Any) -> None:
        self._parallel = library.GOMP_parallel
        self._parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(self, function: Callable[..., None], arguments: tuple[Any, ...], threads: int) -> None:
        """Call a function once on each of so many threads, this one included.

        Fewer calls are made where the runtime gives fewer threads.
        """
        errors: list[BaseException] = []

        def body(_: object) -> None:
            try:
                function(*arguments)
            except BaseException as error:  # it must not pass through code in C
                errors.append(error)

        self._parallel(_BODY(body), None, threads, 0)
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
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        team = Team(library)
        threads = torch.get_num_threads()  # first: torch may set the runtime up now
        return team if library.omp_get_max_threads() == threads else None
    except (OSError, AttributeError):
        return None

"""Threads for compiled loops, which run without the interpreter lock.

They are torch's own where these can be reached, and else those of Python. There is no second OpenMP
runtime beside torch's, whose threads would fight for the cores. The number of threads is torch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from math import isqrt
from typing import Any

import torch

from .openmp import torch_team

#: elements that take as long as it takes to bring a thread to a loop, which waits for a lock
_WORTH_A_THREAD = 200_000


class Workers:
    """The threads of this process.

    A pool of Python's threads begins with its first use, and anew in a forked process. There it is
    all there is: the threads of torch are those of the parent, and would be waited for forever.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
        self._is_forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._pool, self._size = None, 0  # the threads are those of the parent
        self._is_forked = True

    def run(self, function: Callable[..., None], arguments: tuple[Any, ...], elements: int) -> None:
        """Call a function on several threads at once, each of which takes what is left to do.

        It does not matter how many of them come: this thread does the rest.
        """
        threads = torch.get_num_threads()
        # They come one after the other: k of them take a time of k + elements / k, in these units.
        wanted = min(threads, max(1, isqrt(elements // _WORTH_A_THREAD)))
        if wanted > 1 and not self._is_forked and (team := torch_team()) is not None:
            team.run(function, arguments, wanted, threads)
            return
        helpers = [self._submit(function, arguments) for _ in range(wanted - 1)]
        try:
            function(*arguments)
        finally:
            for helper in helpers:
                if helper is not None and not helper.cancel():
                    helper.result()

    def _submit(
        self, function: Callable[..., None], arguments: tuple[Any, ...]
    ) -> Future[None] | None:
        wanted = torch.get_num_threads() - 1
        if self._pool is None or self._size < wanted:
            self._pool = ThreadPoolExecutor(wanted, thread_name_prefix="lamina")
            self._size = wanted
        try:
            return self._pool.submit(function, *arguments)
        except RuntimeError:  # the interpreter is going down, and takes no new work
            return None


WORKERS = Workers()

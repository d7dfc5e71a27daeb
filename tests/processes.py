"""Starting a few processes on one machine, for tests: they talk over gloo and never hang."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# All launches of a test run fork from one server that has imported what takes long: otherwise each
# process needs five seconds of a core for torch and for what DDP imports when it wraps.
multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "lamina"])


def run_processes(work: Callable[[int, str], None], folder: Path, count: int = 2, limit: int = 120):
    """Call `work(rank, folder)` in `count` new processes; fails after `limit` seconds."""
    context = torch.multiprocessing.start_processes(
        _work_and_end, args=(work, str(folder)), nprocs=count, join=False, start_method="forkserver"
    )
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"the processes took more than {limit} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def free_port() -> int:
    """Return a port of this machine that nobody uses at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _work_and_end(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    """Do the work, then end at once; an exception goes to the process that started this one.

    The interpreter is not taken down: a thread of gloo that lets go of its last tensor
    meanwhile asks for the lock of an interpreter that is gone, and torch aborts
    (pytorch issue 190489), seldom and after all work is done.
    """
    work(rank, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def join_group(rank: int, folder: str, count: int = 2, limit: int = 60) -> None:
    """Make this process one of `count`; what waits longer than `limit` seconds fails."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=limit),
    )


def leave_group() -> None:
    """Wait for the others, so that none loses the one that serves them, and end."""
    torch.distributed.barrier()
    end_group()


#: groups that are over; see `end_group`
_ENDED: list[object] = []


_destroy = torch.distributed.destroy_process_group


def end_group() -> None:
    """End the group of this process, and keep what is left of it; for `destroy_process_group`.

    Its destructor waits for a thread of gloo, which may be waiting for the interpreter's lock to
    let go of a tensor. Where the reducer of a DDP model is the last to hold the group, that lock is
    held meanwhile, and both wait for ever.
    """
    _ENDED.append(torch.distributed.group.WORLD)
    _destroy()

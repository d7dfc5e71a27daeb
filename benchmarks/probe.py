"""The first step of a candidate and its memory, each in a new process.

    python -m benchmarks.probe MiniLM AdamW clip+step "lamina plan"

prints them as JSON. `probe_all` runs every candidate twice: with empty caches for compiled code,
then with the caches that the first time filled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .candidates import candidates
from .cases import CLIP_STEP
from .memory import profile_step
from .shapes import SHAPES
from .tensors import Tensors

ROOT = Path(__file__).parents[1]
#: where compilers keep what they compiled
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "XDG_CACHE_HOME")
#: seconds that one process may take
LIMIT = 300


def probe(shapes: str, algorithm: str, what: str, name: str) -> dict[str, Any]:
    """Measure one candidate in this process, which should be a new one."""
    tensors = Tensors(SHAPES[shapes]())
    before = _peak_resident()
    start = time.perf_counter()
    built = candidates(algorithm)[name].build(tensors, 1, what == CLIP_STEP)
    spent = time.perf_counter() - start
    tensors.give(built.params)
    start = time.perf_counter()
    built.step()
    spent += time.perf_counter() - start
    for _ in range(3):
        tensors.give(built.params)
        built.step()
    resident = _peak_resident()
    tensors.give(built.params)
    return {
        "first_ms": round(1e3 * spent, 1),
        "peak_resident_bytes": _rise(before, resident),
        "step": profile_step(built.step),
        "kernels": built.kernels(),
    }


def probe_all(
    names: Sequence[str], shapes: str = "MiniLM", algorithm: str = "AdamW", what: str = CLIP_STEP
) -> dict[str, Any]:
    """Every candidate in two new processes, one after the other."""
    rows: dict[str, Any] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (_in_process(folder, shapes, algorithm, what, name) for _ in range(2))
        rows[name] = {**warm, "first_ms": warm.get("first_ms"), "cold_ms": cold.get("first_ms")}
        if "failed" in cold:
            rows[name]["failed"] = cold["failed"]
    return {"title": f"{shapes}, {algorithm}, {what}, groups: 1", "rows": rows}


def _in_process(caches: str, *arguments: str) -> dict[str, Any]:
    """What the command prints, or under "failed" why it did not."""
    environment = {**os.environ, **{name: f"{caches}/{name.lower()}" for name in CACHES}}
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.probe", *arguments, "--threads", threads]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LIMIT} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["without a message"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _rise(before: int | None, after: int | None) -> int | None:
    """By how much the peak rose; None where the system does not count it: weights need memory."""
    return after - before if before and after and after > before else None


def _peak_resident() -> int | None:
    """The most memory that this process had so far, in bytes; None where it cannot be known.

    On Linux `ru_maxrss` begins as that of the process that started this one, so it is the last
    resort there.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("shapes", choices=SHAPES)
    parser.add_argument("algorithm")
    parser.add_argument("what")
    parser.add_argument("candidate")
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    print(json.dumps(probe(given.shapes, given.algorithm, given.what, given.candidate)))


if __name__ == "__main__":
    main()

"""What one step allocates, and how many operators of torch it calls."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def profile_step(step: Callable[[], object]) -> dict[str, Any]:
    """Profile one step.

    Returns:
        operators: calls of torch's operators, without those that operators make
        tensors: how many times memory of a tensor was allocated, by torch
        allocated_bytes: all of these together
        peak_bytes: the most of them at one time, beyond what was there before the step
        python_peak_bytes: the same of Python's objects and of NumPy's arrays
    """
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        step()
    kineto: Any = profiled.profiler
    events = [each for each in kineto.kineto_results.events() if each.name() == "[memory]"]
    sizes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    outer = [
        event
        for event in profiled.events()
        if _is_operator(event)
        and not (event.cpu_parent is not None and _is_operator(event.cpu_parent))
    ]
    return {
        "operators": len(outer),
        "tensors": sum(size > 0 for size in sizes),
        "allocated_bytes": sum(size for size in sizes if size > 0),
        "peak_bytes": _peak(sizes),
        "python_peak_bytes": _python_peak(step),
    }


def _is_operator(event: Any) -> bool:
    return str(event.name).startswith("aten::")


def _peak(sizes: list[int]) -> int:
    now = most = 0
    for size in sizes:
        now += size
        most = max(most, now)
    return most


def _python_peak(step: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()

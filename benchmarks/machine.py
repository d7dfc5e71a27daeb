"""What a figure depends on beside the code: the processor, and how busy it was."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def about_machine() -> dict[str, str]:
    """Return the processor, Python, and the load of the last minute where it can be known."""
    cores = os.cpu_count()
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "python": platform.python_version(),
        "processor": f"{_processor()}, {cores} cores",
        "load at the start": load,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

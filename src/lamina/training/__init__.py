"""The engine behind `lamina run`: a task, a plan, a run folder.

    load_task -> prepare_run -> Session.train -> Result

Devices, mixed precision and processes are Accelerate's; there is no scheduler, since the plan moves
everything.
"""

from __future__ import annotations

from .engine import fit, prepare_run
from .load import load_task
from .result import Result
from .session import Session
from .task import Data, Task

__all__ = ["Data", "Result", "Session", "Task", "fit", "load_task", "prepare_run"]

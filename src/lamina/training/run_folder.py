"""The folder of a run: what was meant, what happened, and the result.

plan.toml       the plan (plan.py.txt, its Python form, if TOML cannot hold it)
run.json        seed, length, versions, and how the run ended
metrics.jsonl   a line for each step, event and validation
lr.png          the lr of every group over the run, as planned
checkpoint.pt   model and optimizer state
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import LaminaError, PlanError
from ..plan import Plan
from ..preview import Preview
from .recorder import atomic, told

FORMAT = 1


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something; it is not made yet."""
    if folder.exists() and not folder.is_dir():
        raise LaminaError(f"{folder}: is a file; choose another folder for the run with --out.")
    if folder.is_dir() and any(folder.iterdir()):
        raise LaminaError(
            f"{folder}: the folder is not empty, and a run overwrites nothing; choose another "
            "with --out, or remove it."
        )


class RunFolder:
    """Makes the folder and writes its files, each whole or not at all.

    Args:
        folder: where; by default `runs/<task>-<time>`, with a number if that is taken.
        task: the name of the task.
    """

    def __init__(self, folder: Path | None, task: str) -> None:
        self.saved: list[str] = []
        if folder is not None:
            check_free(folder)
            with told(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self.path = folder
            return
        plain = re.sub(r"[^\w-]+", "_", task)
        name = f"{plain}-{datetime.now():%Y%m%d-%H%M%S}"
        for number in range(1, 1000):
            self.path = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                with told(self.path):
                    self.path.mkdir(parents=True)
                return
            except LaminaError as error:
                if not isinstance(error.__cause__, FileExistsError):
                    raise
        raise LaminaError(f"runs/{name}: a thousand runs began in this second; use --out.")

    def begin(self, plan: Plan, preview: Preview, about: dict[str, Any]) -> None:
        """Write what is known before the first step."""
        self._about = {**about, "versions": versions(), "started": _now(), "status": "running"}
        try:
            self._text("plan.toml", plan.to_toml())
        except PlanError:  # functions, or an optimizer without a registered name
            self._text("plan.py.txt", f"{plan!r}\n")
        self._text("run.json", json.dumps(self._about, indent=1, ensure_ascii=False) + "\n")
        self.picture(preview)

    def picture(self, preview: Preview) -> None:
        """Draw the lr of every group."""
        target = self.path / "lr.png"
        temporary = self.path / ".lr.png"
        with told(target):
            try:
                preview.plot(temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        self.saved.append("lr.png")

    def checkpoint(self, **content: Any) -> None:
        """Write tensors and plain values, for `torch.load(path, weights_only=True)`."""
        with atomic(self.path / "checkpoint.pt") as file:
            torch.save({"format": FORMAT, **content}, file)
        self.saved.append("checkpoint.pt")

    def end(self, status: str, **found: Any) -> None:
        """Note how the run ended, and with what."""
        self._about |= {"status": status, "ended": _now(), **found}
        self._text("run.json", json.dumps(self._about, indent=1, ensure_ascii=False) + "\n")

    def _text(self, name: str, text: str) -> None:
        with atomic(self.path / name) as file:
            file.write(text.encode())
        if name not in self.saved:
            self.saved.append(name)


def versions() -> dict[str, str]:
    """What ran, to be able to run it again."""
    found = {"lamina": own_version(), "python": platform.python_version()}
    for package in ("torch", "accelerate", "numpy"):
        found[package] = metadata.version(package)
    return {**found, "platform": sys.platform}


def own_version() -> str:
    """The version of lamina, also when it runs from its source."""
    return str(importlib.import_module("lamina").__version__)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")

"""The folder of a run: what was meant, what happened, and the result.

plan.toml       the plan (plan.py.txt, its Python form, if TOML cannot hold it)
run.json        seed, length, versions, and how the run ended
planned.json    the lr of every group and the parameters of the model, as planned
metrics.jsonl   a line for each step, event and validation
lr.png          the lr of every group over the run, as planned
checkpoints/    the last states of model and optimizer and the best (see lamina.checkpoint)
"""

from __future__ import annotations

import importlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any, cast

import torch

from ..errors import LaminaError, PlanError, StateError, version_of
from ..files.atomic import atomic, remove_leftovers, wrap_read_errors, wrap_write_errors
from ..files.plain import check_values
from ..plan.plan import Plan
from ..preview import Preview
from .folder_lock import FILES as LOCK_FILES
from .folder_lock import now

PLAN, PLAN_AS_PYTHON, ABOUT, METRICS = "plan.toml", "plan.py.txt", "run.json", "metrics.jsonl"
PICTURE, PLANNED = "lr.png", "planned.json"
#: what a run writes beside its checkpoints; only one of the forms of the plan
FILES = (PLAN, PLAN_AS_PYTHON, ABOUT, PICTURE, PLANNED, METRICS)
#: where run.json holds a plan until that is in its own file
PENDING = "plan"


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something beside the lock of a run."""
    with wrap_write_errors(folder):
        is_folder = folder.is_dir()
        holds = is_folder and any(path.name not in LOCK_FILES for path in folder.iterdir())
        if folder.exists() and not is_folder:
            raise LaminaError(f"{folder}: is a file; choose another folder for the run with --out.")
    if holds:
        raise LaminaError(
            f"{folder}: the folder is not empty, and a run overwrites nothing; choose another "
            "with --out, or remove it."
        )


def make_folder(folder: Path | None, task: str) -> Path:
    """Make the folder of a new run.

    Args:
        folder: where; by default `runs/<task>-<time>`, with a number if that is taken.
        task: the name of the task.
    """
    if folder is not None:
        check_free(folder)
        with wrap_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder
    plain = re.sub(r"[^\w-]+", "_", task)
    name = f"{plain}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1, 1000):
        path = Path("runs") / (name if number == 1 else f"{name}-{number}")
        with wrap_write_errors(path), suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise LaminaError(f"runs/{name}: a thousand runs began in this second; use --out.")


class RunFolder:
    """Writes the files of a run, each whole or not at all.

    Args:
        path: the folder; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about: dict[str, Any] = {}

    def begin(self, plan: Plan, preview: Preview, about: dict[str, Any]) -> None:
        """Write what is known before the first step."""
        self._about = {**about, "versions": versions(), "started": now(), "status": "running"}
        self._write(plan, preview)

    def resume(self, plan: Plan, preview: Preview, about: dict[str, Any], **seen: Any) -> None:
        """Note that the run goes on, how, and from where; remove files that a kill left unfinished.

        `run.json` is written first and says all of it, also the plan until that has its own file:
        a kill leaves everything that was asked for, or nothing of it.
        """
        with wrap_write_errors(self.path):
            for name in FILES:
                remove_leftovers(self.path / name)
        before = read_about(self.path)
        for name in ("ended", "baseline", PENDING):
            before.pop(name, None)
        earlier = before.get("resumed", [])
        if not isinstance(earlier, list):
            earlier = [earlier]
        noted = [*earlier, {"at": now(), **seen, "versions": versions()}]
        self._about = {**before, **about, "status": "running", "resumed": noted}
        text, name = plan_text(plan)
        self._text(ABOUT, _json({**self._about, PENDING: {name: text}}))
        self._write(plan, preview)

    def _write(self, plan: Plan, preview: Preview) -> None:
        text, name = plan_text(plan)
        other = self.path / (PLAN if name == PLAN_AS_PYTHON else PLAN_AS_PYTHON)
        self._text(name, text)
        with wrap_write_errors(other):
            other.unlink(missing_ok=True)
        self._text(ABOUT, _json(self._about))
        preview.planned().save(self.path / PLANNED)
        self.picture(preview)

    @contextmanager
    def closing(self, found: Callable[[], dict[str, Any]]) -> Iterator[None]:
        """Let no run that ended, however it did, be on record as one that still runs.

        Args:
            found: gives what came of the run so far.
        """
        try:
            yield
        except BaseException as error:
            if self._about["status"] == "running":
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                with suppress(LaminaError):  # the error that ended it is told
                    self.end(status, **found())
            raise

    def picture(self, preview: Preview) -> None:
        """Draw the lr of every group."""
        with atomic(self.path / PICTURE) as file:
            # As `plot` does with a path.
            preview.plot().savefig(cast("IO[bytes]", file), dpi=160)

    def end(self, status: str, **found: Any) -> None:
        """Note how the run ended, and with what."""
        self._about |= {"status": status, "ended": now(), **found}
        self._text(ABOUT, _json(self._about))

    def _text(self, name: str, text: str) -> None:
        with atomic(self.path / name) as file:
            file.write(text.encode())


def plan_text(plan: Plan) -> tuple[str, str]:
    """Return a plan as TOML, or as Python where TOML cannot hold it; and the name of its file."""
    try:
        return plan.to_toml(), PLAN
    except PlanError:  # functions, or an optimizer without a registered name
        return f"{plan!r}\n", PLAN_AS_PYTHON


def read_about(folder: Path) -> dict[str, Any]:
    """Return what `run.json` says.

    Raises:
        StateError: if the folder is not that of a run.
    """
    with wrap_read_errors(folder):
        is_folder, is_there = folder.is_dir(), folder.exists()
    if not is_folder:
        what = "is a file" if is_there else "there is no such folder"
        raise StateError(f"{folder}: {what}; give the folder of a run, such as runs/reviews-....")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StateError(
            f"{folder}: this is not the folder of a run: its {ABOUT} cannot be read ({error})."
        ) from error
    if not isinstance(about, dict):
        raise StateError(f"{folder}: this is not the folder of a run: {ABOUT} holds no object.")
    check_values(about, str(folder / ABOUT))
    return about


def _json(about: dict[str, Any]) -> str:
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """Return what ran, to be able to run it again."""
    found = {"lamina": own_version(), "python": platform.python_version()}
    found["torch"] = str(torch.__version__)  # with the build, such as +cpu or +cu130
    for package in ("accelerate", "numpy"):
        found[package] = version_of(package)
    return {**found, "platform": sys.platform}


def own_version() -> str:
    """Return the version of lamina, also when it runs from its source."""
    return str(importlib.import_module("lamina").__version__)

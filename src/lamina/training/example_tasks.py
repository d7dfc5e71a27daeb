"""The example tasks that stand beside the source in a clone; an installed lamina has none."""

from __future__ import annotations

import tomllib
from pathlib import Path

#: the task of `lamina run` without a task
DEFAULT = "reviews"
_NAMES = ("reviews", "digits")
_SOURCE = Path(__file__).parents[2]


def example_tasks(source: Path = _SOURCE) -> dict[str, str]:
    """Return the files of the example tasks by name; none if the source is in no clone of lamina.

    Another project may have lamina in its own `src` folder, and files of the same names; those
    are not ours to run.

    Args:
        source: the folder that the package `lamina` lies in, `src` in a clone.
    """
    root = source.parent
    try:
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        is_clone = tomllib.loads(text)["project"]["name"] == "lamina"
    except (OSError, ValueError, KeyError, TypeError):
        is_clone = False
    files = {name: root / "examples" / "tasks" / f"{name}.py" for name in _NAMES}
    return {name: str(file) for name, file in files.items() if is_clone and file.is_file()}

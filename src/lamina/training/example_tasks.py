"""The example tasks that stand beside the source in a clone; an installed lamina has none."""

from __future__ import annotations

from pathlib import Path

#: the task of `lamina run` without a task
DEFAULT = "reviews"
_NAMES = ("reviews", "digits")
_SOURCE = Path(__file__).parents[2]


def example_tasks(source: Path = _SOURCE) -> dict[str, str]:
    """Return the files of the example tasks by name; none if there is no clone around the source.

    Args:
        source: the folder that the package `lamina` lies in, `src` in a clone.
    """
    folder = source.parent / "examples" / "tasks"
    if source.name != "src":
        return {}
    files = {name: folder / f"{name}.py" for name in _NAMES}
    return {name: str(file) for name, file in files.items() if file.is_file()}

"""The setting `reuse` of a run: off, on, or on with options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import LaminaError
from ..reuse.options import check_options, options_of


@dataclass(frozen=True)
class ReuseSettings:
    """How a run reuses the outputs of frozen modules; the arguments of `lamina.reuse`.

    True alone keeps the options of the task, or of the run that is resumed. `folder` is True for
    the folder of the run, False for memory, or a path, whose files other runs with the same weights
    find again.
    """

    space: int | str = "2 GB"
    folder: bool | str = True
    debug: float = 0.0
    preprocessing: str = ""
    store_dtype: str | None = None

    def __post_init__(self) -> None:
        check_options(self.space, self.debug, self.preprocessing, self.store_dtype)
        if not isinstance(self.store_dtype, (str, type(None))):  # it is written to run.json
            raise LaminaError(
                f"reuse: store_dtype={self.store_dtype!r} was given; expected the name 'bfloat16'."
            )
        if not isinstance(self.folder, (bool, str)) or self.folder == "":
            raise LaminaError(
                f"reuse: folder={self.folder!r} was given; expected True for the folder of the "
                "run, False for memory, or the path of a folder."
            )

    @classmethod
    def of(cls, given: Any) -> ReuseSettings | None:
        """Return the settings that True, False or a mapping of options stands for.

        Args:
            given: the value of `reuse`.

        Returns:
            None if nothing is reused.

        Raises:
            LaminaError: if it is something else, or an option is unknown or wrong.

        Example:
            >>> ReuseSettings.of({"space": "1 GB"})
            ReuseSettings(space='1 GB', folder=True, debug=0.0, preprocessing='', store_dtype=None)
        """
        options = options_of(given, _NAMES)
        return None if options is None else cls(**options)


_NAMES = tuple(field.name for field in fields(ReuseSettings))


def with_options(own: Any, asked: Any) -> Any:
    """Return the setting asked for; a plain True keeps the options that are there.

    Args:
        own: what the task or the saved run says.
        asked: what is asked for now; None for nothing.
    """
    return own if asked is None or (asked is True and own) else asked

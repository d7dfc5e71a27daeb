"""The options of reuse, and what they may be."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._util.numbers import is_number, is_whole
from .._util.text import quoted
from ..errors import PlanError, did_you_mean

_SETTINGS = ("space", "folder", "debug", "preprocessing", "store_dtype")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

#: what outputs may be rounded to where they are stored; float16 would make large ones infinite
_NARROW = {"bfloat16": torch.bfloat16}


def check_options(
    space: Any, debug: Any, preprocessing: Any, store_dtype: Any, folder: Any = None
) -> None:
    """Raise `PlanError` for an option of the wrong type or out of its range.

    Args:
        space: how much may be stored.
        debug: the share of replayed calls that are compared.
        preprocessing: how inputs were prepared.
        store_dtype: what outputs are rounded to.
        folder: where files are made.
    """
    if folder is not None and not isinstance(folder, (str, os.PathLike)):
        raise PlanError(f"reuse: folder={folder!r} was given; expected the path of a folder.")
    parse_space(space)
    parse_dtype(store_dtype)
    if not is_number(debug) or not 0 <= debug <= 1:
        raise PlanError(f"reuse: debug={debug!r} was given; expected a share from 0 to 1.")
    if not isinstance(preprocessing, str):
        raise PlanError(f"reuse: preprocessing={preprocessing!r} was given; expected a text.")


def options_of(given: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """Return the options that a `reuse=` stands for; None for False.

    Args:
        given: True, False, or a mapping of options.
        names: those that there are.

    Raises:
        PlanError: if it is something else, or an option is unknown.

    Example:
        >>> options_of(True, ["space"]), options_of({"space": 10}, ["space"])
        ({}, {'space': 10})
    """
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, Mapping):
        raise PlanError(
            f"reuse={given!r} was given; expected True, False, or options such as "
            "{'space': '1 GB'}."
        )
    for name in given:
        if name not in names:
            raise PlanError(
                f"reuse has the unknown option {name!r}; expected some of {quoted(names, 5)}."
                f"{did_you_mean(str(name), names)}"
            )
    return dict(given)


def reuse_settings(given: Any) -> dict[str, Any] | None:
    """Return the settings that a `reuse=` stands for, checked before there is a model.

    Args:
        given: True, False, or a mapping of arguments of `lamina.reuse`.

    Returns:
        The arguments; None for False.

    Raises:
        PlanError: if it is something else, or an argument is unknown or not what is expected.

    Example:
        >>> reuse_settings(True), reuse_settings({"space": "1 GB"}), reuse_settings(False)
        ({}, {'space': '1 GB'}, None)
    """
    settings = options_of(given, _SETTINGS)
    if settings is None:
        return None
    check_options(
        settings.get("space", 0),
        settings.get("debug", 0.0),
        settings.get("preprocessing", ""),
        settings.get("store_dtype"),
        settings.get("folder"),
    )
    return settings


def parse_space(given: int | str) -> int:
    """Return a number of bytes.

    Raises:
        PlanError: if it cannot be read.

    Example:
        >>> parse_space("1.5 GB"), parse_space("2 MiB"), parse_space(10)
        (1500000000, 2097152, 10)
    """
    if is_whole(given) and given >= 0:
        return int(given)
    match = re.fullmatch(
        r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?i?B)\s*", str(given), re.IGNORECASE
    )
    if isinstance(given, str) and match:
        return int(float(match[1]) * _UNITS[match[2].upper()])
    raise PlanError(
        f"reuse: space={given!r} was given; expected bytes, or a text such as '500 MB' or '2 GiB'."
    )


def parse_dtype(given: Any) -> torch.dtype | None:
    """Return the dtype that floating-point outputs are rounded to; None to keep their own.

    Raises:
        PlanError: if it is none of those.

    Example:
        >>> parse_dtype("bfloat16"), parse_dtype(None)
        (torch.bfloat16, None)
    """
    name = str(given).removeprefix("torch.") if isinstance(given, torch.dtype) else given
    if name is None:
        return None
    if isinstance(name, str) and name in _NARROW:
        return _NARROW[name]
    raise PlanError(
        f"reuse: store_dtype={given!r} was given; expected 'bfloat16', to store less with "
        "other bits, or None to store outputs as they are."
    )

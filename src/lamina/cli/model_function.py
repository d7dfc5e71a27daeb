"""Models named on the command line as `package:function`."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from ..errors import LaminaError, TaskError, did_you_mean, printable
from ..training.task import in_one_line

_FORM = "such as --model my_models:build, for the function build() of my_models.py"


def model_of(text: str) -> nn.Module:
    """Import a function or class and return the model that it makes.

    Modules of the folder at hand are found, as `python -m` finds them.

    Args:
        text: the name of a module and of a function in it, joined by a colon.

    Raises:
        TaskError: if there is no such function, it fails, or it makes no model.
    """
    shown = f"--model {printable(text)}"
    module_name, colon, path = text.partition(":")
    words = [*module_name.split("."), *path.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        raise TaskError(f"{shown}: expected the name of a module and of a function, {_FORM}.")
    if module_name.endswith(".py"):
        raise TaskError(
            f"{shown}: a module is named without .py: --model {module_name.removesuffix('.py')}:"
            f"{path}"
        )
    found: Any = _imported(module_name, shown)
    for word in path.split("."):
        if not hasattr(found, word):
            near = did_you_mean(word, [name for name in vars(found) if not name.startswith("_")])
            raise TaskError(f"{shown}: {module_name} has no {word!r}.{near}")
        found = getattr(found, word)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise TaskError(f"{shown}: it is no function, but {type(found).__name__}; {_FORM}.")
    try:
        model = found()
    except LaminaError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(
            f"{shown}: it failed with {in_one_line(error)}. It is called without arguments and "
            "returns a torch.nn.Module."
        ) from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"{shown}: it returned {type(model).__name__}; expected a torch.nn.Module.")
    return model


def _imported(name: str, shown: str) -> Any:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except LaminaError:
        raise
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError)
        fix = "Check its name, and run this where it can be imported." if missing else "Correct it."
        raise TaskError(
            f"{shown}: the module {name} cannot be imported: {in_one_line(error)}. {fix}"
        ) from error

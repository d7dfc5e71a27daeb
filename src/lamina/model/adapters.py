"""Names in models under PEFT, whose wrappers and adapters put words into the names of the base.

Source: `peft/tuners`, version 0.21: `base_model.model.` before every name, `base_layer` inside a
layer with adapters, `modules_to_save.<adapter>` and `original_module` for whole modules, and the
name of the adapter behind each of its matrices, as in `lora_A.<adapter>`. Methods that train a
prompt put `base_model.` before the names of the base, and have a `prompt_encoder.<adapter>` beside.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from torch import nn

_PREFIX = "base_model.model."
_IN_LAYERS = ("base_layer", "original_module")
_SAVED = "modules_to_save"
#: how the matrices and vectors of PEFT's methods begin
_MATRIX = re.compile(
    r"(lora|ia3|hada|lokr|oft|boft|hra|vera|vblora|fourierft|randlora|bone|shira|trainable_tokens)_"
)


def has_adapters(names: Iterable[str]) -> bool:
    """Return whether some of these names are those of PEFT's adapters."""
    names = list(names)
    return any(is_adapter(name) for name in names) or bool(prefix_of(names))


def prefix_of(names: Iterable[str]) -> str:
    """Return what is before the names of a base under a trained prompt, or ""."""
    first = {name.partition(".")[0] for name in names}
    return "base_model." if {"base_model", "prompt_encoder"} <= first else ""


def merged_layers(model: nn.Module) -> tuple[str, ...]:
    """Return the layers whose adapters are merged into the base, which gives them no gradient."""
    return tuple(
        path
        for path, module in model.named_modules()
        if getattr(module, "merged_adapters", None) and hasattr(module, "unmerge")
    )


def is_adapter(name: str) -> bool:
    """Return whether a parameter is an adapter, or the trained copy of a module."""
    return any(map(_names_next, name.split(".")))


@lru_cache(maxsize=100_000)
def names_in_base(name: str) -> tuple[str, ...]:
    """Return a name as it is, and without what PEFT has added, with and without the adapter's."""
    if _PREFIX not in name and not is_adapter(name):
        return (name,)
    short = name.replace(_PREFIX, "", 1)
    parts = [part for part in short.split(".") if part not in _IN_LAYERS]
    before = ["", *parts]
    nameless = [part for part, last in zip(parts, before, strict=False) if not _names_next(last)]
    plain = [part for part in nameless if part != _SAVED]
    return tuple(dict.fromkeys((name, short, ".".join(parts), ".".join(plain))))


def _names_next(part: str) -> bool:
    """Return whether the word behind this one is the name of an adapter."""
    return part == _SAVED or bool(_MATRIX.match(part))

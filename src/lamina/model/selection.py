"""Parameters of an optimizer, chosen by pattern or as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import PatternError, PlanError, did_you_mean
from .parameters import ParamInfo
from .patterns import compile_pattern

Group = dict[str, Any]
Place = tuple[Group, int]


def described(group: Group, place: int) -> ParamInfo:
    """Return what patterns can see of a parameter that only its group knows: name and shape."""
    param, name = group["params"][place], group["param_names"][place]
    return ParamInfo(
        name, (name,), tuple(param.shape), str(param.dtype), frozenset(), param.requires_grad
    )


def select_parameters(
    groups: Sequence[Group],
    which: Sequence[str | torch.Tensor],
    describe: Callable[[Group, int], ParamInfo] = described,
) -> list[Place]:
    """Return the parameters that patterns and tensors choose, each as its group and place there.

    Args:
        groups: the parameter groups.
        which: patterns over names, or the tensors themselves.
        describe: gives what patterns see of a parameter.

    Raises:
        PlanError: for nothing at all, a tensor that is in no group, a pattern that matches nothing,
            or any pattern where the groups have no names.
    """
    if not which:
        raise PlanError(
            "no parameter was given; name them, such as 'embeddings.weight' or '*' for all."
        )
    places = [(group, place) for group in groups for place in range(len(group["params"]))]
    chosen: dict[int, Place] = {}
    for each in which:
        if isinstance(each, str):
            found = _matching(places, each, describe)
        elif isinstance(each, torch.Tensor):
            found = [(group, place) for group, place in places if group["params"][place] is each]
            if not found:
                raise PlanError(
                    f"a tensor of shape {tuple(each.shape)} was given, which is in no parameter "
                    "group; pass the Parameter that the optimizer holds."
                )
        else:
            raise PlanError(
                f"{each!r} was given; expected the name of a parameter, a pattern or a tensor."
            )
        chosen.update((id(group["params"][place]), (group, place)) for group, place in found)
    return list(chosen.values())


def _matching(
    places: Sequence[Place], text: str, describe: Callable[[Group, int], ParamInfo]
) -> list[Place]:
    named = [(group, place) for group, place in places if group.get("param_names")]
    if not named:
        raise PlanError(
            f"{text!r} was given, but the parameters of this optimizer have no names; pass the "
            "tensors, or build it with model.named_parameters()."
        )
    pattern = compile_pattern(text)
    infos = [(describe(group, place), (group, place)) for group, place in named]
    found = [where for info, where in infos if pattern.matches(info)]
    if not found:
        names = [name for info, _ in infos for name in info.names]
        raise PatternError(
            f"{text!r} matches none of the {len(infos)} parameters.{did_you_mean(text, names)}"
        )
    return found

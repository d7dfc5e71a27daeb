"""Colours of groups, legible on a light and on a dark page."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

from ..preview.curves import family

#: told apart also by colour-blind readers (Okabe and Ito, without black and yellow), on white and
#: on dark ground
_DISTINCT = ("#e0602a", "#2f87d6", "#12a37a", "#cf6fae", "#d99a1c", "#5bb0e8", "#8a7de0")
#: the same beside a ramp, which is blue and green: warm colours first
_BESIDE = ("#e0602a", "#cf6fae", "#d99a1c", "#b0563f", "#8a7de0", "#12a37a", "#2f87d6")
#: hue and lightness (from, to) of layers of one rule, from the lowest to the top
_RAMPS = (
    ((0.47, 0.62), (0.72, 0.42)),
    ((0.90, 0.78), (0.50, 0.70)),
    ((0.12, 0.04), (0.45, 0.60)),
    ((0.33, 0.25), (0.40, 0.60)),
)
FROZEN = "#8b949e"
#: anchors of a scale from low to high whose lightness rises evenly
_SCALE = ("#4a3f9f", "#3566b8", "#1f8aa8", "#1fa587", "#67bf5c", "#b9cf3b", "#f2d02c")


def group_colours(groups: Sequence[str], trains: Sequence[bool]) -> dict[str, str]:
    """Return a colour for each group.

    Groups whose names differ only in numbers (the layers of one rule) share a ramp; what never
    trains is grey.
    """
    families: dict[str, list[str]] = {}
    found = {}
    for group, trained in zip(groups, trains, strict=True):
        if trained:
            families.setdefault(_layers(group), []).append(group)
        else:
            found[group] = FROZEN
    ramps = [members for members in families.values() if len(members) > 2]
    single = [group for members in families.values() if len(members) <= 2 for group in members]
    if len(single) > len(_DISTINCT):
        ramps, single = [*ramps, single], []
    found |= dict(zip(single, _BESIDE if ramps else _DISTINCT, strict=False))
    for place, members in enumerate(ramps):
        found |= _ramp(members, *_RAMPS[place % len(_RAMPS)])
    return {group: found[group] for group in groups}


def _layers(group: str) -> str:
    """Return the family of a group; of several patterns in one name, that of the first."""
    return family(group.split(",")[0])


def _ramp(
    members: Sequence[str], hues: tuple[float, float], lights: tuple[float, float]
) -> dict[str, str]:
    found = {}
    for place, group in enumerate(members):
        share = place / max(1, len(members) - 1)
        hue = hues[0] + share * (hues[1] - hues[0])
        light = lights[0] + share * (lights[1] - lights[0])
        found[group] = _hex(colorsys.hls_to_rgb(hue, light, 0.62))
    return found


def lr_colour(lr: float | None, low: float, high: float) -> str:
    """Return the colour of a learning rate between two others, by its logarithm; grey for none."""
    if not lr or lr <= 0 or not math.isfinite(lr):
        return FROZEN
    share = (
        1.0 if high <= low else (math.log(lr) - math.log(low)) / (math.log(high) - math.log(low))
    )
    place = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    index = min(int(place), len(_SCALE) - 2)
    rest = place - index
    pairs = zip(_rgb(_SCALE[index]), _rgb(_SCALE[index + 1]), strict=True)
    return _hex([old + rest * (new - old) for old, new in pairs])


def scale_css() -> str:
    """Return the scale of `lr_colour` as the colours of a CSS gradient."""
    return ",".join(_SCALE)


def _rgb(colour: str) -> list[float]:
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def _hex(parts: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)

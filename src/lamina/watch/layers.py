"""Updates layer by layer, where the groups of an optimizer are too wide to tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .measure import Measured

#: rows that are still legible in a heat map
_MOST = 40


@dataclass
class Layers:
    """The layers of the parameters of one optimizer; found anew where parameters come in."""

    _of: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def ratios(self, rows: Sequence[Measured], names: Iterable[str]) -> dict[str, float]:
        """Return update over weight of each layer in a step, as metrics of a record.

        Args:
            rows: what was measured in the step.
            names: all parameters.
        """
        known = list(names)
        if len(known) != self._count:
            self._of, self._count = layers_of(known), len(known)
        sums: dict[str, tuple[float, float]] = {}
        for row in rows:
            layer = self._of.get(row.name)
            if layer is not None:
                update, weight = sums.get(layer, (0.0, 0.0))
                sums[layer] = math.hypot(update, row.update), math.hypot(weight, row.weight)
        return {
            f"ratio/{layer}": update / weight for layer, (update, weight) in sums.items() if weight
        }


def layers_of(names: Iterable[str], most: int = _MOST) -> dict[str, str]:
    """Return the layer of each parameter: its module, or where these are many, what holds them.

    Args:
        names: full names of parameters.
        most: how many layers there may be.

    Returns:
        The layer by the name of the parameter; empty if there is but one, or if they are many at
        every depth.

    Example:
        >>> layers_of(["encoder.0.weight", "encoder.0.bias", "head.weight"])
        {'encoder.0.weight': 'encoder.0', 'encoder.0.bias': 'encoder.0', 'head.weight': 'head'}
    """
    paths = {name: name.split(".")[:-1] or [name] for name in names}
    for length in range(max(map(len, paths.values()), default=0), 0, -1):
        found = {name: ".".join(path[:length]) for name, path in paths.items()}
        if len(set(found.values())) <= most:
            return found if len(set(found.values())) > 1 else {}
    return {}

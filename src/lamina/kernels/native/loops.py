"""Which compiled loops carry out an algorithm, and which of its settings they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...algorithms.adam import Adam, AdamW
from ...algorithms.lamb import LAMB
from ...algorithms.lars import LARS
from ...algorithms.layer_adaptive import LayerAdaptiveAdam
from ...algorithms.rmsprop import RMSprop
from ...algorithms.sgd import SGD

Numbers = tuple[Any, ...]


class Loops(NamedTuple):
    """The compiled functions of an algorithm, by name.

    Of a rule that needs something of whole tensors, `update` goes with `update`_sums and
    `update`_factors. `settings` are hyperparameters; `numbers` puts them in the order in which the
    loops read them, after the factor of the gradients.
    """

    update: str
    #: how many sums a chunk has, 0 for a rule that goes by elements
    sums: int
    settings: tuple[str, ...]
    numbers: Callable[[Sequence[Any]], Numbers]
    #: what a state tensor depends on: it takes part while this hyperparameter is not 0
    needs: dict[str, str]
    #: hyperparameters that choose a form of the loop, beside those in `needs`
    options: tuple[str, ...] = ()


def _adam(values: Sequence[Any]) -> Numbers:
    lr, (beta1, beta2), eps, decay, decoupled = values
    coupled, apart = (0.0, decay) if decoupled else (decay, 0.0)
    return lr, beta1, beta2, eps, coupled, apart


def _lamb(values: Sequence[Any]) -> Numbers:
    lr, (beta1, beta2), eps, decay = values
    return lr, beta1, beta2, eps, decay


_ADAM = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")
_MAX = {"max_exp_avg_sq": "amsgrad"}
_MOMENTUM = {"momentum_buffer": "momentum"}

LOOPS: dict[type, Loops] = {
    SGD: Loops(
        "sgd", 0, ("lr", "momentum", "dampening", "weight_decay"), tuple, _MOMENTUM, ("nesterov",)
    ),
    RMSprop: Loops(
        "rmsprop",
        0,
        ("lr", "alpha", "eps", "weight_decay", "momentum"),
        tuple,
        {**_MOMENTUM, "grad_avg": "centered"},
    ),
    Adam: Loops("adam", 0, _ADAM, _adam, _MAX),
    AdamW: Loops("adam", 0, _ADAM, _adam, _MAX),
    LARS: Loops(
        "lars",
        2,
        ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"),
        tuple,
        _MOMENTUM,
    ),
    LAMB: Loops("lamb", 2, ("lr", "betas", "eps", "weight_decay"), _lamb, {}),
    LayerAdaptiveAdam: Loops("layer_adaptive", 1, _ADAM, _adam, _MAX),
}

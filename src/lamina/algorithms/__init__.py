"""The optimization methods: one family a file, each rule written once beside its equation."""

from __future__ import annotations

from .adam import Adam, AdamW
from .base import Algorithm, Method
from .lamb import LAMB
from .lars import LARS
from .layer_adaptive import LayerAdaptiveAdam
from .lbfgs import LBFGS
from .muon import Muon
from .rmsprop import RMSprop
from .sgd import SGD

#: the methods that update every parameter by itself
ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        SGD(),
        RMSprop(),
        Adam(),
        AdamW(),
        Muon(),
        LARS(),
        LAMB(),
        LayerAdaptiveAdam(),
    )
}
#: and those that need all parameters at once
METHODS: dict[str, Method] = {**ALGORITHMS, "LBFGS": LBFGS()}

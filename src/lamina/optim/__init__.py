"""`torch.optim` by name, signature and default: change the import, keep the code.

SGD, RMSprop, Adam, AdamW, Muon, LBFGS are lamina's own; so are LARS, LAMB and LayerAdaptiveAdam,
which torch lacks. Torch's others are here unchanged, so that one import is enough.
"""

from __future__ import annotations

from torch.optim import (
    ASGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    Rprop,
    SparseAdam,
    swa_utils,
)

from .._util.compat import swap_in_optimizer_params_and_state
from ..algorithms.registry import register_optimizer
from . import lr_scheduler
from .classes import SGD, Adam, AdamW, RMSprop
from .layerwise import LAMB, LARS, LayerAdaptiveAdam, Muon
from .lbfgs import LBFGS

_OWN = (SGD, RMSprop, Adam, AdamW, Muon, LARS, LAMB, LayerAdaptiveAdam, LBFGS)
_TORCH = (Adadelta, Adafactor, Adagrad, Adamax, ASGD, NAdam, RAdam, Rprop, SparseAdam)
for _each in (*_OWN, *_TORCH):
    register_optimizer(_each.__name__, _each)

__all__ = [
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "LAMB",
    "LARS",
    "LBFGS",
    "LayerAdaptiveAdam",
    "Muon",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
    "SparseAdam",
    "lr_scheduler",
    "register_optimizer",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
]

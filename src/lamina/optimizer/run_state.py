"""What changes while an optimizer runs, kept in objects that are changed in place.

Wrappers of trainers (Lightning's, Fabric's) inherit the optimizer's class but delegate only reads:
an attribute that a method assigned would land in the wrapper, and the optimizer itself would never
see it. So a method assigns to the fields of these objects, and never to the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .._util.notices import Notices
from ..gradients.operations import Operation
from ..resolve.timeline import Values
from ..runtime.ownership import WriteGuard
from ..state.report import LoadReport
from .pending_step import PendingStep


@dataclass(eq=False)
class RunState:
    """What an optimizer under a plan remembers of its steps, beside clock and state.

    `published` are the values of the next step by group name, which `guard` compares with what the
    groups hold, `applied` those of the step just done; `operations` the gradient operations
    of each scope with their numbers for the next step; `norms` the gradient norm of each scope in
    the step just done. `fixed` stands for the values of every step, in a range test. `pending` is
    the last step, while only an accelerator knows whether it was taken.
    """

    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    guard: WriteGuard = field(default_factory=WriteGuard)
    applied: dict[str, dict[str, Any]] = field(default_factory=dict)
    operations: Sequence[Sequence[tuple[Operation, float]]] = ()
    norms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    skipped: int = 0
    fixed: Values | None = None
    pending: PendingStep | None = None
    last_load: LoadReport | None = None
    notices: Notices = field(default_factory=Notices)

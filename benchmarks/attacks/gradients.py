"""Gradients that are NaN or infinite: no optimizer, policy, norm or dtype lets them at a weight.

The oracle is a twin that never meets a bad gradient: the same bits, before and afterwards.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import nn

import lamina as lm

from .count import Counts, Wrong

OWN = ("SGD", "RMSprop", "Adam", "AdamW", "LAMB", "LARS", "LayerAdaptiveAdam", "Muon", "LBFGS")
GUESTS = (torch.optim.NAdam, torch.optim.Adagrad)
BAD = (math.nan, math.inf, -math.inf)
#: no norm; that of all; that of one rule, so that the others are in no scope; an operation that
#: reads no norm
NORMS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"clip_norm": 1.0},
    "rule": {"rules": [lm.Rule("0", clip_norm=1.0)]},
    "scale": {"gradients": lm.scale_gradients(0.5)},
}
#: which parameters get it, and how much of them
WHERE = ("first", "last", "all")
#: good steps before it
AFTER = (0, 2)


def gradients(full: bool = True) -> list[Counts]:
    """Try every combination; the small size leaves out most places and times, and every other."""
    product = itertools.product(
        [*OWN, *GUESTS],
        ("raise", "skip"),
        NORMS if full else ("none",),
        (torch.float32, torch.bfloat16) if full else (torch.float32,),
        BAD,
        WHERE if full else ("last",),
        AFTER if full else (2,),
    )
    counts = Counts("non-finite gradients", limit=5.0)
    for case in itertools.islice(product, 0, None, 1 if full else 2):
        optimizer, _, norm, *_ = case
        if optimizer != "LBFGS" or norm == "none":  # a plan with LBFGS refuses clipping
            counts.attempt(case, lambda case=case: attack(*case))
    return [counts]


class Run:
    """A small model with a plan, whose gradients are drawn by the number of the step."""

    def __init__(self, plan: lm.Plan, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)]
        self.model = nn.Sequential(*layers).to(dtype)
        self.optimizer = plan.build(self.model, steps=20)

    def step(self, number: int, bad: float | None = None, where: str = "all") -> None:
        def closure() -> torch.Tensor:
            self.give_gradients(number, bad, where)
            return sum(param.float().square().sum() for param in self.model.parameters())

        if self.optimizer.plan.optimizer is lm.optim.LBFGS:
            self.optimizer.step(closure)
        else:
            closure()
            self.optimizer.step()

    def give_gradients(self, number: int, bad: float | None, where: str) -> None:
        draw = torch.Generator().manual_seed(number)
        params = list(self.model.parameters())
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(param.dtype)
        if bad is None:
            return
        if where == "all":
            for param in params:
                param.grad.fill_(bad)
        else:
            params[0 if where == "first" else -1].grad[1, 2] = bad

    def picture(self) -> list[torch.Tensor]:
        """Return copies of all weights and of all tensors that the optimizer keeps of them."""
        params = list(self.model.parameters())
        kept = [self.optimizer.state[param] for param in params]
        state = [t for entry in kept for t in entry.values() if isinstance(t, torch.Tensor)]
        return [tensor.detach().clone() for tensor in [*params, *state]]


def attack(
    optimizer: Any, policy: str, norm: str, dtype: torch.dtype, bad: float, where: str, after: int
) -> str:
    plan = lm.Plan(optimizer, lr=0.01, nonfinite=policy, **NORMS[norm])
    run, twin = Run(plan, dtype), Run(plan, dtype)
    for number in range(after):
        run.step(number)
        twin.step(number)
    before = run.picture()
    meet(run, bad, where, policy)
    if after and not same(before, run.picture()):  # before the first step there is no state
        raise Wrong("the bad step changed weights or state")
    if run.optimizer.clock != after:
        raise Wrong("the bad step was counted")
    for number in range(after, after + 2):
        run.step(number)
        twin.step(number)
    if not all(bool(torch.isfinite(param).all()) for param in run.model.parameters()):
        raise Wrong("a weight is not finite")
    if not same(run.picture(), twin.picture()):
        raise Wrong("not the bits of a run that never met the gradient")
    return "refused" if policy == "raise" else "taken"


#: the parameters of which one has to be named
NAMED = {"first": ["0.weight"], "last": ["1.weight"], "all": ["0.weight", "1.weight"]}


def meet(run: Run, bad: float, where: str, policy: str) -> None:
    """Take the bad step, and require what the plan says of it."""
    skipped = run.optimizer.skipped
    try:
        run.step(99, bad, where)
    except lm.NonFiniteError as error:
        if policy != "raise":
            raise Wrong(f"raised although it is to skip: {error}") from error
        if not any(name in str(error) for name in NAMED[where]):
            raise Wrong(f"none of {NAMED[where]} is named: {error}") from error
        return
    if policy == "raise":
        raise Wrong("nothing was raised")
    if run.optimizer.skipped != skipped + 1:
        raise Wrong("the step was not counted as skipped")


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))

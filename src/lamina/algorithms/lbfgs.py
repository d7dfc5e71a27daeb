"""L-BFGS with a learning rate for each group: one curvature estimate over all parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch

from ..errors import MismatchError, PlanError
from .base import Hyper, Method
from .line_search import Evaluate, Point, strong_wolfe
from .vector import Vector

Closure = Callable[[], Any]
#: a pair is kept if its curvature is above this, as in torch
_MIN_CURVATURE = 1e-10


@final
class LBFGS(Method):
    """Limited-memory BFGS over the parameters of all groups, as one vector theta.

        s_k = theta_{k+1} - theta_k,    y_k = g_{k+1} - g_k       (kept if s'y > 0)
        d_k = -H_k g_k                                            (two-loop recursion, from
        H0  = gamma * D,    gamma = s'y / (y' D y)                 this H0, over the kept pairs)
        D   = diag(lr / max lr),    max lr the length of a step
        theta_{k+1} = theta_k + t * d_k                           (t = max lr, or by line search)

    D acts inside the recursion, as the first guess of the inverse Hessian. So H stays positive
    definite and every direction goes downhill, which a direction multiplied by D afterwards need
    not. With equal learning rates D = 1, and this is torch's algorithm.

    Args:
        lr: the length of a step, or the first to be tried, >= 0; one for each group.
        max_iter: iterations in a call of `step`.
        max_eval: evaluations of the closure in a call, about; None: 1.25 max_iter.
        tolerance_grad: stop where no component of the gradient is larger.
        tolerance_change: stop where the loss, or every parameter, changes less.
        history_size: the number of pairs s, y that are kept.
        line_search_fn: None, or "strong_wolfe".

    Frozen parameters (`requires_grad=False`), those without a gradient and those with lr 0 take no
    part. When others come to take part, the pairs are forgotten: they were of another vector.

    References:
        Nocedal and Wright 2006, "Numerical optimization", algorithms 7.4 and 7.5.
    """

    name: ClassVar[str] = "LBFGS"
    unit: ClassVar[str] = "vector"
    defaults: ClassVar[dict[str, Any]] = {
        "lr": 1,
        "max_iter": 20,
        "max_eval": None,
        "tolerance_grad": 1e-7,
        "tolerance_change": 1e-9,
        "history_size": 100,
        "line_search_fn": None,
    }
    limits: ClassVar[dict[str, tuple[float, float]]] = {
        "max_iter": (1, math.inf),
        "max_eval": (1, math.inf),
        "history_size": (1, math.inf),
    }
    counts: ClassVar[tuple[str, ...]] = ("max_iter", "max_eval", "history_size")
    unbounded: ClassVar[tuple[str, ...]] = ("tolerance_grad", "tolerance_change")
    options: ClassVar[tuple[str, ...]] = ("line_search_fn",)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"line_search_fn": (None, "strong_wolfe")}


@dataclass
class Memory:
    """What is known of the curvature: torch's names, and which parameters it is of."""

    n_iter: int = 0
    func_evals: int = 0
    d: torch.Tensor | None = None
    t: float = 0.0
    old_dirs: list[torch.Tensor] = field(default_factory=list)  # y, the changes of the gradient
    old_stps: list[torch.Tensor] = field(default_factory=list)  # s, the steps
    ro: list[float] = field(default_factory=list)  # 1 / s'y
    H_diag: float = 1.0
    prev_flat_grad: torch.Tensor | None = None
    prev_loss: float = 0.0
    places: list[int] | None = None

    @classmethod
    def of(cls, entry: dict[str, Any], places: list[int], like: torch.Tensor) -> Memory:
        """Read saved state, torch's too; drop its pairs if they are of other parameters.

        In the dtype and on the device of the gradient `like`: a model may move.
        """
        evals = int(entry.get("func_evals", 0))
        if entry.get("d") is None or entry.get("places", places) != places:
            return cls(func_evals=evals, places=places)
        return cls(
            n_iter=int(entry["n_iter"]),
            func_evals=evals,
            d=entry["d"].to(like),
            t=float(entry["t"]),
            old_dirs=[each.to(like) for each in entry["old_dirs"]],
            old_stps=[each.to(like) for each in entry["old_stps"]],
            ro=[float(each) for each in entry["ro"]],
            H_diag=float(entry["H_diag"]),
            prev_flat_grad=entry["prev_flat_grad"].to(like),
            prev_loss=float(entry["prev_loss"]),
            places=places,
        )

    def learn(self, grad: torch.Tensor, scale: torch.Tensor | None, size: int) -> None:
        """Take in the pair of the step just done."""
        assert self.prev_flat_grad is not None
        assert self.d is not None
        y, s = grad.sub(self.prev_flat_grad), self.d.mul(self.t)
        curvature = float(y.dot(s))
        if curvature <= _MIN_CURVATURE:
            return
        excess = max(len(self.ro) + 1 - size, 0)
        self.old_dirs = [*self.old_dirs[excess:], y]
        self.old_stps = [*self.old_stps[excess:], s]
        self.ro = [*self.ro[excess:], 1.0 / curvature]
        self.H_diag = curvature / float(y.dot(y if scale is None else y * scale))

    def direction(self, grad: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Return -H g, by the two-loop recursion."""
        q = grad.neg()
        alphas = []
        pairs = list(zip(self.old_dirs, self.old_stps, self.ro, strict=True))
        for y, s, ro in reversed(pairs):
            alphas.append(float(s.dot(q)) * ro)
            q.add_(y, alpha=-alphas[-1])
        r = q.mul_(self.H_diag)
        if scale is not None:
            r.mul_(scale)
        for (y, s, ro), alpha in zip(pairs, reversed(alphas), strict=True):
            r.add_(s, alpha=alpha - float(y.dot(r)) * ro)
        return r


#: what `kernels()` says of it
WHOLE_VECTOR = "one vector: the search of L-BFGS over all parameters together"


def lbfgs_step(
    closure: Closure | None, groups: Sequence[dict[str, Any]], entry: dict[str, Any]
) -> Any:
    """Return one call of `step`: up to `max_iter` iterations over the parameters of all groups.

    Args:
        closure: clears the gradients, computes the loss, calls backward, returns the loss.
        groups: parameter groups; each has its lr, the other hyperparameters are the first's.
        entry: the state, in torch's form; replaced at the end.

    Returns:
        What the closure returned at its first evaluation.

    Raises:
        PlanError: there is no closure, or it returned no number.
        NonFiniteError: a loss or a gradient is not finite. Whatever is raised, the closure's own
            errors too: weights and state are as before.
    """
    if not callable(closure):
        given = "" if closure is None else f", and was given {closure!r}"
        raise PlanError(
            f"LBFGS evaluates the loss several times in a step, so it needs a closure{given}: "
            "optimizer.step(closure), where closure() clears the gradients, computes the loss, "
            "calls loss.backward() and returns the loss."
        )
    with torch.enable_grad():
        result = closure()
    vector = Vector(groups)
    loss = _number(result)
    grad = vector.grad() if vector.parts else torch.zeros(0)
    memory = Memory.of(entry, vector.places, grad)
    _refuse_outgrown(memory, grad, groups)
    memory.func_evals += 1
    if vector.check(loss, grad) > groups[0]["tolerance_grad"]:
        before = vector.values()
        try:
            _iterate(closure, vector, memory, groups[0], loss, grad)
        except BaseException:
            vector.put(before)
            raise
    entry.update(vars(memory))
    return result


def _refuse_outgrown(memory: Memory, grad: torch.Tensor, groups: Sequence[dict[str, Any]]) -> None:
    """Raise `MismatchError` if a parameter's size changed since the memory was made."""
    if memory.d is None or memory.d.numel() == grad.numel():
        return
    names = groups[0].get("param_names")
    which = repr(names[0]) if names else 'optimizer.param_groups[0]["params"][0]'
    raise MismatchError(
        f"the memory of L-BFGS is of {memory.d.numel():,} numbers, and its parameters have "
        f"{grad.numel():,} now; the weights are as they were before this step. After a change of a "
        f"weight's size, begin it anew with optimizer.restart_state({which})."
    )


def _iterate(
    closure: Closure,
    vector: Vector,
    memory: Memory,
    hyper: Hyper,
    loss: float,
    grad: torch.Tensor,
) -> None:
    max_iter, tolerance_change = int(hyper["max_iter"]), hyper["tolerance_change"]
    max_eval = max_iter * 5 // 4 if hyper["max_eval"] is None else int(hyper["max_eval"])
    scale, evals = vector.scale(), 1
    for n_iter in range(1, max_iter + 1):
        memory.n_iter += 1
        if memory.n_iter == 1:
            d = grad.neg() if scale is None else grad.neg() * scale
            t = min(1.0, 1.0 / max(float(d.abs().sum()), 1e-300)) * vector.lr
        else:
            memory.learn(grad, scale, int(hyper["history_size"]))
            d, t = memory.direction(grad, scale), vector.lr
        memory.d, memory.t = d, t
        memory.prev_flat_grad, memory.prev_loss = grad, loss
        slope = float(grad.dot(d))
        if slope > -tolerance_change:
            return
        if hyper["line_search_fn"] is None:
            vector.move(t, d)
            if n_iter == max_iter:  # torch too leaves out the evaluation that nobody would use
                return
            loss, grad = _evaluate(closure, vector)
            used = 1
        else:
            point, used = strong_wolfe(
                _along(closure, vector, d),
                Point(0.0, loss, grad, slope),
                t,
                float(d.abs().max()),
                tolerance_change=tolerance_change,
                max_evals=max_eval - evals,
            )
            memory.t, loss, grad = point.t, point.loss, point.grad
            vector.move(point.t, d)
        evals += used
        memory.func_evals += used
        if n_iter == max_iter or evals >= max_eval:
            return
        if float(grad.abs().max()) <= hyper["tolerance_grad"]:
            return
        moved = float(d.mul(memory.t).abs().max())
        if moved <= tolerance_change or abs(loss - memory.prev_loss) < tolerance_change:
            return


def _number(loss: Any) -> float:
    given: Any = loss.detach() if isinstance(loss, torch.Tensor) else loss
    try:
        if not isinstance(given, str):
            return float(given)
    except (TypeError, ValueError, RuntimeError):
        pass
    shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else ""
    raise PlanError(
        f"the closure returned {shape or repr(loss)}; LBFGS expected the loss: one number, or a "
        "tensor of one number. The weights are as they were before this step."
    )


def _evaluate(closure: Closure, vector: Vector) -> tuple[float, torch.Tensor]:
    with torch.enable_grad():
        loss = _number(closure())
    grad = vector.grad()
    vector.check(loss, grad)
    return loss, grad


def _along(closure: Closure, vector: Vector, d: torch.Tensor) -> Evaluate:
    """Return a function that looks a step length ahead, and puts the weights back."""
    before = vector.values()

    def evaluate(t: float) -> Point:
        vector.move(t, d)
        loss, grad = _evaluate(closure, vector)
        vector.put(before)
        return Point(t, loss, grad, float(grad.dot(d)))

    return evaluate

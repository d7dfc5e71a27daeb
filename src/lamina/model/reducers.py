"""Which parameters DistributedDataParallel reduces, measured; and what that means for freezing."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._util.sharding import is_distributed, is_sharded

Groups = Sequence[dict[str, Any]]
_PROBE = "lamina: whether anything keeps this node"


@dataclass(frozen=True)
class Reduction:
    """What DistributedDataParallel does with the gradients of some parameters, by their ids.

    `held` are in a reducer, of whichever wrapper; `missed` are inside a wrapper whose reducer does
    not hold them; `left_out` are what a wrapper was told to ignore. `starved` are held, but have
    the flag off, and the wrapper waits for a gradient of each. `kept` are parameters whose
    gradients something else collects: not a wrapper that was found, but their node is kept alive.
    """

    held: frozenset[int] = frozenset()
    missed: frozenset[int] = frozenset()
    left_out: frozenset[int] = frozenset()
    starved: frozenset[int] = frozenset()
    kept: frozenset[int] = frozenset()

    def among(self, ids: AbstractSet[int]) -> Reduction:
        """Return the same of some parameters only."""
        return Reduction(*(getattr(self, field.name) & ids for field in fields(self)))


NOTHING = Reduction()


def measure(model: nn.Module, params: Iterable[torch.Tensor]) -> Reduction:
    """Measure which parameters the reducers of DistributedDataParallel hold.

    A reducer keeps the autograd node of a parameter alive, which otherwise lives only as long as a
    graph that uses it. So a wrapper holds at most the parameters inside it whose node is alive, and
    its log says how many it holds. A model inside a wrapper does not know it, hence the search.

    Args:
        model: what the plan was given: the wrapper, a module with wrappers inside, or a module
            inside one.
        params: the parameters of the plan.
    """
    if not is_distributed():
        return NOTHING
    params = [param for param in params if not is_sharded(param)]  # FSDP reduces those itself
    alive = {id(param) for param in params if _is_alive(param)}
    if not alive:
        return NOTHING
    each = list(_reductions(model, params))
    held, missed, left_out, starved = (
        frozenset().union(*(getattr(found, name) for found in each))
        for name in ("held", "missed", "left_out", "starved")
    )
    kept = frozenset(alive - held - missed - left_out)
    found = Reduction(held, missed, left_out - held - missed, starved, kept)
    return found.among(set(map(id, params)))


def _is_alive(param: torch.Tensor) -> bool:
    """Return whether anything keeps the node that accumulates a parameter's gradient."""
    if not (param.is_floating_point() or param.is_complex()):
        return False
    if not param.is_leaf or param.is_inference():
        return False
    flag = param.requires_grad
    with torch.enable_grad():
        param.requires_grad_(True)  # without it, there is no node to ask for
        _node(param).metadata[_PROBE] = True
        kept = _node(param).metadata.pop(_PROBE, False)
        param.requires_grad_(flag)
    return bool(kept)


def _node(param: torch.Tensor) -> Any:
    return torch.autograd.graph.get_gradient_edge(param).node


def _reductions(model: nn.Module, params: Sequence[torch.Tensor]) -> Iterator[Reduction]:
    """Yield what each wrapper does that decides over some parameters.

    Wrappers in the model are those that train it; others matter for what is in none of them.
    """
    inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    covered = {id(param) for wrapper in inside for param in wrapper.module.parameters()}
    for wrapper in inside:
        yield _reduction_of(wrapper)
    rest = {id(param) for param in params} - covered
    if not rest:
        return
    outside = _living_wrappers(rest)
    if len(outside) > 1:  # one may be left over from wrapping the model before
        del outside
        gc.collect()
        outside = _living_wrappers(rest)
    for wrapper in outside:
        yield _reduction_of(wrapper).among(rest)


def _living_wrappers(ids: set[int]) -> list[DistributedDataParallel]:
    """Return all wrappers in this process that have one of these parameters inside."""
    # `isinstance` would ask proxies for their class, which may load whatever they stand for.
    found = (it for it in gc.get_objects() if issubclass(type(it), DistributedDataParallel))
    return [it for it in found if not ids.isdisjoint(map(id, it.module.parameters()))]


def _reduction_of(wrapper: DistributedDataParallel) -> Reduction:
    ignored = wrapper.parameters_to_ignore
    named = dict(wrapper.module.named_parameters())
    left_out = frozenset(id(param) for name, param in named.items() if name in ignored)
    inside = [param for name, param in named.items() if name not in ignored]
    if getattr(wrapper, "reducer", None) is None:  # all of its reductions are delayed ones
        return Reduction(left_out=left_out)
    held = frozenset(id(param) for param in inside if _is_alive(param))
    if len(held) != wrapper._get_ddp_logging_data()["num_parameter_tensors"]:
        # A graph that is still referenced keeps nodes too. The buckets are exact, but to list them
        # torch allocates as much as all gradients.
        buckets = wrapper.reducer._get_zeros_like_grad_buckets()
        held = frozenset(id(param) for bucket in buckets for param in bucket.parameters())
    off = frozenset(id(param) for param in inside if not param.requires_grad)
    patient = wrapper.find_unused_parameters or wrapper.static_graph
    starved = frozenset() if patient else held & off
    return Reduction(held, frozenset(map(id, inside)) - held, left_out, starved)


def zero_gradients(param: torch.Tensor) -> None:
    """Keep the gradients of a parameter at zero, until `free_gradients`."""
    if not has_zero_gradients(param):
        param.register_hook(_zero)


def free_gradients(param: torch.Tensor) -> None:
    """Undo `zero_gradients`, whichever plan called it."""
    hooks = param._backward_hooks or {}
    for key in [key for key, hook in hooks.items() if hook is _zero]:
        del hooks[key]


def has_zero_gradients(param: torch.Tensor) -> bool:
    """Return whether a hook keeps the gradients of a parameter at zero."""
    return any(hook is _zero for hook in (param._backward_hooks or {}).values())


def _zero(gradient: torch.Tensor) -> torch.Tensor:
    # A new tensor: autograd may give the same one to somebody else. A product would keep a NaN.
    return torch.zeros_like(gradient)

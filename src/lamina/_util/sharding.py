"""Parameters that lie in shards over several processes: of FSDP2 (DTensor), and of FSDP1."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .tensors import is_dtensor

#: what torch's FSDP1 writes on a parameter that it has put into a flat one
_FLATTENED = "_fsdp_flattened"
#: the class with which a wrapper of FSDP1 keeps its flat parameter
_HANDLE = "FlatParamHandle"

Place = tuple[int, str]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process' part of a sharded tensor; of any other, the tensor."""
    sharded: Any = tensor
    part: torch.Tensor = sharded.to_local() if is_dtensor(tensor) else tensor
    return part


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a sharded tensor in full, as every process then has it; others as they are."""
    sharded: Any = tensor
    full: torch.Tensor = sharded.full_tensor() if is_dtensor(tensor) else tensor
    return full


def wholes_of(scalars: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return scalars in full, of which each process may know a share; others as they are.

    Those that are laid out alike travel together: `whole_of` each would be a collective, and a wait
    for the slowest process, for every one of them.
    """
    found = list(scalars)
    alike: dict[Any, list[int]] = {}
    for index, scalar in enumerate(found):
        if is_dtensor(scalar):
            each: Any = scalar
            alike.setdefault((each.device_mesh, each.placements, each.dtype), []).append(index)
    for (mesh, placements, _), indices in alike.items():
        from torch.distributed.tensor import DTensor

        shares = torch.stack([local_part(found[index]) for index in indices])
        together: Any = DTensor.from_local(shares, mesh, placements, run_check=False)
        for index, whole in zip(indices, together.full_tensor().unbind(), strict=True):
            found[index] = whole
    return found


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether FSDP, or tensor parallelism, has cut up this parameter."""
    return is_dtensor(tensor) or is_flattened(tensor)


def is_flattened(tensor: torch.Tensor) -> bool:
    """Return whether FSDP1 has put this parameter into a flat one, or whether it is a flat one."""
    return bool(getattr(tensor, _FLATTENED, False))


def unit_refusal(method: str, unit: str, tensor: torch.Tensor) -> str:
    """Return why a method cannot train a tensor that lies in shards, or "".

    Args:
        method: its name.
        unit: what one update of it needs to see: "element", "tensor" or "vector".
        tensor: the parameter; a DTensor has the norms of the whole, a part of FSDP1's has not.
    """
    if unit != "element" and is_flattened(tensor):
        other = "L-BFGS without sharding (DDP)" if unit == "vector" else "FSDP2 (fully_shard)"
        return (
            f"is cut into flat parts by FSDP1 (FullyShardedDataParallel), and {method} needs whole "
            f"tensors; use {other}, or an optimizer that treats each number by itself, such as "
            "AdamW"
        )
    if unit == "vector" and is_dtensor(tensor):
        return (
            f"is sharded over processes (DTensor, as by fully_shard), and {method} works on all "
            "parameters as one vector on one process; use DDP, or another optimizer, such as AdamW"
        )
    return ""


# ------------------------------------------------------------------------------------------ FSDP2


def lasting_parameters(model: nn.Module) -> dict[Place, nn.Parameter]:
    """Return the sharded parameters that FSDP2 keeps, by module and attribute.

    Between forward and backward the modules may hold gathered copies, which are thrown away; an
    optimizer must never hold those. Only places that hold a copy now are listed.
    """
    found: dict[Place, nn.Parameter] = {}
    for part in _fsdp2_parameters(model):
        if part.sharded_state.name == "SHARDED":
            continue
        at = part._module_info
        places = [(at.module, at.param_name)]
        places += zip(at.shared_modules, at.shared_param_names, strict=True)
        found |= {(id(module), name): part.sharded_param for module, name in places}
    return found


def shard_origins(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Return where each sharded parameter of FSDP2 is, and a number for what it was made of."""
    found = []
    for part in _fsdp2_parameters(model):
        origin = getattr(part, "_orig_param_uid", None)  # torch before 2.13 has none
        if origin is not None:
            found.append((part._module_info.module, part._module_info.param_name, origin))
    return found


def _fsdp2_parameters(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        state = getattr(module, "_get_fsdp_state", None)  # only of what FSDP2 wraps
        for group in _groups_of(state()) if state else ():
            yield from group.fsdp_params


def _groups_of(state: Any) -> list[Any]:
    several = getattr(state, "_fsdp_param_groups", None)
    if several is not None:
        return list(several)
    single = getattr(state, "_fsdp_param_group", None)  # its name in older versions of torch
    return [] if single is None else [single]


def laid_out_as(value: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a state tensor of a parameter, sharded or whole, laid out as the parameter is now.

    A whole tensor is taken to be the same on every process, as FSDP2 takes parameters to be: each
    keeps its part, and nothing is sent.
    """
    if not is_dtensor(param):
        return whole_of(value).to(param.device)
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if is_dtensor(value):
        if value.device_mesh == mesh and value.placements == placements:  # type: ignore[attr-defined]
            return value
        value = whole_of(value)
    from torch.distributed.tensor import DTensor, Replicate

    copies = [Replicate()] * mesh.ndim
    every = DTensor.from_local(value.to(mesh.device_type), mesh, copies, run_check=False)
    part: Any = every.redistribute(placements=placements)
    mine: Any = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
    mine.to_local().copy_(part.to_local())  # a new tensor, not a view that keeps the whole alive
    found: torch.Tensor = mine
    return found


# ------------------------------------------------------------------------------------------ FSDP1


@dataclass(frozen=True)
class FlatPart:
    """What FSDP1 says of one parameter that it has put into a flat one.

    `group` is the process group over which it is sharded, None where each process has all of it;
    `shape` that of the whole.
    """

    group: Any
    shape: tuple[int, ...]


def flat_parts(model: nn.Module, params: Iterable[torch.Tensor] = ()) -> dict[int, FlatPart]:
    """Return what FSDP1 says of the parameters of a model, by their identity.

    Args:
        model: the wrapper, a module with wrappers inside, or a module inside one.
        params: parameters of the model. A module inside a wrapper does not know it: for what no
            wrapper in the model has, the wrappers of this process are searched.
    """
    return _parts_of(_handles(model, params))


def tell_flat_parameters(model: nn.Module, params: Iterable[torch.Tensor]) -> None:
    """Let flat parameters take notice of flags that were set since the forward began."""
    for handle in _handles(model, params):
        handle._reset_flat_param_grad_info_if_needed()


def _parts_of(handles: Iterable[Any]) -> dict[int, FlatPart]:
    found: dict[int, FlatPart] = {}
    for handle in handles:
        flat = handle.flat_param
        group = handle.process_group if handle.uses_sharded_strategy else None
        found[id(flat)] = FlatPart(group, tuple(flat.shape))
        for param, shape in zip(flat._params or (), flat._shapes, strict=False):
            found[id(param)] = FlatPart(group, tuple(shape))
    return found


def _handles(model: nn.Module, params: Iterable[torch.Tensor]) -> list[Any]:
    """Return the handles of wrappers in a model, and of those around it that have its params."""
    inside = [getattr(module, "_handle", None) for module in model.modules() if _is_fsdp1(module)]
    handles = [handle for handle in inside if handle is not None]
    missing = {id(param) for param in params if is_flattened(param)} - _parts_of(handles).keys()
    return handles + _handles_around(missing) if missing else handles


def _handles_around(ids: set[int]) -> list[Any]:
    """Return all handles in this process that have one of these parameters in their flat one."""
    # `isinstance` would ask proxies for their class, which may load whatever they stand for.
    handles: list[Any] = [it for it in gc.get_objects() if type(it).__name__ == _HANDLE]
    return [it for it in handles if not ids.isdisjoint(_parts_of([it]))]


def _is_fsdp1(module: nn.Module) -> bool:
    return any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__)


class Shards:
    """The parameters of one clip scope of which each process has a part, with their groups.

    Norms of parts are put together here: every process calls the same methods in the same order,
    also one that has no gradient of them.
    """

    def __init__(self, groups: Mapping[str, Any], like: Sequence[torch.Tensor]) -> None:
        """Take all parameters of the scope in one order, None for those that are whole.

        Args:
            groups: the process groups, by name.
            like: tensors for the dtype and the device of the norms.
        """
        self._groups = dict(groups)
        self._place = {name: index for index, name in enumerate(self._groups)}
        double = any(t.dtype in (torch.float64, torch.complex128) for t in like)
        self._dtype = torch.float64 if double else torch.float32
        self._device = like[0].device

    @property
    def names(self) -> list[str]:
        """All parameters of the scope."""
        return list(self._groups)

    def norms(
        self, names: Sequence[str], parts: Sequence[torch.Tensor], p: float
    ) -> list[torch.Tensor]:
        """Return the p-norm of every parameter of the scope, from the norms of this process' parts.

        Args:
            names: the parameters of which this process has gradients.
            parts: the norms of their parts.
            p: the order of the norms.
        """
        mine = torch.zeros(len(self._groups), dtype=self._dtype, device=self._device)
        for name, part in zip(names, parts, strict=True):
            mine[self._place[name]] = part
        whole = mine.clone()
        by_id = {id(group): group for group in self._groups.values() if group is not None}
        for group in by_id.values():
            own = [self._place[name] for name, its in self._groups.items() if its is group]
            count = torch.distributed.get_world_size(group)
            rows = [torch.empty_like(mine[own]) for _ in range(count)]
            # Not a sum of powers: it would overflow, and the largest of NaN is not NaN everywhere.
            torch.distributed.all_gather(rows, mine[own], group=group)
            whole[own] = torch.linalg.vector_norm(torch.stack(rows), p, dim=0)
        return list(whole.unbind())

    def of(self, names: Sequence[str], norms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return those of the parameters named, from what `norms` gave."""
        return [norms[self._place[name]] for name in names]


def is_distributed() -> bool:
    """Return whether this process is in a process group, without which nothing is reduced."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()

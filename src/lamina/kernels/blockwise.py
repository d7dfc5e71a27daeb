"""16-bit parameters: float32 copies of a block at a time, updated by the forms for float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, final

import torch

from .._util.blocks import PLAIN, block_length, in_blocks, is_dense
from ..algorithms.adam import AdamRule
from ..algorithms.base import HALF, ROUNDING_ENTRIES, Batch, number, numbers, times
from ..algorithms.lars import LARS
from ..algorithms.muon import Muon, lr_ratio, orthogonalized
from ..algorithms.rmsprop import RMSprop
from ..algorithms.rounding import RoundedPart, Rounder, rounding_of
from ..algorithms.sgd import SGD
from . import per_tensor
from .base import DEVICES, Kernel, begin_momentum, short
from .foreach import FORMS
from .fused import OPERATORS, step_refusal

_DTYPES = (*HALF, torch.float32)
#: algorithms whose buffer exists only while they have a momentum
_MAY_REST = (SGD, RMSprop, LARS)


class Piece(NamedTuple):
    """Some elements of one parameter, as views."""

    param: torch.Tensor
    grad: torch.Tensor
    state: list[torch.Tensor]
    step: torch.Tensor
    #: whether the state begins with this update, so that its values mean nothing yet
    fresh: bool = False
    #: how the results are rounded, if not to the nearest
    rounded: RoundedPart | None = None


@final
class Blockwise(Kernel):
    """Float32 copies of a few small tensors or of a part of a large one, then the next ones.

    Temporaries are a few blocks, however large the tensors are, and the copies are still in the
    cache when they are updated and rounded. State in float32 is updated where it lies.
    """

    name: ClassVar[str] = "blockwise"
    about: ClassVar[str] = "float32 copies of one block at a time, each result rounded once"

    def refusal(self, batch: Batch) -> str:
        """Refuse all but 16-bit parameters of rules with a fast form."""
        algorithm = batch.algorithm
        if type(algorithm) not in OPERATORS and type(algorithm) not in FORMS:
            return f"there is no float32 form of {algorithm.name}"
        for index in range(len(batch.params)):
            if reason := _refusal(batch, index):
                return f"{batch.name_of(index)} {reason}"
        return ""

    def ready(self, batch: Batch) -> bool:
        """Accept dense gradients of 16 or 32 bits, in any layout."""
        return all(
            grad.layout is torch.strided and grad.dtype in _DTYPES and type(grad) in PLAIN
            for grad in batch.grads
        )

    def run(self, batches: Sequence[Batch]) -> None:
        """Return the small tensors together, the large ones block by block."""
        for batch in batches:
            fresh = _begin_momentum(batch)
            keys = _used_state(batch)
            if type(batch.algorithm) is Muon:
                _muon(batch)
            elif batch.algorithm.unit == "element":
                _update(batch, keys, _pieces(batch, keys, fresh, range(len(batch.params))))
            else:
                _update_by_norm(batch, keys)


def _refusal(batch: Batch, index: int) -> str:
    param = batch.params[index]
    if param.dtype not in HALF:
        return f"is {short(param.dtype)}, which needs no wider copy"
    if param.device.type not in DEVICES:
        return f"is on {param.device.type}"
    if type(param) not in PLAIN:
        return f"is a {type(param).__name__}"
    for key, values in batch.columns.items():
        value = values[index]
        if value is None:
            continue
        if type(value) not in PLAIN or value.layout is not torch.strided:
            return f"and its {key} is not a plain dense tensor"
        if value.dtype not in _DTYPES:
            return f"is {short(param.dtype)} and its {key} {short(value.dtype)}"
    if isinstance(batch.algorithm, AdamRule):
        return step_refusal(param, batch.steps[index])
    return ""


def _begin_momentum(batch: Batch) -> set[int]:
    """Make room for buffers that begin now; return the parameters whose buffer means nothing yet.

    SGD's buffer begins as the gradient, the others as zeros.
    """
    if type(batch.algorithm) not in _MAY_REST or not number(batch.hyper["momentum"]):
        return set()
    fresh = set(begin_momentum(batch))
    return fresh if type(batch.algorithm) is SGD else set()


def _used_state(batch: Batch) -> list[str]:
    """Return the names of the state that this update reads; a buffer at rest is left alone."""
    rests = type(batch.algorithm) in _MAY_REST and not number(batch.hyper["momentum"])
    left = (*ROUNDING_ENTRIES, "momentum_buffer") if rests else ROUNDING_ENTRIES
    return [key for key in batch.columns if key not in left]


def _rounder(batch: Batch, index: int) -> Rounder | None:
    """Return the rounding of a parameter in this update; None for to the nearest."""
    return Rounder(batch, index) if rounding_of(batch.params[index], batch.hyper) else None


def _pieces(
    batch: Batch, keys: Sequence[str], fresh: set[int], indices: Iterable[int]
) -> Iterator[Piece]:
    """Cut parameters, with their gradients and state, into blocks."""
    length = block_length(batch.params[0])
    columns = [batch.columns[key] for key in keys]
    for index in indices:
        step, is_fresh, rounder = batch.steps[index], index in fresh, _rounder(batch, index)
        extra = [batch.columns[rounder.entry][index]] if rounder and rounder.entry else []
        state = [column[index] for column in columns]
        tensors = [batch.params[index], batch.grads[index], *state, *extra]
        for param, grad, *rest in in_blocks(tensors, length):
            its_state, its_extra = rest[: len(keys)], rest[len(keys) :]
            rounded = rounder and RoundedPart(rounder, param, *its_extra)
            yield Piece(param, grad, its_state, step, is_fresh, rounded)


def _portions(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Put small pieces together, up to about one block."""
    portion: list[Piece] = []
    filled = 0
    for piece in pieces:
        size = piece.param.numel()
        if portion and filled + size > block_length(piece.param):
            yield portion
            portion, filled = [], 0
        portion.append(piece)
        filled += size
    if portion:
        yield portion


def _update(batch: Batch, keys: Sequence[str], pieces: Iterable[Piece]) -> None:
    """Update pieces by the form of their rule for float32."""
    for portion in _portions(pieces):
        wide = _widened(batch, keys, portion)
        rule = type(batch.algorithm)
        if rule in OPERATORS:
            OPERATORS[rule](wide, wide.grads, None)
        else:
            FORMS[rule](wide, wide.grads)
        _round_into(portion, keys, wide)


def _widened(
    batch: Batch, keys: Sequence[str], pieces: Sequence[Piece], in_place: bool = True
) -> Batch:
    """Return pieces as a batch in float32, its gradients scaled and turned round already.

    `in_place`: state that is float32 stands for itself, so that updating it needs no copy.
    """
    hyper, scale = batch.hyper, batch.scale
    fused = type(batch.algorithm) in OPERATORS
    turned = bool(hyper.get("maximize")) and not fused  # the fused operators do this themselves
    untouched = scale is None and not turned
    params = [_wide_weight(piece) for piece in pieces]
    both = list(zip(pieces, params, strict=True))
    grads: Any = [_wide(piece.grad, param, untouched) for piece, param in both]
    if scale is not None:
        grads = _scaled(grads, scale)
    if turned:
        torch._foreach_neg_(grads)
    columns = {
        key: [
            None if piece.fresh else _wide(piece.state[place], param, in_place)
            for piece, param in both
        ]
        for place, key in enumerate(keys)
    }
    steps = [piece.step for piece in pieces]
    return Batch(batch.algorithm, params, grads, columns, steps, hyper)


def _wide_weight(piece: Piece) -> torch.Tensor:
    """Return a weight in float32, without gaps in memory; a master weight itself, if it has none."""
    if piece.rounded is None:
        return piece.param.float()
    weight = piece.rounded.weight()
    if weight.is_contiguous() or is_dense(weight):
        return weight
    return torch.empty_like(weight).copy_(weight)


def _wide(tensor: torch.Tensor, param: torch.Tensor, in_place: bool) -> torch.Tensor:
    """Return a tensor in float32, in its parameter's order in memory."""
    if in_place and tensor.dtype is torch.float32 and tensor.stride() == param.stride():
        return tensor
    return torch.empty_like(param).copy_(tensor)


def _scaled(grads: Any, scale: torch.Tensor) -> Any:
    """Multiply float32 copies of gradients by the clip factor."""
    if torch.promote_types(scale.dtype, torch.float32) is not torch.float32:
        return [times(grad, scale) for grad in grads]
    torch._foreach_mul_(grads, scale.to(grads[0].device, torch.float32))
    return grads


def _round_into(pieces: Sequence[Piece], keys: Sequence[str], wide: Batch) -> None:
    """Write the results back; state that was updated where it lies is there already."""
    rounded = _rounded_parts(pieces)
    if not rounded:
        torch._foreach_copy_([piece.param for piece in pieces], wide.params)
    for part, result in zip(rounded, wide.params, strict=False):
        part.store(result)
    _round_state_into(pieces, keys, wide)


def _rounded_parts(pieces: Sequence[Piece]) -> list[RoundedPart]:
    """Return the roundings of pieces of one dtype and group: of all of them, or of none."""
    return [piece.rounded for piece in pieces if piece.rounded is not None]


def _round_state_into(pieces: Sequence[Piece], keys: Sequence[str], wide: Batch) -> None:
    rounded = _rounded_parts(pieces)
    for place, key in enumerate(keys):
        olds = [piece.state[place] for piece in pieces]
        if rounded:
            for part, new, old in zip(rounded, wide.columns[key], olds, strict=True):
                part.store_state(key, new, old)
            continue
        pairs = [
            pair for pair in zip(olds, wide.columns[key], strict=True) if pair[0] is not pair[1]
        ]
        if pairs:
            torch._foreach_copy_([old for old, _ in pairs], [new for _, new in pairs])


def _update_by_norm(batch: Batch, keys: Sequence[str]) -> None:
    """Update the tensors of a rule that needs their norms: twice through each large one."""
    length = block_length(batch.params[0])
    small = [index for index, param in enumerate(batch.params) if param.numel() <= length]
    _update(batch, keys, _pieces(batch, keys, set(), small))
    rule = per_tensor.NORM_RULES[type(batch.algorithm)]
    for index, param in enumerate(batch.params):
        if param.numel() > length:
            _update_in_two_passes(batch, keys, rule, index)


def _update_in_two_passes(
    batch: Batch, keys: Sequence[str], rule: per_tensor.NormRule, index: int
) -> None:
    """Measure all blocks of a tensor without a change, then update all of them."""
    found: list[list[torch.Tensor]] = []
    for piece in _pieces(batch, keys, set(), [index]):
        wide = _widened(batch, keys, [piece], in_place=False)
        found.append(rule.norms(wide, rule.prepare(wide, wide.grads)))
    of_blocks = [torch.cat(each) for each in zip(*found, strict=True)]
    norms = [torch.linalg.vector_norm(each, rule.order).view(1) for each in of_blocks]
    factors = rule.factors(batch, norms, [batch.params[index].numel()])
    for piece in _pieces(batch, keys, set(), [index]):
        wide = _widened(batch, keys, [piece])
        rule.finish(wide, rule.prepare(wide, wide.grads), factors)
        _round_into([piece], keys, wide)


def _muon(batch: Batch) -> None:
    """Update matrices by Muon, whose direction is rounded to bfloat16 in any case."""
    hyper = batch.hyper
    lr, weight_decay = numbers(hyper, "lr", "weight_decay")
    length = block_length(batch.params[0])
    for index, param in enumerate(batch.params):
        step = orthogonalized(_muon_direction(batch, index), hyper)
        ratio = lr_ratio(hyper, param.shape)
        rounder = _rounder(batch, index)
        extra = [batch.columns[rounder.entry][index]] if rounder and rounder.entry else []
        for part, change, *its_extra in in_blocks([param, step, *extra], length):
            rounded = rounder and RoundedPart(rounder, part, *its_extra)
            wide = rounded.weight() if rounded else part.float()
            wide.mul_(1 - lr * weight_decay).add_(change, alpha=-lr * ratio)
            if rounded:
                rounded.store(wide)
            else:
                part.copy_(wide)


def _muon_direction(batch: Batch, index: int) -> torch.Tensor:
    """Update the momentum of a matrix; return the direction to be orthogonalized."""
    param, grad, step = batch.params[index], batch.grads[index], batch.steps[index]
    keys, buffer = ["momentum_buffer"], batch.columns["momentum_buffer"][index]
    whole = torch.empty_like(param, dtype=torch.bfloat16, requires_grad=False)
    rounder = _rounder(batch, index)
    for part, its_grad, its_buffer, out in in_blocks(
        [param, grad, buffer, whole], block_length(param)
    ):
        rounded = rounder and RoundedPart(rounder, part)
        piece = Piece(part, its_grad, [its_buffer], step, rounded=rounded)
        wide = _widened(batch, keys, [piece])
        out.copy_(per_tensor.muon_directions(wide, wide.grads)[0])
        _round_state_into([piece], keys, wide)
    return whole

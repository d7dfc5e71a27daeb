"""The update rules as Triton kernels; each equation is that of its rule in `algorithms/`.

A rule that needs the norm of a whole tensor is launched twice. The first launch writes a sum for
each chunk; the second adds those of a tensor up and updates it. The first one also updates the
moments where they are float32. Moments of 16 bits would be rounded before the update reads them,
so that the second launch works them out again.

Roots and quotients are rounded to the nearest (`sqrt_rn`, `div_rn`), as torch's are: the plain
operators flush denormal numbers to zero, and their last digits may differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .memory import (
    exact_hyper,
    find_chunk,
    grad_factor,
    hyper,
    numel,
    read,
    read_sum,
    share,
    step_count,
    within,
    write_sum,
)
from .rounding import find_tensors, read_state, read_weight, write_state, write_weight

#: Triton's names for torch's dtypes
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

# ----------------------------------------------------------------------------------------- RMSprop


@triton.jit
def rmsprop(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk by RMSprop."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    alpha, new = share(group, 2)
    lr, eps, weight_decay, momentum = (
        hyper(group, 1),
        hyper(group, 3),
        hyper(group, 4),
        hyper(group, 5),
    )
    values = (grad_factor(group), lr, alpha, new, eps, weight_decay, momentum)
    for start in range(begin, whole, BLOCK):
        _rmsprop_block(tensors, values, start, end, CENTERED, MOMENTUM, ROUNDING, BLOCK, False)
    if whole < end:
        _rmsprop_block(tensors, values, whole, end, CENTERED, MOMENTUM, ROUNDING, BLOCK, True)


@triton.jit
def _rmsprop_block(
    tensors,
    values,
    start,
    end,
    CENTERED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    factor, lr, alpha, new, eps, weight_decay, momentum = values
    weight, grad = _weight_and_grad(tensors, factor, start, end, ROUNDING, BLOCK, MASKED)
    if weight_decay != 0:
        grad = grad + weight_decay * weight

    square = alpha * read_state(tensors, 0, start, end, BLOCK, MASKED) + new * (grad * grad)
    variance = square
    if CENTERED:
        mean = alpha * read_state(tensors, 2, start, end, BLOCK, MASKED) + new * grad
        variance = square - mean * mean
        write_state(tensors, 2, mean, start, end, ROUNDING, BLOCK, MASKED)
    direction = tl.div_rn(grad, tl.sqrt_rn(variance) + eps)
    if MOMENTUM:
        direction = momentum * read_state(tensors, 1, start, end, BLOCK, MASKED) + direction
        write_state(tensors, 1, direction, start, end, ROUNDING, BLOCK, MASKED)
    write_state(tensors, 0, square, start, end, ROUNDING, BLOCK, MASKED)
    write_weight(tensors, weight - lr * direction, start, end, ROUNDING, BLOCK, MASKED)


# -------------------------------------------------------------------------------------------- LARS


@triton.jit
def lars_norms(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squares of the weights and of the gradient of one chunk."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    factor = grad_factor(group)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_grad = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, whole, BLOCK):
        weight, grad = _weight_and_grad(tensors, factor, start, end, ROUNDING, BLOCK, False)
        of_weight += weight * weight
        of_grad += grad * grad
    if whole < end:
        weight, grad = _weight_and_grad(tensors, factor, whole, end, ROUNDING, BLOCK, True)
        of_weight += weight * weight
        of_grad += within(grad * grad, whole, end, BLOCK, True)  # the factor may be NaN
    write_sum(sums, of_weight, 0)
    write_sum(sums, of_grad, 1)


@triton.jit
def lars(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk by LARS, with the norms of its tensor."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    lr, momentum, weight_decay = hyper(group, 1), hyper(group, 2), hyper(group, 3)
    trust, eps = hyper(group, 4), hyper(group, 5)
    weight_norm = tl.sqrt_rn(read_sum(sums, row, 0))
    grad_norm = tl.sqrt_rn(read_sum(sums, row, 1))
    damped = tl.div_rn(grad_norm + weight_decay * weight_norm + eps, tl.maximum(trust, 1e-30))
    ratio = _trust_ratio(weight_norm, grad_norm, damped)
    values = (grad_factor(group), lr * ratio, momentum, weight_decay)
    for start in range(begin, whole, BLOCK):
        _lars_block(tensors, values, start, end, MOMENTUM, ROUNDING, BLOCK, False)
    if whole < end:
        _lars_block(tensors, values, whole, end, MOMENTUM, ROUNDING, BLOCK, True)


@triton.jit
def _lars_block(
    tensors,
    values,
    start,
    end,
    MOMENTUM: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    factor, size, momentum, weight_decay = values
    weight, grad = _weight_and_grad(tensors, factor, start, end, ROUNDING, BLOCK, MASKED)
    if weight_decay != 0:
        grad = grad + weight_decay * weight
    change = size * grad
    if MOMENTUM:
        change = momentum * read_state(tensors, 0, start, end, BLOCK, MASKED) + change
        write_state(tensors, 0, change, start, end, ROUNDING, BLOCK, MASKED)
    write_weight(tensors, weight - change, start, end, ROUNDING, BLOCK, MASKED)


@triton.jit
def _weight_and_grad(
    tensors, factor, start, end, ROUNDING: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    weight = read_weight(tensors, start, end, ROUNDING, BLOCK, MASKED)
    grad = read(tensors[1], start, end, BLOCK, MASKED) * factor
    return weight, grad


@triton.jit
def _trust_ratio(weight_norm, update_norm, damped):
    """Return `weight_norm / damped`; 1 where a norm is 0, so that a tensor can leave zero."""
    alive = (weight_norm > 0) & (update_norm > 0)
    return tl.where(alive, tl.div_rn(weight_norm, tl.where(alive, damped, 1.0)), 1.0)


# -------------------------------------------------------------------------------- moments of Adam


@triton.jit
def _moment_values(group):
    """Return the numbers that `_moments` reads."""
    beta1, new1 = share(group, 2)
    beta2, new2 = share(group, 3)
    return grad_factor(group), beta1, new1, beta2, new2


@triton.jit
def _moments(
    tensors,
    values,
    coupled_decay,
    start,
    end,
    AMSGRAD: tl.constexpr,
    WRITE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the two running means of Adam after this step, the second one its maximum."""
    factor, beta1, new1, beta2, new2 = values
    weight, grad = _weight_and_grad(tensors, factor, start, end, ROUNDING, BLOCK, MASKED)
    if coupled_decay != 0:
        grad = grad + coupled_decay * weight
    mean = beta1 * read_state(tensors, 0, start, end, BLOCK, MASKED) + new1 * grad
    square = beta2 * read_state(tensors, 1, start, end, BLOCK, MASKED) + new2 * (grad * grad)
    if WRITE:
        write_state(tensors, 0, mean, start, end, ROUNDING, BLOCK, MASKED)
        write_state(tensors, 1, square, start, end, ROUNDING, BLOCK, MASKED)
    if AMSGRAD:
        largest = read_state(tensors, 2, start, end, BLOCK, MASKED)
        square = tl.maximum(largest, square, propagate_nan=tl.PropagateNan.ALL)
        if WRITE:
            write_state(tensors, 2, square, start, end, ROUNDING, BLOCK, MASKED)
    return mean, square


@triton.jit
def _final_moments(
    tensors,
    values,
    coupled_decay,
    start,
    end,
    AMSGRAD: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return the running means in the second launch; the first one has written those in float32."""
    if tensors[2].dtype.element_ty == tl.float32:
        mean = read_state(tensors, 0, start, end, BLOCK, MASKED)
        square = read_state(tensors, 2 if AMSGRAD else 1, start, end, BLOCK, MASKED)
    else:
        mean, square = _moments(
            tensors, values, coupled_decay, start, end, AMSGRAD, True, ROUNDING, BLOCK, MASKED
        )
    return mean, square


# -------------------------------------------------------------------------------------------- LAMB


@triton.jit
def lamb_norms(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the squares of the weights and of the update of one chunk."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    moment_values, update_values = _moment_values(group), _lamb_values(row, group)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_update = tl.zeros([BLOCK], tl.float32)
    WRITE: tl.constexpr = tl.float32 == STATE_DTYPE
    for start in range(begin, whole, BLOCK):
        moments = _moments(
            tensors, moment_values, 0.0, start, end, False, WRITE, ROUNDING, BLOCK, False
        )
        weight, update = _lamb_update(
            tensors, moments, update_values, start, end, ROUNDING, BLOCK, False
        )
        of_weight += weight * weight
        of_update += update * update
    if whole < end:
        moments = _moments(
            tensors, moment_values, 0.0, whole, end, False, WRITE, ROUNDING, BLOCK, True
        )
        weight, update = _lamb_update(
            tensors, moments, update_values, whole, end, ROUNDING, BLOCK, True
        )
        of_weight += weight * weight
        of_update += within(update * update, whole, end, BLOCK, True)  # 0 / 0 with an eps of 0
    write_sum(sums, of_weight, 0)
    write_sum(sums, of_update, 1)


@triton.jit
def lamb(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk by LAMB, with the norms of its tensor."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    moment_values, update_values = _moment_values(group), _lamb_values(row, group)
    weight_norm = tl.sqrt_rn(read_sum(sums, row, 0))
    update_norm = tl.sqrt_rn(read_sum(sums, row, 1))
    size = hyper(group, 1) * _trust_ratio(weight_norm, update_norm, update_norm)
    for start in range(begin, whole, BLOCK):
        moments = _final_moments(
            tensors, moment_values, 0.0, start, end, False, ROUNDING, BLOCK, False
        )
        weight, update = _lamb_update(
            tensors, moments, update_values, start, end, ROUNDING, BLOCK, False
        )
        write_weight(tensors, weight - size * update, start, end, ROUNDING, BLOCK, False)
    if whole < end:
        moments = _final_moments(
            tensors, moment_values, 0.0, whole, end, False, ROUNDING, BLOCK, True
        )
        weight, update = _lamb_update(
            tensors, moments, update_values, whole, end, ROUNDING, BLOCK, True
        )
        write_weight(tensors, weight - size * update, whole, end, ROUNDING, BLOCK, True)


@triton.jit
def _lamb_values(row, group):
    """Return the numbers that `_lamb_update` reads: bias corrections, eps and weight decay."""
    step = step_count(row)
    first = 1 - tl.exp(step * tl.log(exact_hyper(group, 2)))
    second = 1 - tl.exp(step * tl.log(exact_hyper(group, 3)))
    root = tl.sqrt(second).to(tl.float32)
    return first.to(tl.float32), root, hyper(group, 4), hyper(group, 5)


@triton.jit
def _lamb_update(
    tensors,
    moments,
    values,
    start,
    end,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    mean, square = moments
    first, root_of_second, eps, weight_decay = values
    weight = read_weight(tensors, start, end, ROUNDING, BLOCK, MASKED)
    root = tl.div_rn(tl.sqrt_rn(square), root_of_second)
    update = tl.div_rn(tl.div_rn(mean, first), root + eps)
    if weight_decay != 0:
        update = update + weight_decay * weight
    return weight, update


# ------------------------------------------------------------------------------- LayerAdaptiveAdam


@triton.jit
def layer_adaptive_sizes(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the sizes of Adam's steps in one chunk."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    values, eps, decay = _moment_values(group), hyper(group, 4), _coupled_decay(group, DECOUPLED)
    of_size = tl.zeros([BLOCK], tl.float32)
    WRITE: tl.constexpr = tl.float32 == STATE_DTYPE
    for start in range(begin, whole, BLOCK):
        mean, square = _moments(
            tensors, values, decay, start, end, AMSGRAD, WRITE, ROUNDING, BLOCK, False
        )
        of_size += tl.div_rn(tl.abs(mean), tl.sqrt_rn(square) + eps)
    if whole < end:
        mean, square = _moments(
            tensors, values, decay, whole, end, AMSGRAD, WRITE, ROUNDING, BLOCK, True
        )
        size = tl.div_rn(tl.abs(mean), tl.sqrt_rn(square) + eps)
        of_size += within(size, whole, end, BLOCK, True)  # 0 / 0 with an eps of 0
    write_sum(sums, of_size, 0)


@triton.jit
def layer_adaptive(
    chunks,
    rows,
    packet,
    sums,
    WEIGHT_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one chunk by LayerAdaptiveAdam, with the mean size of Adam's steps in its tensor."""
    row, group, begin, whole, end = find_chunk(chunks, rows, packet, BLOCK)
    tensors = find_tensors(row, packet, WEIGHT_DTYPE, GRAD_DTYPE, STATE_DTYPE, ROUNDING, ALIGNED)
    values, decay = _moment_values(group), _coupled_decay(group, DECOUPLED)
    size = tl.div_rn(hyper(group, 1) * read_sum(sums, row, 0), numel(row).to(tl.float32))
    kept = (1 - exact_hyper(group, 1) * exact_hyper(group, 5)).to(tl.float32)
    for start in range(begin, whole, BLOCK):
        mean, _ = _final_moments(
            tensors, values, decay, start, end, AMSGRAD, ROUNDING, BLOCK, False
        )
        _layer_adaptive_block(
            tensors, mean, size, kept, start, end, DECOUPLED, ROUNDING, BLOCK, False
        )
    if whole < end:
        mean, _ = _final_moments(tensors, values, decay, whole, end, AMSGRAD, ROUNDING, BLOCK, True)
        _layer_adaptive_block(
            tensors, mean, size, kept, whole, end, DECOUPLED, ROUNDING, BLOCK, True
        )


@triton.jit
def _layer_adaptive_block(
    tensors,
    mean,
    size,
    kept,
    start,
    end,
    DECOUPLED: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    weight = read_weight(tensors, start, end, ROUNDING, BLOCK, MASKED)
    if DECOUPLED:
        weight = kept * weight
    write_weight(tensors, weight - size * mean, start, end, ROUNDING, BLOCK, MASKED)


@triton.jit
def _coupled_decay(group, DECOUPLED: tl.constexpr):
    """Return the weight decay that belongs to the gradient."""
    return 0.0 if DECOUPLED else hyper(group, 5)


#: whether `TRITON_INTERPRET` was set when these kernels were made
IS_INTERPRETED = not isinstance(rmsprop, triton.JITFunction)

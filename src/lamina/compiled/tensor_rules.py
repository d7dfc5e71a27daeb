"""The update rules that need something of each whole tensor first, as compiled loops.

A norm takes a pass of its own, `..._sums`, in which nothing is changed; `..._factors` makes one
number for each tensor of the sums of its chunks; and the update computes its elements anew, which
costs less than to keep them. Sums are made in float64. The arguments are those of `rules.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import as_number, claim, compiled, compiled_sums, load
from .rules import FOLLOWED, moments, penalty
from .weights16 import key_of, read_weight, write, write_weight


@compiled
def square_at(address: Any, index: Any, like: Any) -> Any:
    """Return the square of an element in float64."""
    value = np.float64(load(address, index, like, 1))
    return value * value


@compiled_sums
def squares_of(counter: Any, chunks: Any, addresses: Any, sums: Any, g: Any) -> None:
    """Sum the squares of each chunk, for norms."""
    while True:
        chunk = claim(counter)
        if chunk >= len(chunks):
            return
        address, start, end = addresses[chunks[chunk, 0]], chunks[chunk, 1], chunks[chunk, 2]
        # Four places at a time: the processor fetches memory from all of them at once.
        part = (end - start) // 4
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for i in range(start, start + part):
            a += square_at(address, i, g)
            b += square_at(address, i + part, g)
            c += square_at(address, i + 2 * part, g)
            d += square_at(address, i + 3 * part, g)
        for i in range(start + 4 * part, end):
            d += square_at(address, i, g)
        sums[chunk] = a + b + c + d


@compiled
def norms_of(chunks: Any, sums: Any, norms: Any) -> None:
    """Put the squares of all chunks together, in their order, so that threads change nothing."""
    norms[:] = 0.0
    for chunk in range(len(chunks)):
        norms[chunks[chunk, 0]] += sums[chunk]
    for tensor in range(len(norms)):
        norms[tensor] = np.sqrt(norms[tensor])


@compiled
def sum_chunks(chunks: Any, sums: Any, totals: Any) -> None:
    """Add the sums of the chunks of each tensor, in their order."""
    totals[:] = 0.0
    for chunk in range(len(chunks)):
        for column in range(sums.shape[1]):
            totals[chunks[chunk, 0], column] += sums[chunk, column]


@compiled
def ratio_of(weight: float, update: float, damped: float) -> float:
    """Return weight / damped; 1 where a norm is 0, so that a tensor of zeros can leave zero."""
    return weight / damped if weight > 0 and update > 0 else 1.0


@compiled_sums
def lars_sums(
    table: Any,
    sums: Any,
    theta: Any,
    g: Any,
    b: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Sum the squares of the weights and of the gradients."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n = table.settings[table.rows[tensor]]
        thetas, grads, extras = (
            table.addresses[0, tensor],
            table.addresses[1, tensor],
            table.addresses[3, tensor],
        )
        factor = as_number(n[0], theta)
        weights, slopes = 0.0, 0.0
        for i in range(start, end):
            weight, _ = read_weight(thetas, extras, i, theta, compensation, master)
            grad = factor * load(grads, i, g, 1)
            weights += np.float64(weight) * np.float64(weight)
            slopes += np.float64(grad) * np.float64(grad)
        sums[chunk, 0], sums[chunk, 1] = weights, slopes


@compiled
def lars_factors(table: Any, totals: Any, counts: Any) -> None:
    """Make lr * ratio for each tensor."""
    for tensor in range(len(table.factors)):
        n = table.settings[table.rows[tensor]]
        lr, decay, trust, eps = n[1], n[3], n[4], n[5]
        weight, slope = np.sqrt(totals[tensor, 0]), np.sqrt(totals[tensor, 1])
        damped = (slope + decay * weight + eps) / max(trust, 1e-30)
        table.factors[tensor] = lr * ratio_of(weight, slope, damped)


@compiled
def lars(
    table: Any,
    theta: Any,
    g: Any,
    b: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Update by LARS."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n, seed = table.settings[table.rows[tensor]], table.seeds[tensor]
        step = table.steps[tensor]
        key = key_of(seed, step, 0)
        key_b = key_of(seed, step, 1)
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        buffers = table.addresses[2, tensor]
        extras = table.addresses[3, tensor]
        factor = as_number(n[0], theta)
        momentum = as_number(n[2], theta)
        decay = as_number(n[3], theta)
        rate = as_number(table.factors[tensor], theta)
        followed = np.uint32(0)
        for i in range(start, end):
            weight, told = read_weight(thetas, extras, i, theta, compensation, master)
            followed = np.uint32(followed | told)
            change = rate * (factor * load(grads, i, g, 1) + penalty(decay, weight))
            if b is not None:
                change += momentum * load(buffers, i, b, 2)
                write(buffers, i, b, 2, noise, key_b, change)
            result = weight - change
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED


@compiled
def lamb_update(mean: Any, root: Any, decay: Any, weight: Any) -> Any:
    """Return u of LAMB from the corrected means."""
    return mean / root + penalty(decay, weight)


@compiled_sums
def lamb_sums(
    table: Any,
    sums: Any,
    theta: Any,
    g: Any,
    m: Any,
    v: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Sum the squares of the weights and of their updates."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n = table.settings[table.rows[tensor]]
        step = table.steps[tensor]
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        means = table.addresses[2, tensor]
        squares = table.addresses[3, tensor]
        extras = table.addresses[4, tensor]
        factor = as_number(n[0], theta)
        beta1 = as_number(n[2], theta)
        beta2 = as_number(n[3], theta)
        rest1, rest2 = as_number(1.0 - n[2], theta), as_number(1.0 - n[3], theta)
        eps = as_number(n[4], theta)
        decay = as_number(n[5], theta)
        first = as_number(1.0 / (1.0 - n[2] ** step), theta)
        second = as_number(1.0 / np.sqrt(1.0 - n[3] ** step), theta)
        weights, updates = 0.0, 0.0
        for i in range(start, end):
            weight, _ = read_weight(thetas, extras, i, theta, compensation, master)
            grad = factor * load(grads, i, g, 1)
            old_mean, old_square = load(means, i, m, 2), load(squares, i, v, 3)
            mean, square = moments(grad, old_mean, old_square, beta1, rest1, beta2, rest2)
            update = lamb_update(mean * first, np.sqrt(square) * second + eps, decay, weight)
            weights += np.float64(weight) * np.float64(weight)
            updates += np.float64(update) * np.float64(update)
        sums[chunk, 0], sums[chunk, 1] = weights, updates


@compiled
def lamb_factors(table: Any, totals: Any, counts: Any) -> None:
    """Make lr * |theta| / |u| for each tensor."""
    for tensor in range(len(table.factors)):
        weight, update = np.sqrt(totals[tensor, 0]), np.sqrt(totals[tensor, 1])
        table.factors[tensor] = table.settings[table.rows[tensor], 1] * ratio_of(
            weight, update, update
        )


@compiled
def lamb(
    table: Any,
    theta: Any,
    g: Any,
    m: Any,
    v: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Update by LAMB."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n, seed = table.settings[table.rows[tensor]], table.seeds[tensor]
        step = table.steps[tensor]
        key = key_of(seed, step, 0)
        key_m, key_v = key_of(seed, step, 1), key_of(seed, step, 2)
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        means = table.addresses[2, tensor]
        squares = table.addresses[3, tensor]
        extras = table.addresses[4, tensor]
        factor = as_number(n[0], theta)
        beta1 = as_number(n[2], theta)
        beta2 = as_number(n[3], theta)
        rest1, rest2 = as_number(1.0 - n[2], theta), as_number(1.0 - n[3], theta)
        eps = as_number(n[4], theta)
        decay = as_number(n[5], theta)
        first = as_number(1.0 / (1.0 - n[2] ** step), theta)
        second = as_number(1.0 / np.sqrt(1.0 - n[3] ** step), theta)
        rate = as_number(table.factors[tensor], theta)
        followed = np.uint32(0)
        for i in range(start, end):
            weight, told = read_weight(thetas, extras, i, theta, compensation, master)
            followed = np.uint32(followed | told)
            grad = factor * load(grads, i, g, 1)
            old_mean, old_square = load(means, i, m, 2), load(squares, i, v, 3)
            mean, square = moments(grad, old_mean, old_square, beta1, rest1, beta2, rest2)
            update = lamb_update(mean * first, np.sqrt(square) * second + eps, decay, weight)
            write(means, i, m, 2, noise, key_m, mean)
            write(squares, i, v, 3, noise, key_v, square)
            result = weight - rate * update
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED


@compiled_sums
def layer_adaptive_sums(
    table: Any,
    sums: Any,
    theta: Any,
    g: Any,
    m: Any,
    v: Any,
    x: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Sum the sizes of Adam's steps."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n = table.settings[table.rows[tensor]]
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        means = table.addresses[2, tensor]
        squares = table.addresses[3, tensor]
        largest = table.addresses[4, tensor]
        extras = table.addresses[5, tensor]
        factor = as_number(n[0], theta)
        beta1 = as_number(n[2], theta)
        beta2 = as_number(n[3], theta)
        rest1, rest2 = as_number(1.0 - n[2], theta), as_number(1.0 - n[3], theta)
        eps = as_number(n[4], theta)
        coupled = as_number(n[5], theta)
        total = 0.0
        for i in range(start, end):
            weight, _ = read_weight(thetas, extras, i, theta, compensation, master)
            grad = factor * load(grads, i, g, 1) + penalty(coupled, weight)
            old_mean, old_square = load(means, i, m, 2), load(squares, i, v, 3)
            mean, square = moments(grad, old_mean, old_square, beta1, rest1, beta2, rest2)
            if x is not None:
                square = np.maximum(load(largest, i, x, 4), square)
            total += np.float64(np.abs(mean) / (np.sqrt(square) + eps))
        sums[chunk, 0] = total


@compiled
def layer_adaptive_factors(table: Any, totals: Any, counts: Any) -> None:
    """Make the step size of each tensor: lr times the mean size of Adam's steps."""
    for tensor in range(len(table.factors)):
        lr = table.settings[table.rows[tensor], 1]
        table.factors[tensor] = lr * totals[tensor, 0] / max(counts[tensor], 1)


@compiled
def layer_adaptive(
    table: Any,
    theta: Any,
    g: Any,
    m: Any,
    v: Any,
    x: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Update by LayerAdaptiveAdam."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n, seed = table.settings[table.rows[tensor]], table.seeds[tensor]
        step = table.steps[tensor]
        key = key_of(seed, step, 0)
        key_m, key_v, key_x = key_of(seed, step, 1), key_of(seed, step, 2), key_of(seed, step, 3)
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        means = table.addresses[2, tensor]
        squares = table.addresses[3, tensor]
        largest = table.addresses[4, tensor]
        extras = table.addresses[5, tensor]
        factor = as_number(n[0], theta)
        beta1 = as_number(n[2], theta)
        beta2 = as_number(n[3], theta)
        rest1, rest2 = as_number(1.0 - n[2], theta), as_number(1.0 - n[3], theta)
        coupled = as_number(n[5], theta)
        kept = as_number(1.0 - n[1] * n[6], theta)
        size = as_number(table.factors[tensor], theta)
        followed = np.uint32(0)
        for i in range(start, end):
            weight, told = read_weight(thetas, extras, i, theta, compensation, master)
            followed = np.uint32(followed | told)
            grad = factor * load(grads, i, g, 1) + penalty(coupled, weight)
            old_mean, old_square = load(means, i, m, 2), load(squares, i, v, 3)
            mean, square = moments(grad, old_mean, old_square, beta1, rest1, beta2, rest2)
            write(means, i, m, 2, noise, key_m, mean)
            write(squares, i, v, 3, noise, key_v, square)
            if x is not None:
                square = np.maximum(load(largest, i, x, 4), square)
                write(largest, i, x, 4, noise, key_x, square)
            result = kept * weight - size * mean
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED

"""The update rules that go by elements, as compiled loops: each is read once and written once.

Several threads call a function at the same time, and each of them takes one chunk after the other
until none is left. The equations are in `lamina.algorithms`, with the readable rules that these
loops are tested against.

Args of all functions:
    table: the arrays of `kernels/native/arrays.py`.
        counter: the number of the next chunk, shared by the threads.
        chunks: rows of tensor, first element and end.
        addresses: a row for each stream, with the address of each tensor: the weights, the
            gradients, the state, and last the compensation or master copy of 16-bit weights.
        steps: the step count of each tensor, this update included.
        rows: the row of `settings` of each tensor.
        settings: the numbers of each parameter group, in the order in which they are read below.
            The first is the factor of the gradients: the clip factor, negative to maximize.
        seeds: what makes the random bits of each tensor its own.
        flags: NEW tells of a buffer that begins now; FOLLOWED is set where others have changed a
            16-bit weight.
        factors: a number for each tensor, for the rules in `tensor_rules.py`.
    theta, g, ...: an element of each stream, whose type tells how it is read; None where there is
        no such stream, so that the code for it is left out.
    compensation, master, chance, noise: as in `weights16.py`; `noise` is `chance` for the state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import as_number, claim, compiled, load, store
from .weights16 import key_of, read_weight, write, write_weight

NEW, FOLLOWED = 1, 2


@compiled
def count(addresses: Any, steps: Any) -> None:
    """Add 1 to the step count of each tensor, a float32."""
    like = np.float32(0)
    for tensor in range(len(steps)):
        step = load(addresses[tensor], 0, like, 1) + np.float32(1)
        store(addresses[tensor], 0, like, 1, step)
        steps[tensor] = np.int64(step)


@compiled
def penalty(decay: Any, weight: Any) -> Any:
    """Return what a weight adds to its gradient; 0 without decay, of an infinite weight too."""
    return decay * weight if decay != 0 else decay


@compiled
def moments(
    grad: Any, mean: Any, square: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any
) -> Any:
    """Return the two running means of Adam; `rest` is 1 - beta, rounded once."""
    return beta1 * mean + rest1 * grad, beta2 * square + rest2 * (grad * grad)


@compiled
def sgd(
    table: Any,
    theta: Any,
    g: Any,
    b: Any,
    nesterov: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Update by SGD."""
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
        is_new = (table.flags[tensor] & NEW) != 0
        factor = as_number(n[0], theta)
        lr = as_number(n[1], theta)
        momentum = as_number(n[2], theta)
        kept = as_number(0.0 if is_new else n[2], theta)
        taken = as_number(1.0 if is_new else 1.0 - n[3], theta)
        decay = as_number(n[4], theta)
        followed = np.uint32(0)
        for i in range(start, end):
            weight, told = read_weight(thetas, extras, i, theta, compensation, master)
            followed = np.uint32(followed | told)
            direction = factor * load(grads, i, g, 1) + penalty(decay, weight)
            if b is not None:
                buffer = kept * load(buffers, i, b, 2) + taken * direction
                write(buffers, i, b, 2, noise, key_b, buffer)
                if nesterov is not None:
                    direction += momentum * buffer
                else:
                    direction = buffer
            result = weight - lr * direction
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED


@compiled
def rmsprop(
    table: Any,
    theta: Any,
    g: Any,
    v: Any,
    b: Any,
    a: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    noise: Any,
) -> None:
    """Update by RMSprop."""
    while True:
        chunk = claim(table.counter)
        if chunk >= len(table.chunks):
            return
        tensor, start, end = table.chunks[chunk, 0], table.chunks[chunk, 1], table.chunks[chunk, 2]
        n, seed = table.settings[table.rows[tensor]], table.seeds[tensor]
        step = table.steps[tensor]
        key = key_of(seed, step, 0)
        key_v, key_b, key_a = key_of(seed, step, 1), key_of(seed, step, 2), key_of(seed, step, 3)
        thetas = table.addresses[0, tensor]
        grads = table.addresses[1, tensor]
        squares = table.addresses[2, tensor]
        buffers = table.addresses[3, tensor]
        means = table.addresses[4, tensor]
        extras = table.addresses[5, tensor]
        factor = as_number(n[0], theta)
        lr = as_number(n[1], theta)
        alpha = as_number(n[2], theta)
        rest = as_number(1.0 - n[2], theta)
        eps = as_number(n[3], theta)
        decay = as_number(n[4], theta)
        momentum = as_number(n[5], theta)
        followed = np.uint32(0)
        for i in range(start, end):
            weight, told = read_weight(thetas, extras, i, theta, compensation, master)
            followed = np.uint32(followed | told)
            grad = factor * load(grads, i, g, 1) + penalty(decay, weight)
            square = alpha * load(squares, i, v, 2) + rest * (grad * grad)
            write(squares, i, v, 2, noise, key_v, square)
            variance = square
            if a is not None:
                mean = alpha * load(means, i, a, 4) + rest * grad
                write(means, i, a, 4, noise, key_a, mean)
                variance = square - mean * mean
            direction = grad / (np.sqrt(variance) + eps)
            if b is not None:
                direction += momentum * load(buffers, i, b, 3)
                write(buffers, i, b, 3, noise, key_b, direction)
            result = weight - lr * direction
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED


@compiled
def adam(
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
    """Update by Adam or AdamW; the streams are m, v and, for amsgrad, the largest v."""
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
        eps = as_number(n[4], theta)
        coupled = as_number(n[5], theta)
        kept = as_number(1.0 - n[1] * n[6], theta)
        size = as_number(n[1] / (1.0 - n[2] ** step), theta)
        root = as_number(np.sqrt(1.0 - n[3] ** step), theta)
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
            result = kept * weight - size * mean / (np.sqrt(square) / root + eps)
            write_weight(thetas, extras, i, theta, compensation, master, chance, key, result)
        if followed:
            table.flags[tensor] |= FOLLOWED

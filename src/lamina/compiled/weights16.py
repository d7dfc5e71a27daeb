"""How compiled kernels read and write 16-bit weights; defined in `lamina.algorithms.rounding`.

The form is chosen by what is None, so that the code for all others is left out: `compensation` is
there for `rounding="kahan"`, `master` for `rounding="master"`, and `chance` for what is rounded up
or down by chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .access import compiled, from_bits, load, nearest, store, to_bits

_GOLDEN = np.uint32(0x9E3779B9)
#: the largest finite bfloat16, and the smallest absolute value that is rounded to infinity
_LARGEST = np.float32((2 - 2**-7) * 2.0**127)
_RANGE = np.float32((2 - 2**-8) * 2.0**127)


@compiled
def mix(x: Any) -> Any:
    """Return the hash of a 32-bit word (lowbias32)."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x846CA68B))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def key_of(seed: Any, step: Any, stream: Any) -> Any:
    """Return the word that makes the bits of one tensor in one update its own."""
    key = mix(np.uint32(np.uint32(seed) + _GOLDEN))
    key = mix(np.uint32((key ^ np.uint32(step)) + _GOLDEN))
    return mix(np.uint32((key ^ np.uint32(stream)) + _GOLDEN))


@compiled
def by_chance(value: Any, i: Any, key: Any) -> Any:
    """Round a float32 up or down to a bfloat16, as a float32; the mean is the value."""
    low = np.uint32(np.uint32(i) ^ key)
    bits = mix(np.uint32(low + np.uint32(np.uint32(i >> 32) * _GOLDEN)))
    within = min(max(value, -_LARGEST), _LARGEST)
    pattern = np.uint32(to_bits(within) + (bits & np.uint32(0xFFFF)))
    rounded = from_bits(np.uint32(pattern & np.uint32(0xFFFF0000)))
    return rounded if abs(value) < _RANGE else value


@compiled
def read_weight(
    thetas: Any, extras: Any, i: Any, theta: Any, compensation: Any, master: Any
) -> Any:
    """Return the weight from which a rule begins, and 1 if others have changed it, else 0."""
    weight = load(thetas, i, theta, 0)
    if compensation is not None:
        rest = load(extras, i, compensation, 7)
        changed = nearest(weight + rest * np.float32(127 / 128)) != weight
        told = np.uint32(changed & (weight == weight))
        return weight + (np.float32(0) if changed else rest), told
    if master is not None:
        whole = load(extras, i, master, 7)
        changed = nearest(whole) != weight
        told = np.uint32(changed & (weight == weight))
        return (weight if changed else whole), told
    return weight, np.uint32(0)


@compiled
def write_weight(
    thetas: Any,
    extras: Any,
    i: Any,
    theta: Any,
    compensation: Any,
    master: Any,
    chance: Any,
    key: Any,
    weight: Any,
) -> None:
    """Write the result of a rule into a weight, and what rounding leaves into the state."""
    if compensation is not None:
        rest = weight - nearest(weight)
        # The difference of an infinite number or a NaN is no number.
        store(extras, i, compensation, 7, rest if rest - rest == 0 else np.float32(0))
    if master is not None:
        store(extras, i, master, 7, weight)
    write(thetas, i, theta, 0, chance, key, weight)


@compiled
def write(
    addresses: Any, i: Any, like: Any, stream: Any, chance: Any, key: Any, value: Any
) -> None:
    """Write a number, rounded up or down by chance, or to the nearest without `chance`."""
    if chance is not None:
        value = by_chance(value, i, key)
    store(addresses, i, like, stream, value)

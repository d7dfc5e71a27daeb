"""How float32 results become 16-bit weights: the definition, and every kernel that follows it."""

from __future__ import annotations

import math
import struct
import zlib
from fractions import Fraction

import pytest
import torch

import lamina as lm
from lamina import kernels, optim
from lamina._util import blocks
from lamina.algorithms.base import HALF
from lamina.algorithms.rounding import (
    key_of,
    places_of,
    random_bits,
    round_stochastically,
    rounding_of,
)
from reference.table import ROWS

HOWS = ("stochastic", "kahan", "master")
rows = pytest.mark.parametrize("row", ROWS, ids=str)
dtypes = pytest.mark.parametrize("dtype", HALF, ids=str)
hows = pytest.mark.parametrize("how", HOWS)


# --- the definition, written once more for one number ------------------------------------------


def mix(x: int) -> int:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x ^= x >> shift
        x = x * factor % 2**32
    return x


def bits_of(seed: int, step: int, stream: int, place: int) -> int:
    h = 0
    for word in (seed, step, stream):
        h = mix(((h ^ word) + 0x9E3779B9) % 2**32)
    return mix((((place % 2**32) ^ h) + place // 2**32 * 0x9E3779B9) % 2**32)


def grid(dtype: torch.dtype, size: Fraction) -> Fraction:
    """How far from a finite number of some size, below the largest, the next one lies."""
    digits, lowest = (8, -126) if dtype is torch.bfloat16 else (11, -14)
    exponent = max(math.frexp(size)[1] - 1, lowest)
    return Fraction(2) ** (exponent - digits + 1)


def rounded(value: float, bits: int, dtype: torch.dtype) -> float:
    """Of a finite float32 that does not round to infinity."""
    size, sign = Fraction(abs(value)), math.copysign(1.0, value)
    largest = Fraction(torch.finfo(dtype).max)
    if size > largest:
        return sign * float(largest)
    dropped = 16 if dtype is torch.bfloat16 else 13
    if dtype is torch.float16 and size < Fraction(2) ** -14:
        size = Fraction(as_float32(float(size) + 2.0**-14)) - Fraction(2) ** -14
    step = grid(dtype, size)
    below = size // step * step
    rest = (size - below) / step  # as a whole number of 2^-dropped
    up = rest * 2**dropped + bits % 2**dropped >= 2**dropped
    return sign * float(below + (step if up else 0))


def as_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_the_bits_are_those_of_the_definition():
    places = torch.tensor([0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**40])
    for seed, step, stream in ((0, 1, 0), (zlib.crc32(b"0.weight"), 123_456, 3)):
        wanted = [signed(bits_of(seed, step, stream, place)) for place in places.tolist()]
        assert random_bits(places, key_of(seed, step, stream)).tolist() == wanted
        key = key_of(seed, torch.tensor(step), stream)  # as on an accelerator
        assert random_bits(places, key).tolist() == wanted
        assert random_bits(places[:5].int(), key).tolist() == wanted[:5]
        assert random_bits(places[:5].int(), int(key)).tolist() == wanted[:5]


@dtypes
def test_rounding_is_that_of_the_definition(dtype):
    generator = torch.Generator().manual_seed(0)
    low, high = (-140, 127) if dtype is torch.bfloat16 else (-40, 15)
    exponents = torch.arange(low, high + 1).repeat(8)
    values = torch.ldexp(1 + torch.rand(len(exponents), generator=generator), exponents)
    values[::2] *= -1
    largest = torch.finfo(dtype).max
    near = torch.tensor([largest, -largest, largest * (1 + 2**-12), 0.0, -0.0, 2.0**-14])
    values = torch.cat([values, near, values.to(dtype).float()])
    values = values[values.to(dtype).isfinite()]
    bits = torch.randint(-(2**31), 2**31, values.shape, generator=generator).int()
    found = round_stochastically(values, bits.clone(), dtype)
    wanted = [
        rounded(value, word % 2**32, dtype)
        for value, word in zip(values.tolist(), bits.tolist(), strict=True)
    ]
    assert found.dtype is dtype
    assert found.tolist() == wanted
    assert torch.equal(found.signbit(), values.signbit())


@dtypes
@pytest.mark.parametrize("word", [0, -1, 0x7FFF])
def test_what_is_not_finite_stays_and_nothing_else_overflows(dtype, word):
    largest = torch.finfo(dtype).max
    half = largest * (1 + 2.0**-9 if dtype is torch.bfloat16 else 1 + 2.0**-12)
    limit = torch.tensor((2 - 2.0**-8) * 2.0**127 if dtype is torch.bfloat16 else 65520.0)
    below = torch.nextafter(limit, torch.tensor(0.0)).item()
    values = torch.tensor([math.inf, -math.inf, math.nan, limit.item(), below, -below, largest])
    assert half <= limit
    found = round_stochastically(values, torch.full((7,), word, dtype=torch.int32), dtype)
    assert found[2].isnan()
    wanted = [math.inf, -math.inf, math.inf, largest, -largest, largest]
    assert [*found[:2].tolist(), *found[3:].tolist()] == wanted
    assert torch.equal(found[[0, 1, 3, 4]], values.to(dtype)[[0, 1, 3, 4]])  # as nearest has it


@dtypes
def test_rounding_is_unbiased_at_every_exponent(dtype):
    low, high, count = (-126, 127, 4000) if dtype is torch.bfloat16 else (-30, 15, 4000)
    places = torch.arange(count, dtype=torch.int32)
    for exponent in range(low, high):
        value = torch.tensor(1.2371 * 2.0**exponent)
        bits = random_bits(places, key_of(zlib.crc32(b"w"), exponent % 2**32, 0))
        found = round_stochastically(value.expand(count), bits, dtype).double()
        step = float(grid(dtype, Fraction(value.item())))
        below = value.item() // step * step
        share = (value.item() - below) / step
        assert set(found.tolist()) <= {below, below + step}
        sigma = step * math.sqrt(share * (1 - share) / count)
        assert abs(found.mean().item() - value.item()) < 5 * sigma


def test_places_are_distances_in_memory():
    whole = torch.zeros(6, 8, dtype=torch.bfloat16)
    origin = 3
    for view in (whole, whole.t(), whole[1:, ::3], whole[2], whole.flatten()[7:20], whole[:0]):
        places = places_of(view, origin)
        assert places.shape == view.shape
        numbered = torch.arange(48).as_strided(view.shape, view.stride(), view.storage_offset())
        assert torch.equal(places.long(), numbered - origin)


# --- the kernels -------------------------------------------------------------------------------


def params_of(row, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Contiguous, with gaps, transposed, channels last; smaller and larger than a block."""
    torch.manual_seed(0)
    found = [torch.randn(7, 5), torch.randn(9, 12)[:, ::3], torch.randn(5, 9).t()]
    found += [torch.randn(3, 4, 2, 3).to(memory_format=torch.channels_last), torch.randn(40, 3)]
    if row.name != "Muon":
        found += [torch.randn(()), torch.randn(0), torch.randn(77)]
    return [torch.nn.Parameter(_like(each, dtype)) for each in found]


def _like(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    whole = torch.zeros(param.untyped_storage().nbytes() // 4, dtype=dtype)
    return whole.as_strided(param.shape, param.stride()).copy_(param)


def trained(row, dtype, how, prefer, *, block=10**9, steps=3, scale=None, **options):
    blocks.BLOCK = block
    params = params_of(row, dtype)
    named = [(f"p{place}", param) for place, param in enumerate(params)]
    settings = {**row.options, "rounding": how, **options}
    optimizer = getattr(optim, row.name)(named, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        batches = optimizer._collect(optimizer.param_groups)
        batches[0].scale = scale
        assert kernels.choose(batches[0], prefer)[0].name == prefer
        kernels.apply(batches, prefer)
        optimizer._store_new_state(batches)
        assert not batches[0].followed
    return params, [dict(optimizer.state[param]) for param in params]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", blocks.BLOCK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def apart(one, other) -> tuple[int, float]:
    """How many numbers differ, and the largest difference in the last place of the larger."""
    count, most = 0, 0.0
    for a, b in zip(one, other, strict=True):
        assert a.dtype is b.dtype
        unequal = a != b
        count += int(unequal.sum())
        size = torch.maximum(a.detach().abs(), b.detach().abs())[unequal].float()
        if size.numel():
            change = (a.detach().float() - b.detach().float())[unequal].abs()
            most = max(most, float((change / size / torch.finfo(a.dtype).eps).max()))
    return count, most


@rows
@hows
def test_kernels_agree(row, how):
    """All but what float32 itself rounds otherwise, which may move a number to the next one."""
    dtype = HALF[(ROWS.index(row) + HOWS.index(how)) % 2]
    given = {"scale": torch.tensor(0.3), "steps": 2}
    oracle, its_state = trained(row, dtype, how, "readable", **given)
    for kernel, block in (("readable", 48), ("blockwise", 48)):
        params, state = trained(row, dtype, how, kernel, block=block, **given)
        count, most = apart(params, oracle)
        assert count <= 4, f"of {sum(param.numel() for param in oracle)}"
        assert most <= 1.01
        for mine, theirs in zip(state, its_state, strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert mine[key].dtype is theirs[key].dtype


@dtypes
@hows
@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}])
def test_kernels_agree_to_the_bit(dtype, how, options):
    """Where float32 rounds nothing: sums of a few numbers with few digits."""
    row = next(row for row in ROWS if row.name == "SGD")
    given = {"lr": 2**-7, "steps": 1, **options}
    oracle, its_state = trained(row, dtype, how, "readable", **given)
    for kernel, block in (("readable", 48), ("blockwise", 48), ("blockwise", 10**9)):
        params, state = trained(row, dtype, how, kernel, block=block, **given)
        assert apart(params, oracle) == (0, 0.0)
        for mine, theirs in zip(state, its_state, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@dtypes
@pytest.mark.parametrize("kernel", ["readable", "blockwise"])
@pytest.mark.parametrize("block", [48, 10**9])
def test_a_step_is_that_of_the_definition(dtype, kernel, block):
    row = next(row for row in ROWS if row.name == "SGD")
    options = {"lr": 2**-7, "momentum": 0.5, "steps": 1}
    before = [param.detach().clone() for param in params_of(row, dtype)]
    params, states = trained(row, dtype, "stochastic", kernel, block=block, **options)
    for place, (param, old, state) in enumerate(zip(params, before, states, strict=True)):
        seed = zlib.crc32(f"p{place}".encode())
        results = old.float() - 2**-7 * param.grad.float()
        places = places_of(param.detach(), 0).flatten().tolist()
        for stream, values, found in (
            (0, results, param),
            (1, param.grad.float(), state["momentum_buffer"]),
        ):
            wanted = [
                rounded(value, bits_of(seed, 1, stream, at), dtype)
                for value, at in zip(values.flatten().tolist(), places, strict=True)
            ]
            assert found.flatten().tolist() == wanted


def test_bits_differ_by_parameter_step_and_state():
    words = {
        random_bits(torch.arange(4), key_of(seed, step, stream)).sum().item()
        for seed in (0, 1, zlib.crc32(b"a"))
        for step in (1, 2, 3)
        for stream in (0, 1, 2)
    }
    assert len(words) == 27


def test_without_names_the_position_tells_parameters_apart():
    def moved(*, names: bool) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2)]
        given = [(str(place), param) for place, param in enumerate(params)] if names else params
        optimizer = optim.SGD(given, lr=2**-10, rounding="stochastic")
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        return params

    for names in (False, True):
        first, second = moved(names=names)
        assert not torch.equal(first, second)
        assert all(
            torch.equal(a, b) for a, b in zip(moved(names=names), (first, second), strict=True)
        )
    assert torch.equal(
        moved(names=False)[1],
        round_stochastically(
            torch.full((64,), 1 - 2**-10),
            random_bits(torch.arange(64), key_of(1, 1, 0)),
            torch.bfloat16,
        ),
    )


@hows
@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_fast_kernels_that_round_to_the_nearest_refuse(how, name):
    param = torch.nn.Parameter(torch.randn(8).bfloat16())
    param.grad = torch.ones_like(param)
    optimizer = getattr(optim, name)([("w", param)], rounding=how)
    [batch] = optimizer._collect(optimizer.param_groups)
    for prefer in (None, "fused", "foreach"):
        kernel, reason = kernels.choose(batch, prefer)
        assert kernel.name in ("native", "blockwise", "readable")
        if prefer is not None:
            assert f"'w' is bfloat16 with rounding={how!r}" in reason or "no f" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@hows
def test_wide_parameters_train_as_ever(dtype, how):
    row = next(row for row in ROWS if row.name == "AdamW")
    assert rounding_of(torch.zeros(1, dtype=dtype), {"rounding": how}) is None
    kernel = "readable"
    plain, its_state = trained(row, dtype, None, kernel)
    given, state = trained(row, dtype, how, kernel)
    assert apart(given, plain) == (0, 0.0)
    assert [each.keys() for each in state] == [each.keys() for each in its_state]


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("prefer", [{}, {"foreach": False}, {"foreach": True}])
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "LAMB", "LayerAdaptiveAdam"])
def test_a_mean_of_squares_in_16_bits_shrinks_beside_float32_weights(name, prefer, state_dtype):
    """To the nearest it would stay at its highest value, as a step takes a thousandth of it."""
    param = torch.nn.Parameter(torch.ones(64, 64))
    given = {"alpha": 0.999} if name == "RMSprop" else {}
    optimizer = getattr(lm.optim, name)(
        [("weight", param)], lr=1e-3, state_dtype=state_dtype, **given, **prefer
    )
    key = "square_avg" if name == "RMSprop" else "exp_avg_sq"
    param.grad = torch.ones_like(param)
    for _ in range(5):
        optimizer.step()
    before = optimizer.state[param][key].float().mean().item()
    assert optimizer.state[param][key].dtype is getattr(torch, state_dtype)
    param.grad = torch.zeros_like(param)
    for _ in range(200):
        optimizer.step()
    after = optimizer.state[param][key].float().mean().item()
    assert after == pytest.approx(before * 0.999**200, rel=0.02)


def test_all_kernels_round_the_state_of_float32_weights_alike():
    ends = []
    for prefer in ({}, {"foreach": False}):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, 7))
        optimizer = lm.optim.AdamW(
            [("weight", param)], lr=1e-2, state_dtype="bfloat16", amsgrad=True, **prefer
        )
        for _ in range(20):
            param.grad = torch.randn(50, 7)
            optimizer.step()
        ends.append(optimizer.state[param])
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        apart = ends[0][key] != ends[1][key]  # where a float32 result differs in its last bit
        assert apart.float().mean() < 0.02

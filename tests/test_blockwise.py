"""16-bit parameters, block by block: the numbers of the readable rule, and little memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lamina._util import blocks
from lamina.algorithms import ALGORITHMS
from lamina.algorithms.base import HALF, Batch
from lamina.gradients.norms import each_norm
from lamina.kernels import apply, blockwise, choose
from reference.runner import assert_close, batch_of
from reference.table import ROWS

BLOCK = 16
rows = pytest.mark.parametrize("row", ROWS, ids=str)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch, one_thread):
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)


def params_of(row, dtype: torch.dtype) -> list[torch.Tensor]:
    """Sizes around a block, several blocks, no elements; transposed, with gaps, channels last."""
    torch.manual_seed(0)
    found = [torch.randn(n, 1) for n in (BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 1, 1, 2)]
    found += [torch.randn(7, 5), torch.randn(5, 9).t(), torch.randn(9, 12)[:, ::3]]
    found += [torch.randn(3, 4, 2, 3).to(memory_format=torch.channels_last)]
    if row.name != "Muon":
        found += [torch.randn(()), torch.randn(0), torch.randn(5, 0)]
    return [_like(param, dtype) for param in found]


def _like(param: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The parameter in another dtype, with its gaps."""
    whole = torch.zeros(param.untyped_storage().nbytes() // param.element_size(), dtype=dtype)
    return whole.as_strided(param.shape, param.stride()).copy_(param)


def gradients(params: list[torch.Tensor], t: int, other_layout: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    found = []
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        found.append(grad if other_layout else torch.empty_like(param).copy_(grad))
    return found


def trained(row, dtype, prefer, *, state=None, other_layout=False, scale=None, steps=3) -> Batch:
    algorithm = ALGORITHMS[row.name]
    hyper = {**algorithm.defaults, **row.options}
    if state is not None:
        hyper["state_dtype"] = str(state).removeprefix("torch.")
    batch = batch_of(algorithm, params_of(row, dtype), hyper, scale)
    for values in batch.columns.values() if state else ():
        values[:] = [value.to(state) for value in values]
    for t in range(steps):
        batch.grads = gradients(batch.params, t, other_layout)
        kernel = choose(batch, prefer)[0].name
        assert kernel == (prefer or kernel)
        apply([batch], prefer)
    return batch


def assert_same(given: Batch, oracle: Batch, tolerance: float) -> None:
    assert_close(given.params, oracle.params, tolerance)
    assert given.columns.keys() == oracle.columns.keys()
    for key, values in given.columns.items():
        assert [value.dtype for value in values] == [v.dtype for v in oracle.columns[key]]
        assert_close(values, oracle.columns[key], tolerance)


def tolerance_of(row, dtype: torch.dtype) -> float:
    """One rounding of the parameters, or of the bfloat16 inside Muon."""
    return 2**-8 if row.name == "Muon" or dtype is torch.bfloat16 else 2**-11


@rows
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("state", [None, torch.float32], ids=["state", "float32"])
def test_blocks_are_the_readable_rule(row, dtype, state, monkeypatch):
    given = trained(row, dtype, "blockwise", state=state)
    monkeypatch.setattr(blocks, "BLOCK", 10**9)
    oracle = trained(row, dtype, "readable", state=state)
    assert_same(given, oracle, tolerance_of(row, dtype))
    assert given.has_new_state == oracle.has_new_state


@rows
@pytest.mark.parametrize("factor", [torch.float32, torch.float64])
def test_gradients_in_another_layout_and_a_clip_factor(row, factor, monkeypatch):
    how = {"other_layout": True, "scale": torch.tensor(0.3, dtype=factor)}
    given = trained(row, torch.bfloat16, "blockwise", **how)
    monkeypatch.setattr(blocks, "BLOCK", 10**9)
    oracle = trained(row, torch.bfloat16, "readable", **how)
    assert_same(given, oracle, tolerance_of(row, torch.bfloat16))


@pytest.mark.parametrize("row", [row for row in ROWS if not row.whole], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_the_readable_rule_in_blocks_is_itself(row, dtype, monkeypatch):
    given = trained(row, dtype, "readable", other_layout=True)
    monkeypatch.setattr(blocks, "BLOCK", 10**9)
    oracle = trained(row, dtype, "readable", other_layout=True)
    assert_same(given, oracle, {2: 2**-11, 4: 1e-6, 8: 1e-12}[dtype.itemsize])


@pytest.mark.parametrize("prefer", [None, "readable"])
def test_momentum_that_begins_rests_and_comes_back(prefer, monkeypatch):
    results = []
    for length, kind in ((BLOCK, prefer), (10**9, "readable")):
        monkeypatch.setattr(blocks, "BLOCK", length)
        params = [torch.ones(n, dtype=torch.bfloat16) for n in (3, 50)]
        batch = batch_of(ALGORITHMS["SGD"], params, {**ALGORITHMS["SGD"].defaults, "lr": 0.1})
        for t, momentum in enumerate([0.0, 0.9, 0.9, 0.0, 0.5]):
            batch.hyper = {**batch.hyper, "momentum": momentum, "dampening": 0.25}
            batch.grads = gradients(params, t, False)
            apply([batch], kind)
        results.append(batch)
    one, other = results
    assert_same(one, other, 2**-8)


def test_one_buffer_of_two_begins_later():
    params = [torch.ones(40).bfloat16(), torch.ones(5).bfloat16()]
    batch = batch_of(ALGORITHMS["SGD"], params, {**ALGORITHMS["SGD"].defaults, "momentum": 0.5})
    batch.columns = {"momentum_buffer": [torch.full((40,), 2.0).bfloat16(), None]}
    batch.grads = [torch.full_like(param, 0.25) for param in params]
    apply([batch])
    first, second = batch.columns["momentum_buffer"]
    assert torch.equal(first, torch.full_like(params[0], 1.25))
    assert torch.equal(second, batch.grads[1])


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, float("inf")])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_norms_of_16_bit_gradients(p, dtype):
    grads = [torch.randn(n).to(dtype) for n in (1, BLOCK, BLOCK + 1, 100)]
    grads += [torch.randn(9, 12).to(dtype)[:, ::3], torch.randn(9, 5).to(dtype).t()]
    for grad, norm in zip(grads, each_norm(grads, p), strict=True):
        assert norm.dtype is torch.float32
        exact = torch.linalg.vector_norm(grad.double(), p)
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0.0)
    assert each_norm([torch.zeros(0, dtype=dtype)], p)[0] == 0
    grads[3][77] = float("nan")
    assert each_norm(grads, p)[3].isnan()


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first dimension moving fastest in memory."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("length", range(1, 40))
def test_every_element_is_in_one_block(length):
    for shape in ((36,), (3, 4, 3), (1, 36), (4, 9)):
        one = torch.arange(36.0).reshape(shape)
        for given in ([one, one], [one, _transposed(one)]):
            parts = list(blocks.in_blocks(given, length))
            assert all(torch.equal(first, second) for first, second in parts)
            assert all(first.numel() <= length for first, _ in parts)
            together = torch.cat([first.flatten() for first, _ in parts])
            assert sorted(together.tolist()) == one.flatten().tolist()


def test_canary_a_block_that_is_lost_is_seen(monkeypatch):
    row = next(row for row in ROWS if row.name == "SGD")
    oracle = trained(row, torch.bfloat16, "readable")
    whole = blocks.in_blocks
    cut = lambda tensors, length: list(whole(tensors, length))[-1:]  # noqa: E731
    monkeypatch.setattr(blockwise, "in_blocks", cut)
    with pytest.raises(AssertionError):
        assert_same(trained(row, torch.bfloat16, "blockwise"), oracle, 2**-8)


# ------------------------------------------------------------------------------------------ memory

PEAK = """
import torch
import lamina as lm
torch.set_num_threads(1)
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
def share(name, dtype, shape, **options):
    param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    if len(shape) == 4:
        param.data = param.data.to(memory_format=torch.channels_last)
    model = torch.nn.ParameterList([param])
    optimizer = lm.Plan(getattr(lm, name), lr=0.01, **options).build(model, steps=9)
    param.grad = torch.full_like(param, 0.5)
    optimizer.step()
    optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    optimizer.step()
    print(name, dtype, (peak() - before) / param.nbytes)
flat, images, half, other = (4_000_000,), (10, 40, 100, 100), torch.bfloat16, torch.float16
share("SGD", half, flat, momentum=0.9)
share("SGD", other, images, momentum=0.9, clip_norm=1.0)
share("RMSprop", half, flat, momentum=0.9, centered=True)
share("AdamW", half, flat, state_dtype="float32")
share("LAMB", half, images, weight_decay=0.1)
share("LARS", other, flat, state_dtype="float32")
share("LayerAdaptiveAdam", half, flat)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_temporaries_are_small():
    run = [sys.executable, "-c", PEAK]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    shares = {line: float(line.split()[-1]) for line in done.stdout.splitlines()}
    assert len(shares) == 7
    assert max(shares.values()) < 1.0, done.stdout

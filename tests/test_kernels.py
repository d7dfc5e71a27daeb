"""The kernels against the readable rule, and the function that picks one and says why.

The kernels of torch, that is; those compiled by Numba are in `test_native.py`.
"""

from __future__ import annotations

import pytest
import torch

import lamina as lm
from lamina._util.blocks import in_blocks
from lamina.algorithms import ALGORITHMS
from lamina.algorithms.adam import Adam
from lamina.algorithms.base import Batch, times
from lamina.errors import PlanError
from lamina.kernels import KERNELS, apply, choose, fused, per_tensor, step_device
from reference.runner import DTYPES, assert_close, batch_of, run_lamina, run_torch
from reference.table import IN_TORCH, ROWS

pytestmark = pytest.mark.usefixtures("without_numba")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class LikeDTensor(torch.Tensor):
    """A tensor that is taken for one of FSDP2, without processes."""

    def to_local(self) -> torch.Tensor:
        """Return the part in this process."""
        return self.as_subclass(torch.Tensor)


def make(name: str, params: list[torch.Tensor], **hyper) -> Batch:
    algorithm = ALGORITHMS[name]
    return batch_of(algorithm, params, {**algorithm.defaults, **hyper})


def both(name: str, params: list[torch.Tensor], grads, steps: int = 5, **hyper) -> list[Batch]:
    """The same updates by the default kernel and by the readable one."""
    batches = []
    for prefer in (None, "readable"):
        batch = make(name, [param.clone() for param in params], **hyper)
        for t in range(steps):
            batch.grads = [grad.clone() if t % 2 else grad.clone() * 2 for grad in grads]
            apply([batch], prefer)
        batches.append(batch)
    return batches


def assert_same(batches: list[Batch], tolerance: float) -> None:
    first, second = batches
    assert_close(first.params, second.params, tolerance)
    assert first.columns.keys() == second.columns.keys()
    for key in first.columns:
        assert_close(first.columns[key], second.columns[key], tolerance)


# -------------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        *[("SGD", "fused"), ("RMSprop", "foreach"), ("Adam", "fused"), ("AdamW", "fused")],
        *[(name, "foreach") for name in ("Muon", "LARS", "LAMB", "LayerAdaptiveAdam")],
    ],
)
def test_default_is_the_fastest(name, kernel):
    chosen, reason = choose(make(name, [torch.ones(3, 1)]))
    assert chosen.name == kernel
    assert reason.startswith(f"{kernel}: ")


def test_choice_is_kept():
    batch = make("Adam", [torch.ones(3)])
    first = choose(batch)
    kept = batch.kernel
    assert choose(batch) == first
    assert batch.kernel is kept
    assert choose(batch, "readable")[0].name == "readable"


def test_reasons_name_the_parameter_and_what_it_is():
    batch = make("Adam", [torch.ones(3), torch.ones(2, dtype=torch.complex64)])
    batch.params = batch.params[1:]
    for values in [*batch.columns.values(), batch.grads, batch.steps]:
        del values[0]
    batch.names = ["head.weight"]
    kernel, reason = choose(batch)
    assert kernel.name == "readable"
    assert "not fused: 'head.weight' is complex64" in reason
    batch.names, batch.kernel = [], None
    assert "not fused: number 0 (shape (2,)) is complex64" in choose(batch)[1]


def test_unknown_kernel():
    with pytest.raises(PlanError, match=r"no kernel 'fussed'.*Did you mean 'fused'"):
        apply([make("Adam", [torch.ones(3)])], prefer="fussed")


def test_preferred_kernel_that_refuses_falls_back_and_says_so():
    kernel, reason = choose(make("RMSprop", [torch.ones(3)]), "fused")
    assert kernel.name == "foreach"
    assert "not fused: torch has no fused operator for RMSprop" in reason


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (make("Adam", [torch.ones(4, 4)[:, :2]]), "differ in their layout"),
        (make("SGD", [torch.ones(4, 4)[:, :2]]), "has gaps in memory"),
        (make("Adam", [torch.ones(3, device="meta")]), "is on meta"),
        (make("SGD", [torch.ones(3).as_subclass(LikeDTensor)]), "is a DTensor, "),
        (make("Adam", [torch.ones(3).as_subclass(type("Mine", (torch.Tensor,), {}))]), "a Mine"),
    ],
)
def test_refusals(batch, words):
    kernel, reason = choose(batch)
    assert kernel.name == "readable"
    assert words in reason


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (make("SGD", [torch.ones(3).bfloat16()]), "bfloat16, which torch's fused SGD on the CPU"),
        (make("RMSprop", [torch.ones(3).half()]), "float16, which foreach rounds"),
        (make("Adam", [torch.ones(4, 4).half()[:, :2]]), "differ in their layout"),
    ],
)
def test_16_bits_go_block_by_block(batch, words):
    kernel, reason = choose(batch)
    assert kernel.name == "blockwise"
    assert words in reason


def test_step_on_another_device_or_in_another_dtype_is_refused():
    batch = make("Adam", [torch.ones(3)])
    batch.steps = [torch.zeros((), dtype=torch.int64)]
    assert "has a step in int64" in choose(batch)[1]
    batch.steps, batch.kernel = [torch.zeros((), device="meta")], None
    assert "its step on meta" in choose(batch)[1]
    assert step_device(torch.ones(1)).type == "cpu"


# --------------------------------------------------------------------------------- layout and dtype


def test_gradient_in_another_layout_is_read_in_the_right_order():
    """Torch's fused operators on the CPU would read it as it lies in memory."""
    param, grad = torch.randn(6, 4), torch.randn(4, 6).t()
    batch = make("AdamW", [param])
    batch.grads = [grad]
    kernel, reason = choose(batch)
    assert kernel.name == "readable"
    assert "another dtype or layout" in reason
    assert_same(both("AdamW", [param], [grad]), 0.0)


def test_dense_layouts_keep_the_fast_kernel():
    param = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    batch = make("AdamW", [param])
    batch.grads = [grad]
    assert choose(batch)[0].name == "fused"
    assert_same(both("AdamW", [param], [grad]), 1e-6)
    batch.grads = [grad.contiguous()]
    assert choose(batch)[0].name == "readable"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_parameters_with_gaps(name):
    whole = torch.zeros(4, 4)
    batch = make(name, [whole[:, :2]], lr=0.1)
    batch.grads = [torch.ones(4, 2)]
    apply([batch])
    assert (whole[:, :2] < 0).all()
    assert (whole[:, 2:] == 0).all()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_mixed_dtypes_are_split(name):
    params = [torch.randn(5, 2), torch.randn(5, 1).bfloat16(), torch.randn(3, 3).double()]
    params.append(torch.randn(4, 1))
    hyper = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    grads = [torch.ones_like(param) for param in params]
    batches = both(name, params, grads, **hyper)
    for batch in batches:
        assert batch.has_new_state == (name == "SGD")
        assert [float(step) for step in batch.steps] == [5.0] * 4
    assert_same(batches, 1e-2)
    for index, tolerance in ((0, 1e-6), (2, 1e-12), (3, 1e-6)):
        first, second = (batch.params[index] for batch in batches)
        assert_close([first], [second], tolerance)
    reason = choose(batches[0])[1]
    assert reason.startswith("one part for each dtype and device: ")
    assert reason.count("|") == 2


@pytest.mark.parametrize("row", [row for row in ROWS if row.torch_class is None], ids=str)
def test_complex_parameters_are_pairs(row):
    hyper = {**ALGORITHMS[row.name].defaults, **row.options}
    pairs = torch.randn(5, 2, dtype=torch.float64)
    batch, real = (
        make(row.name, [p.clone()], **hyper) for p in (torch.view_as_complex(pairs), pairs)
    )
    for t in range(5):
        grad = torch.randn(5, 2, dtype=torch.float64, generator=torch.manual_seed(t))
        batch.grads, real.grads = [torch.view_as_complex(grad)], [grad]
        apply([batch])
        apply([real])
    assert_close([torch.view_as_real(batch.params[0])], real.params, 1e-12)


@pytest.mark.parametrize("row", [row for row in IN_TORCH if row.name != "Muon"], ids=str)
def test_complex_parameters(row):
    hyper = {**ALGORITHMS[row.name].defaults, **row.options}
    param = torch.randn(5, dtype=torch.complex128)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = row.torch_class([theirs], **row.options)
    batch = make(row.name, [param.clone()], **hyper)
    for t in range(5):
        theirs.grad = torch.randn(5, dtype=torch.complex128, generator=torch.manual_seed(t))
        batch.grads = [theirs.grad.clone()]
        optimizer.step()
        apply([batch])
    ours = torch.view_as_real(batch.params[0])
    assert_close([ours], [torch.view_as_real(theirs.detach())], 1e-12)
    assert all(value.is_complex() for values in batch.columns.values() for value in values)


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "AdamW"])
def test_float32_state_of_bfloat16_parameters(name):
    batch = make(name, [torch.randn(50)], lr=1e-2)
    exact = make(name, [batch.params[0].clone()], lr=1e-2)
    batch.params = [batch.params[0].bfloat16()]
    for _ in range(5):
        grad = torch.randn(50).bfloat16()
        batch.grads, exact.grads = [grad], [grad.float()]
        apply([batch])
        apply([exact])
    assert batch.params[0].dtype is torch.bfloat16
    assert_close(batch.params, exact.params, 1e-2)
    assert all(values[0].dtype is torch.float32 for values in batch.columns.values())
    found, expected = ([v[0] for v in b.columns.values()] for b in (batch, exact))
    assert_close(found, expected, 1e-6)


# ------------------------------------------------------------------------------------------- sparse


def sparse(rows: list[int], scale: float = 1.0) -> torch.Tensor:
    values = scale * torch.ones(len(rows), 2)
    return torch.sparse_coo_tensor([rows], values, (4, 2), check_invariants=True)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "maximize": True}]
)
def test_sparse_gradients_of_sgd(options):
    theirs = torch.nn.Parameter(torch.randn(4, 2))
    batch = make("SGD", [theirs.detach().clone()], lr=0.1, **options)
    optimizer = torch.optim.SGD([theirs], lr=0.1, **options)
    for rows in ([0, 1], [1, 3], [2]):
        theirs.grad = sparse(rows)
        batch.grads = [sparse(rows)]
        optimizer.step()
        apply([batch])
    assert_close(batch.params, [theirs.detach()], 1e-6)
    assert batch.has_new_state == bool(options)


@pytest.mark.parametrize(
    ("name", "hyper", "words"),
    [
        ("Adam", {}, r"Adam cannot update parameter 'table\.weight'.*sparse gradients"),
        ("RMSprop", {}, "sparse gradients"),
        ("SGD", {"weight_decay": 0.1}, "weight decay"),
    ],
)
def test_sparse_gradients_are_refused_by_name(name, hyper, words):
    first, second = make(name, [torch.ones(3)], **hyper), make(name, [torch.ones(4, 2)], **hyper)
    first.grads, second.grads, second.names = [torch.ones(3)], [sparse([1])], ["table.weight"]
    with pytest.raises(PlanError, match=words):
        apply([first, second])
    assert torch.equal(first.params[0], torch.ones(3))  # nothing was changed
    assert float(first.steps[0]) == float(second.steps[0]) == 0


# -------------------------------------------------------------------------------- state that begins


@pytest.mark.parametrize("prefer", [None, "readable"])
@pytest.mark.parametrize("dampening", [0.0, 0.4])
def test_momentum_may_begin_rest_and_come_back(prefer, dampening):
    theirs = torch.nn.Parameter(torch.randn(40))
    optimizer = torch.optim.SGD([theirs], lr=0.1, dampening=dampening)
    batch = make("SGD", [theirs.detach().clone()], lr=0.1, dampening=dampening)
    for t, momentum in enumerate([0, 0, 0.9, 0.5, 0, 0, 0.9, 0.9]):
        theirs.grad = torch.randn(40)
        batch.grads = [theirs.grad.clone()]
        optimizer.param_groups[0]["momentum"] = momentum
        batch.hyper = {**batch.hyper, "momentum": momentum}
        optimizer.step()
        apply([batch], prefer)
        assert batch.has_new_state == (t >= 2)
    assert_close(batch.params, [theirs.detach()], 1e-6)
    assert_close(
        batch.columns["momentum_buffer"], [optimizer.state[theirs]["momentum_buffer"]], 1e-6
    )


def test_buffers_that_begin_at_different_steps():
    """One of two parameters had no gradient at first, so that only the other has a buffer."""
    params, grads = [torch.randn(9), torch.randn(5)], [torch.ones(9), torch.ones(5)]
    batches = []
    for prefer in (None, "readable"):
        batch = make("SGD", [param.clone() for param in params], momentum=0.9, dampening=0.5)
        batch.columns = {"momentum_buffer": [torch.full((9,), 2.0), None]}
        batch.grads = [grad.clone() for grad in grads]
        apply([batch], prefer)
        batches.append(batch)
        torch.testing.assert_close(batch.columns["momentum_buffer"][0], torch.full((9,), 2.3))
        assert torch.equal(batch.columns["momentum_buffer"][1], torch.ones(5))
    assert_same(batches, 1e-6)


def test_rmsprop_momentum_may_begin_late():
    batches = []
    for prefer in (None, "readable"):
        batch = make("RMSprop", [torch.ones(6)])
        for momentum in (0.0, 0.9, 0.9):
            batch.grads, batch.hyper = [torch.ones(6)], {**batch.hyper, "momentum": momentum}
            apply([batch], prefer)
        assert batch.has_new_state
        batches.append(batch)
    assert_same(batches, 1e-6)


# -------------------------------------------------------------------------- steps, scale, tensor lr


def test_steps_are_counted_once_for_each_update():
    batches = [make("Adam", [torch.ones(2)]), make("SGD", [torch.ones(2), torch.ones(3)])]
    batches.append(make("Adam", [torch.ones(2, dtype=torch.complex64)]))
    batches[1].steps[0].fill_(7)
    apply(batches)
    assert [[float(s) for s in batch.steps] for batch in batches] == [[1.0], [8.0, 1.0], [1.0]]
    apply([])


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("prefer", [None, "readable"])
@pytest.mark.parametrize("lr", [torch.tensor(0.01), torch.tensor([0.01])])
def test_hyperparameters_may_be_tensors(name, prefer, lr):
    given, plain = (make(name, [torch.ones(5, 1)], lr=each) for each in (lr, lr.item()))
    for batch in (given, plain):
        batch.grads = [torch.ones(5, 1)]
        apply([batch], prefer)
    assert_close(given.params, plain.params, 1e-7)
    assert given.params[0].shape == (5, 1)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_factor_one_leaves_gradients_alone_and_factor_zero_stops(name):
    batch, plain = (make(name, [torch.ones(5, 1)]) for _ in range(2))
    for each in (batch, plain):
        each.grads = [torch.full((5, 1), 0.3)]
    batch.scale = torch.tensor(1.0)
    apply([batch])
    apply([plain])
    assert torch.equal(batch.params[0], plain.params[0])
    assert torch.equal(batch.grads[0], plain.grads[0])

    stopped = make(name, [torch.ones(5, 1)], weight_decay=0.0)
    stopped.grads, stopped.scale = [torch.ones(5, 1)], torch.tensor(0.0)
    apply([stopped])
    assert torch.equal(stopped.params[0], torch.ones(5, 1))


FACTORS = [
    *[("SGD", torch.float32), ("Adam", torch.float32), ("AdamW", torch.float64)],
    *[("RMSprop", torch.float32), ("LAMB", torch.float64), ("SGD", torch.bfloat16)],
    *[("Adam", torch.bfloat16), ("Adam", torch.complex64), ("RMSprop", torch.float16)],
]


@pytest.mark.parametrize("factor", [torch.float32, torch.float64])
@pytest.mark.parametrize("prefer", [None, "readable"])
@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize(("name", "dtype"), FACTORS)
def test_a_factor_of_another_dtype_leaves_the_gradients_theirs(name, dtype, shape, prefer, factor):
    scaled, given = (make(name, [torch.ones(shape, dtype=dtype)]) for _ in range(2))
    number = torch.tensor(0.3, dtype=factor)
    for step in range(1, 4):
        grad = torch.full(shape, 0.7 * step, dtype=dtype)
        scaled.grads, scaled.scale = [grad.clone()], number
        given.grads = [(grad.to(torch.promote_types(dtype, torch.float64)) * 0.3).to(dtype)]
        apply([scaled], prefer)
        apply([given], prefer)
    tolerance = 1e-2 if dtype.itemsize == 2 else 1e-6
    assert scaled.params[0].dtype is dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    torch.testing.assert_close(
        scaled.params[0].to(wide), given.params[0].to(wide), rtol=tolerance, atol=tolerance
    )
    for key, (tensor,) in scaled.columns.items():
        assert tensor.dtype is given.columns[key][0].dtype is dtype


def test_a_factor_is_not_rounded_to_the_dtype_of_the_gradient():
    grad = torch.tensor([255.0], dtype=torch.bfloat16)
    assert times(grad, torch.tensor(1.003)).item() == 256.0  # 255 * bfloat16(1.003) is 255
    exact = times(torch.tensor([3.0]), torch.tensor(1 + 5e-8, dtype=torch.float64))
    assert exact.item() > 3.0  # float32(1 + 5e-8) is 1
    assert exact.dtype is torch.float32


# -------------------------------------------------------------------------------------- the canary


def test_canary_a_wrong_operator_is_seen(monkeypatch):
    def wrong(batch, grads, inverse):
        fused._adam(batch, [grad + 1e-3 for grad in grads], inverse)

    monkeypatch.setitem(fused.OPERATORS, Adam, wrong)
    row = next(row for row in ROWS if row.name == "Adam")
    given = run_lamina(row, torch.float32, None)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(given, run_torch(row, torch.float32), DTYPES["float32"])


def test_the_readable_kernel_is_last_and_refuses_nothing():
    assert KERNELS[-1].name == "readable"
    assert KERNELS[-1].refusal(make("Adam", [torch.ones(3, dtype=torch.complex64)])) == ""


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decoupled_weight_decay": True}])
def test_blocks_of_a_large_tensor_are_one_tensor(options, monkeypatch):
    """LayerAdaptiveAdam walks large tensors in blocks; its one step size is that of all of them."""
    monkeypatch.setattr(per_tensor, "BLOCK", 7)
    params = [torch.randn(5, 6), torch.randn(3), torch.randn(4, 6).t()]
    grads = [torch.randn_like(param) for param in params]
    batches = both("LayerAdaptiveAdam", params, grads, weight_decay=0.1, lr=0.1, **options)
    assert choose(batches[0])[0].name == "foreach"
    assert_same(batches, 1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"decoupled_weight_decay": True}])
def test_the_form_for_accelerators(options, monkeypatch):
    """LayerAdaptiveAdam without a number read on the host, which is for accelerators."""
    monkeypatch.setattr(per_tensor, "_reads_freely", lambda param: False)
    monkeypatch.setattr(per_tensor, "_steadiness_in_blocks", None)
    params = [torch.randn(5, 6), torch.randn(3), torch.randn(4, 6).t()]
    grads = [torch.randn_like(param) for param in params]
    batches = both("LayerAdaptiveAdam", params, grads, weight_decay=0.1, lr=0.1, **options)
    assert_same(batches, 1e-6)


def test_a_block_that_is_lost_is_seen(monkeypatch):
    """Canary of the test above."""
    monkeypatch.setattr(per_tensor, "BLOCK", 7)
    whole = in_blocks
    monkeypatch.setattr(per_tensor, "in_blocks", lambda *given: list(whole(*given))[:-1])
    batches = both("LayerAdaptiveAdam", [torch.randn(5, 6)], [torch.randn(5, 6)], lr=0.1)
    with pytest.raises(AssertionError):
        assert_same(batches, 1e-6)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "LAMB", "Adam"])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}])
def test_numbers_that_torch_negates_when_it_reads_them(name, shape, settings):
    """`conj().imag` is such a view: of -1 it holds 1 in memory, and a bit that says so."""
    if settings.get("fused") and name not in ("SGD", "AdamW", "Adam"):
        pytest.skip("torch has no fused form")

    def negated():
        return torch._neg_view(torch.ones(shape))

    ends = []
    for weight, grad in [(-1.0, negated), (None, negated), (None, lambda: torch.ones(shape))]:
        for plain in (True, False):
            start = negated() if weight is None else torch.full(shape, weight)
            param = torch.nn.Parameter(start.resolve_neg() if plain else start)
            optimizer = getattr(lm.optim, name)([param], lr=0.1, **settings)
            for step in range(4):
                given = grad() if step % 2 else torch.full(shape, 0.5)
                param.grad = given.resolve_neg() if plain else given
                optimizer.step()
            ends.append(param.detach().resolve_neg())
    for plain, other in zip(ends[::2], ends[1::2], strict=True):
        torch.testing.assert_close(other, plain)

"""What the Triton kernels promise, on CPU tensors through Triton's interpreter.

`test_triton.py` runs this file in a process of its own with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import pytest
import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton import language as tl
from triton.runtime import interpreter

import lamina as lm
from lamina import optim
from lamina.algorithms import ALGORITHMS, rounding
from lamina.algorithms.rounding import settle_entries
from lamina.kernels import apply, choose, dispatch
from lamina.kernels.triton import Triton, kernel, table
from lamina.kernels.triton import rounding as on_device
from reference.runner import batch_of, gradient
from reference.table import ROWS

# The interpreter computes all lanes with NumPy, which tells of 0 / 0 in those beyond the end.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TRITON = Triton(("cpu",))
#: one of each rule, with every state tensor that it may keep
FULL = {
    "RMSprop": {"centered": True, "momentum": 0.9, "weight_decay": 0.1},
    "LARS": {"momentum": 0.9, "weight_decay": 0.1},
    "LAMB": {"weight_decay": 0.1},
    "LayerAdaptiveAdam": {"amsgrad": True, "weight_decay": 0.1},
}
#: all rows of these rules; the last one of each, with most options, is for every test run
RULE_ROWS = [
    pytest.param(row, id=str(row), marks=() if row.name != after.name else pytest.mark.slow)
    for row, after in zip(ROWS, [*ROWS[1:], ROWS[0]], strict=True)
    if row.name in FULL
]
#: several chunks of two blocks, the last one short; a scalar; nothing; less than one block
SHAPES = [(3, 700), (), (0,), (7, 5)]


@pytest.fixture(autouse=True)
def _takes_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "KERNELS", (TRITON, *dispatch.KERNELS))
    monkeypatch.setattr(table, "CHUNK_BLOCKS", 2)
    monkeypatch.setattr(interpreter, "_convert_float", _to_nearest)


def _to_nearest(values, old, new, rounding, convert=interpreter._convert_float):
    """Convert to bfloat16 as a device does; the interpreter cuts the digits off."""
    if (old, new) != (tl.float32, tl.bfloat16):
        return convert(values, old, new, rounding)
    return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()


def tensors(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def make(name, params, **hyper):
    algorithm = ALGORITHMS[name]
    return batch_of(algorithm, params, {**algorithm.defaults, "lr": 0.01, **hyper})


def pair(name, params, **hyper):
    """Two equal batches, for the Triton kernel and for the readable one."""
    return [make(name, [param.clone() for param in params], **hyper) for _ in range(2)]


def step(mine, oracle, grads):
    """One update of both."""
    for batch in (mine, oracle):
        batch.grads = [grad.clone() for grad in grads]
    assert choose(mine)[0] is TRITON, choose(mine)[1]
    apply([mine])
    apply([oracle], "readable")


def error(given, wanted):
    """The largest relative error of a tensor, as a norm."""
    given, wanted = given.double(), wanted.double()
    return float((given - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_same(mine, oracle, tolerance=2e-6):
    for given, wanted in zip(mine.params, oracle.params, strict=True):
        assert error(given, wanted) <= tolerance
    assert mine.columns.keys() == oracle.columns.keys()
    for key, column in mine.columns.items():
        for given, wanted in zip(column, oracle.columns[key], strict=True):
            assert given.dtype is wanted.dtype
            assert error(given, wanted) <= tolerance, key


def everything(batch):
    return [*batch.params, *(each for column in batch.columns.values() for each in column)]


# --------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("row", RULE_ROWS)
def test_rule(row):
    hypers = [row.options, {**row.options, **row.second}]
    shapes = [SHAPES, [(33,), (4, 3, 2)]]
    pairs = [pair(row.name, tensors(s), **h) for s, h in zip(shapes, hypers, strict=True)]
    for t in range(1, 4):
        for place, (mine, oracle) in enumerate(pairs):
            grads = [gradient(param, 10 * place + i, t) for i, param in enumerate(oracle.params)]
            mine.grads, oracle.grads = [grad.clone() for grad in grads], grads
            mine.scale = oracle.scale = torch.tensor(0.4) if place else None
        apply([mine for mine, _ in pairs], "triton")
        apply([oracle for _, oracle in pairs], "readable")
    for mine, oracle in pairs:
        assert_same(mine, oracle)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(
    ("dtype", "state"), [("bfloat16", None), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_sixteen_bits_are_rounded_once(name, dtype, state):
    params = tensors([(3, 70)], getattr(torch, dtype))
    mine, oracle = pair(name, params, **FULL[name])
    for batch in (mine, oracle):
        wanted = getattr(torch, state or dtype)
        batch.columns = {k: [v.to(wanted) for v in vs] for k, vs in batch.columns.items()}
    for seed in range(2):
        step(mine, oracle, tensors([(3, 70)], getattr(torch, dtype), seed))
    for given, wanted in zip(everything(mine), everything(oracle), strict=True):
        assert given.dtype is wanted.dtype
        if given.dtype is torch.float32:
            assert error(given, wanted) < 1e-5
            continue
        assert float((given == wanted).double().mean()) > 0.98  # else the nearest but one
        torch.testing.assert_close(given, wanted, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("size", [0.0, 1e-41, 1e-22, 1e18])
def test_extreme_gradients(name, size):
    mine, oracle = pair(name, tensors([(40,)]), **FULL[name])
    for seed in range(2):
        step(mine, oracle, [grad * size for grad in tensors([(40,)], seed=seed)])
    assert all(each.isfinite().all() for each in everything(oracle))
    for given, wanted in zip(everything(mine), everything(oracle), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize("name", ["LAMB", "LayerAdaptiveAdam"])
def test_what_lies_beyond_the_end_has_no_norm(name):
    """With an eps of 0, all lanes beyond the end of a tensor are 0 / 0."""
    mine, oracle = pair(name, tensors([(3,)]), eps=0.0)
    step(mine, oracle, tensors([(3,)], seed=1))
    assert all(param.isfinite().all() for param in mine.params)
    assert_same(mine, oracle)


# --------------------------------------------------------------------------- rounding to 16 bits


def rounded_pair(name, how, dtype, state):
    """Two equal batches whose results are rounded by a setting."""
    both = []
    for _ in range(2):
        hyper = {**FULL[name], "rounding": how, "state_dtype": state}
        batch = make(name, tensors([(3, 50), (7,)], dtype), **hyper)
        if state:
            wide = {key: [each.float() for each in its] for key, its in batch.columns.items()}
            batch.columns = wide
        entries = [{} for _ in batch.params]
        for param, entry in zip(batch.params, entries, strict=True):
            settle_entries(param, entry, batch.hyper)
        batch.columns |= {key: [entry[key] for entry in entries] for key in entries[0]}
        both.append(batch)
    return both


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("how", ["stochastic", "kahan", "master"])
def test_rounded_weights_are_nearly_always_those_of_the_rule(name, how):
    """State in bfloat16 is drawn too; what stays in float32 may differ in its last digit."""
    is_half = name in ("RMSprop", "LAMB")
    dtype, state = (torch.float16, "float32") if is_half else (torch.bfloat16, None)
    mine, oracle = rounded_pair(name, how, dtype, state)
    for seed in range(2):
        step(mine, oracle, tensors([(3, 50), (7,)], dtype, seed))
    for given, wanted in zip(everything(mine), everything(oracle), strict=True):
        assert given.dtype is wanted.dtype
        if given.dtype is torch.float32:
            assert error(given, wanted) < 2e-6
        else:
            assert float((given == wanted).double().mean()) > 0.8
    if how == "kahan":  # a digit that differs moves the rest to the other side of a weight
        rest, other = mine.columns["compensation"][0], oracle.columns["compensation"][0]
        total, wanted = mine.params[0].double() + rest, oracle.params[0].double() + other
        torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-6)
    assert float((mine.params[0] == oracle.params[0]).double().mean()) > 0.99


@pytest.mark.parametrize("how", ["kahan", "master"])
def test_state_follows_weights_that_others_changed(how):
    mine, oracle = rounded_pair("LAMB", how, torch.bfloat16, "float32")
    step(mine, oracle, tensors([(3, 50), (7,)], torch.bfloat16))
    for batch in (mine, oracle):
        batch.params[0].mul_(2)
        batch.followed.clear()
    step(mine, oracle, tensors([(3, 50), (7,)], torch.bfloat16, 1))
    assert error(mine.params[0], oracle.params[0]) < 1e-3
    assert float((mine.params[0] == oracle.params[0]).double().mean()) > 0.99


@triton.jit
def _round(values, bits, result, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    words = tl.load(bits + lanes).to(tl.uint32, bitcast=True)
    rounded = on_device.round_stochastically(tl.load(values + lanes), words, DTYPE)
    tl.store(result + lanes, rounded)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]
)
def test_every_kind_of_number_is_rounded_as_defined(dtype, name):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (4096,), generator=generator).int()
    values = words.roll(1).view(torch.float32)  # of all exponents, infinite ones and NaN too
    special = [0.0, -0.0, 65503.9, 65519.9, 65520.0, -1e5, 3.3895e38, 3.4e38, -3e-8, 6e-5, 1e-44]
    values[: len(special)] = torch.tensor(special)
    values[20:2000] = torch.randn(1980, generator=generator) * 1e-5  # denormal in float16
    result = torch.empty(4096, dtype=dtype)
    _round[(1,)](values, words, result, DTYPE=getattr(tl, name), BLOCK=4096)
    wanted = rounding.round_stochastically(values, words.clone(), dtype)
    same = result.view(torch.int16) == wanted.view(torch.int16)
    assert bool((same | (result.isnan() & wanted.isnan())).all())


@triton.jit
def _draw(rows, result, start, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    key = on_device.update_key(rows)
    bits = on_device.random_bits(key, STREAM, tl.load(start), BLOCK)
    tl.store(result + tl.arange(0, BLOCK), bits.to(tl.int32, bitcast=True))


@pytest.mark.parametrize("start", [0, 2**31 - 20, 2**32 - 20, 3 * 2**33])
def test_the_bits_are_those_of_the_definition(start):
    batch = make("LAMB", tensors([(3,)]))
    batch.names, batch.steps = ["head.weight"], [torch.tensor(17.0)]
    rows = table.Table([batch], ("exp_avg", "exp_avg_sq", None, None), hypers=1).rows
    result = torch.empty(64, dtype=torch.int32)
    _draw[(1,)](rows, result, torch.tensor(start), STREAM=2, BLOCK=64)
    key = rounding.key_of(rounding.seed_of(batch, 0), 17, 2)
    wanted = rounding.random_bits(torch.arange(start, start + 64), key)
    assert torch.equal(result, wanted)


# ---------------------------------------------------------------- the clip factor and the decision


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("factor", [0.0, 1.0, 0.37])
def test_clip_factor(name, factor):
    mine, oracle = pair(name, tensors([(7, 5)]), **FULL[name])
    mine.scale = torch.tensor(factor, dtype=torch.float64)
    oracle.scale = torch.tensor(factor)
    for seed in range(2):
        step(mine, oracle, tensors([(7, 5)], seed=seed))
    assert_same(mine, oracle)


@pytest.mark.parametrize("name", FULL)
def test_nothing_changes_where_a_gradient_is_not_finite(name):
    bad, good = make(name, tensors(), **FULL[name]), make(name, tensors(), **FULL[name])
    for batch, flag in ((bad, 1.0), (good, 0.0)):
        batch.grads, batch.found_inf = tensors(seed=1), torch.tensor(flag)
    before = [each.clone() for each in everything(bad)]
    bad.grads[0][2, 3] = float("nan")
    bad.scale = torch.tensor(float("nan"))
    apply([bad, good], "triton")
    for old, new in zip(before, everything(bad), strict=True):
        assert torch.equal(old, new)
    changed = [not torch.equal(old, new) for old, new in zip(before, everything(good), strict=True)]
    assert sum(changed) == len([each for each in everything(good) if each.numel()])


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", FULL)
def test_unaligned_views_and_their_neighbours(name):
    base = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    around = [base.clone() for _ in range(4)]
    param, grad = around[0][1:1500], around[1][3:1502]
    mine, oracle = pair(name, [param.clone()], **FULL[name])
    mine.params[0] = param
    key = next(iter(mine.columns))
    around[2][2:1501] = mine.columns[key][0]
    mine.columns[key][0] = around[2][2:1501]
    oracle.grads, mine.grads = [grad.clone()], [grad]
    apply([mine], "triton")
    apply([oracle], "readable")
    assert not mine.prepared.aligned
    assert_same(mine, oracle)
    assert torch.equal(around[0][:1], base[:1])
    assert torch.equal(around[0][1500:], base[1500:])
    assert torch.equal(around[1], base)
    assert torch.equal(around[2][:2], base[:2])
    assert torch.equal(around[2][1501:], base[1501:])


def test_any_order_in_memory_without_gaps():
    first = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    mine, oracle = pair("LAMB", [first])
    step(mine, oracle, [torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)])
    assert_same(mine, oracle)
    mine.grads = [torch.randn(2, 3, 4, 4)]
    assert choose(mine)[0].name == "foreach"


def test_gradients_that_do_not_suit_are_left_to_other_kernels():
    batch = make("RMSprop", tensors([(4, 3), (5,)]))
    for wrong in (torch.ones(4, 3).double(), torch.ones(3, 4).T, torch.ones(4, 4)[:, 1:]):
        batch.grads = [wrong, torch.ones(5)]
        assert choose(batch)[0].name != "triton"
    batch.grads = [torch.ones(4, 3).to_sparse(), torch.ones(5)]
    assert not TRITON.ready(batch)
    batch.grads = [torch.ones(4, 3), torch.ones(5)]
    assert choose(batch)[0] is TRITON


class Subclass(torch.Tensor):
    """A tensor that may be anything inside."""


def _state_of(batch, value):
    batch.columns["square_avg"][0] = value
    return batch


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        (lambda: make("AdamW", tensors([(3,)])), "there is no Triton form of AdamW"),
        (lambda: make("RMSprop", tensors([(3,)], torch.float64)), "is float64"),
        (lambda: make("RMSprop", [torch.randn(4, 4)[:, :2]]), "has gaps in memory"),
        (lambda: make("RMSprop", [torch.ones(3).as_subclass(Subclass)]), "is a Subclass"),
        (lambda: make("RMSprop", [torch.ones(3, device="meta")]), "is on meta"),
        (
            lambda: _state_of(make("RMSprop", tensors([(3,)])), torch.ones(3).double()),
            "has a square_avg that is float64",
        ),
        (
            lambda: _state_of(make("RMSprop", tensors([(2, 3)])), torch.ones(3, 2).T),
            "has a square_avg that lies in another order in memory",
        ),
        (
            lambda: _state_of(make("RMSprop", tensors([(3,)])), torch.ones(3).half()),
            "its state is float16 and float32",
        ),
    ],
)
def test_refusal(batch, why):
    assert why in TRITON.refusal(batch())


def test_tensors_that_move_between_steps():
    mine, oracle = pair("RMSprop", tensors([(40,), (3, 3)]), momentum=0.5)
    step(mine, oracle, tensors([(40,), (3, 3)]))
    known = mine.prepared
    step(mine, oracle, tensors([(40,), (3, 3)], seed=1))
    assert mine.prepared is known
    old = mine.params[0].data.clone()
    mine.params[0].data = old.clone()
    mine.columns["square_avg"][1] = mine.columns["square_avg"][1].clone()
    step(mine, oracle, tensors([(40,), (3, 3)], seed=2))
    assert mine.prepared is not known
    assert_same(mine, oracle)


@pytest.mark.parametrize("name", ["RMSprop", "LARS"])
def test_momentum_begins_later(name):
    mine, oracle = pair(name, tensors([(40,)]), momentum=0.0)
    step(mine, oracle, tensors([(40,)]))
    for batch in (mine, oracle):
        batch.hyper = {**batch.hyper, "momentum": 0.9}
    for seed in (1, 2):
        step(mine, oracle, tensors([(40,)], seed=seed))
    assert "momentum_buffer" in mine.columns
    assert_same(mine, oracle)


def test_groups_with_other_variants_share_one_call():
    """Batches that are not alike are launched apart; each gets its own values."""
    options = [{"momentum": 0.9}, {"centered": True}, {"lr": 0.3}, {}]
    pairs = [pair("RMSprop", tensors([(9,)], seed=i), **o) for i, o in enumerate(options)]
    pairs.append(pair("RMSprop", tensors([(9,)], torch.bfloat16)))
    pairs.append(pair("LAMB", tensors([(0,)])))
    for place, (mine, oracle) in enumerate(pairs):
        grads = tensors([oracle.params[0].shape], oracle.params[0].dtype, seed=place)
        mine.grads, oracle.grads = grads, [grad.clone() for grad in grads]
    apply([mine for mine, _ in pairs], "triton")
    apply([oracle for _, oracle in pairs], "readable")
    for mine, oracle in pairs:
        assert_same(mine, oracle)


# -------------------------------------------------------------------------------- without waiting


class FailsOnRead(TorchDispatchMode):
    """Fails where a number is read on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FULL)
def test_hyperparameters_on_the_device_are_not_read(name, monkeypatch):
    monkeypatch.setattr(kernel, "_is_on_device", lambda value: isinstance(value, torch.Tensor))
    mine, oracle = pair(name, tensors([(9,)]), **FULL[name])
    numbers = {k: v for k, v in mine.hyper.items() if isinstance(v, float)}
    mine.hyper = {**mine.hyper, **{k: torch.tensor(v).double() for k, v in numbers.items()}}
    mine.scale = oracle.scale = torch.tensor(0.5)
    for seed in range(2):
        mine.grads, oracle.grads = tensors([(9,)], seed=seed), tensors([(9,)], seed=seed)
        assert choose(mine)[0] is TRITON
        with FailsOnRead():
            apply([mine])
        apply([oracle], "readable")
    assert_same(mine, oracle)


def test_canary_a_read_is_seen():
    with pytest.raises(AssertionError, match="a number is read"), FailsOnRead():
        float(torch.ones(()))


# ------------------------------------------------------------------------------- whole optimizers


@pytest.fixture
def launched(monkeypatch):
    """Of each call of the kernel, how many groups it updates in one launch."""
    found = []
    update = kernel._update
    monkeypatch.setattr(
        kernel, "_update", lambda *args: found.append(len(args[1])) or update(*args)
    )
    return found


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))


def train(model, optimizer, steps, first=0):
    for seed in range(first, first + steps):
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        (model(torch.randn(4, 5, generator=generator)) ** 2).mean().backward()
        optimizer.step()


def assert_equal_weights(one, other):
    for given, wanted in zip(one.parameters(), other.parameters(), strict=True):
        assert error(given.detach(), wanted.detach()) <= 2e-6


PLAN = {"rules": [lm.Rule("2.*", lr=0.02), lm.Rule("0.bias", thaw=2)], "clip_norm": 0.05}


@pytest.mark.parametrize("name", FULL)
def test_a_plan_with_clipping_and_a_thaw_resumes_in_the_middle(name, launched, monkeypatch):
    # A centered variance is the difference of two numbers that are nearly the same here.
    options = {key: value for key, value in FULL[name].items() if key != "centered"}

    def build(model):
        return lm.Plan(getattr(lm, name), lr=0.01, **options, **PLAN).build(model, steps=6)

    model = network()
    optimizer = build(model)
    train(model, optimizer, 3)
    assert launched == [2, 2, 3]
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    second = build(resumed)
    second.load_state_dict(optimizer.state_dict())
    train(resumed, second, 2, first=3)

    monkeypatch.setattr(dispatch, "KERNELS", dispatch.KERNELS[1:])
    oracle = network()
    train(oracle, build(oracle), 5)
    assert_equal_weights(resumed, oracle)


def test_a_drop_in_optimizer(launched, monkeypatch):
    model, oracle = network(), network()
    train(model, optim.RMSprop(model.parameters(), momentum=0.9), 3)
    assert len(launched) == 3
    monkeypatch.setattr(dispatch, "KERNELS", dispatch.KERNELS[1:])
    train(oracle, torch.optim.RMSprop(oracle.parameters(), momentum=0.9), 3)
    assert_equal_weights(model, oracle)

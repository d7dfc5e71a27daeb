"""A step on an accelerator reads nothing on the host; shown with tensors of the CPU.

The policy of accelerators is switched on for them, and modes of torch watch every read.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lamina as lm
from lamina._util import tensors
from lamina.algorithms import ALGORITHMS
from lamina.algorithms.base import Batch
from lamina.gradients.nonfinite import DeferredChecks
from lamina.gradients.operations import operate
from lamina.kernels import capture, masked
from lamina.kernels.foreach import Foreach
from lamina.optimizer.pending_step import PendingStep
from lamina.record.recorder import Recorder

# What waits for nothing is compared with ordinary steps by the same kernels.
pytestmark = pytest.mark.usefixtures("without_numba")

OPTIMIZERS = ["SGD", "RMSprop", "Adam", "AdamW", "LAMB", "LARS", "LayerAdaptiveAdam", "Muon"]
#: LayerAdaptiveAdam sums in another order there: in one go, where the CPU reads sums of blocks
ANOTHER_ORDER = {"LayerAdaptiveAdam"}
READS = {"item", "tolist", "numpy", "cpu", "is_nonzero", "__bool__", "__float__", "__int__"}
READS |= {"__index__", "__array__", "__complex__", "nonzero", "__contains__", "equal"}


class HostRead(AssertionError):
    pass


class _Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            raise HostRead(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    forbidden = {  # noqa: RUF012
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.forbidden:
            raise HostRead(str(func))
        return func(*args, **(kwargs or {}))


class NoReads:
    """Fails on every read of a tensor in a step but that of the flag of another one.

    `flags` holds the step that was read and the clock at that time.
    """

    def __init__(self, monkeypatch):
        self.flags = []
        self.now = None
        self._modes = []
        was_taken, error = PendingStep.was_taken, DeferredChecks.error

        def noted(pending):
            self.flags.append((pending.step, self.now))
            return self._unwatched(was_taken, pending)

        monkeypatch.setattr(PendingStep, "was_taken", noted)
        # The text of the error, once the flag of that step is known.
        monkeypatch.setattr(DeferredChecks, "error", lambda *a: self._unwatched(error, *a))
        # A recorder writes out all it has before an event.
        event = Recorder.event
        monkeypatch.setattr(Recorder, "event", lambda *a: self._unwatched(event, *a))

    def _unwatched(self, function, *args):
        modes, self._modes = self._modes, []
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
        try:
            return function(*args)
        finally:
            for mode in modes:
                mode.__enter__()
            self._modes = modes

    def step(self, optimizer, now=None):
        self.now = now
        self._modes = [_Calls(), _Operators()]
        for mode in self._modes:
            mode.__enter__()
        try:
            type(optimizer).step(optimizer)
        finally:
            for mode in reversed(self._modes):
                mode.__exit__(None, None, None)
            self._modes, self.now = [], None


@pytest.fixture
def accelerator(monkeypatch):
    """The policy of accelerators for tensors of the CPU, until `off` is called."""

    class Switch:
        def on(self):
            monkeypatch.setattr(tensors, "READ_FREELY", frozenset())

        def off(self):
            monkeypatch.setattr(tensors, "READ_FREELY", frozenset({"cpu"}))

    switch = Switch()
    switch.on()
    return switch


def network(dtype=torch.float32, layers=3):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(layers)]).to(dtype)


def give_gradients(model, step, bad=None):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        if param.requires_grad:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = grad.to(param.dtype)
    if bad is not None:
        model[1].weight.grad[1, 2] = bad


def contents(model, optimizer):
    """Weights and state by name, with what an optimizer tells of itself."""
    found = {name: param.detach().clone() for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            found[f"{name} {key}"] = value.clone()
    return found


def told(optimizer):
    own = (optimizer.clock, optimizer.skipped, optimizer.applied, optimizer.active)
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return (*own, groups)


def assert_alike(ours, theirs, name="", **close):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if name in ANOTHER_ORDER or close:
            torch.testing.assert_close(value, theirs[key], **close)
        else:
            assert torch.equal(value, theirs[key]), key


OPERATIONS = {
    "none": {},
    "clip_norm": {"clip_norm": 0.5},
    "clip_norm above": {"clip_norm": 1e6},
    "clip_value": {"gradients": [lm.clip_value(0.3)]},
    "clip_param_norm": {"gradients": [lm.clip_param_norm(0.3), lm.scale_gradients(0.5)]},
    "agc": {"gradients": [lm.agc(0.05)]},
    "scale": {"gradients": [lm.scale_gradients(0.5), lm.clip_norm(1.0, p=math.inf)]},
    "function": {"gradients": [lambda grads, infos: [2 * g for g in grads], lm.clip_norm(1.0)]},
    "unchecked": {"nonfinite_check": "norms"},
}


def trained(plan, steps, *, reads=None, bad=(), dtype=torch.float32, run=None):
    model = network(dtype)
    optimizer = plan.build(model, steps=run or steps)
    for step in range(steps):
        give_gradients(model, step, math.nan if step in bad else None)
        if reads is None:
            optimizer.step()
        else:
            reads.step(optimizer, step)
    return model, optimizer


@pytest.mark.filterwarnings("ignore")  # of rates and thresholds that suit no real training
@pytest.mark.parametrize(
    ("operations", "dtype"),
    [(each, torch.float32) for each in OPERATIONS]
    + [(each, torch.bfloat16) for each in ("clip_norm", "agc", "unchecked")]
    + [("scale", torch.float64)],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_and_gives_the_same(name, operations, dtype, accelerator, monkeypatch):
    plan = lm.Plan(name, lr=lm.cosine(0.1), nonfinite="skip", **OPERATIONS[operations])
    reads = NoReads(monkeypatch)
    model, optimizer = trained(plan, 4, reads=reads, dtype=dtype, run=100)
    steps = [step for step, _ in reads.flags]
    if operations == "unchecked":  # but weights of 16 bits, which are looked at in a few steps
        assert steps == [1] * (dtype is torch.bfloat16)
    else:
        assert steps == [0, 1, 2]
    assert all(step < now for step, now in reads.flags)
    ours = contents(model, optimizer)
    accelerator.off()
    model, other = trained(plan, 4, dtype=dtype, run=100)
    assert_alike(ours, contents(model, other), name)
    assert told(optimizer) == told(other)


class _Devices(TorchDispatchMode):
    """The operators that meet a tensor of the CPU, but for one that makes an empty one."""

    def __init__(self):
        super().__init__()
        self.on_cpu = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if torch.is_tensor(each)]
        if any(each.is_cpu for each in tensors) and func != torch.ops.aten.empty.memory_format:
            self.on_cpu.append(str(func))
        return found


def on_fake_cuda(name):
    """A batch of tensors that only claim to be on a GPU: torch computes their shapes."""
    algorithm = ALGORITHMS[name]
    hyper = {**algorithm.defaults, "name": "group"}
    hyper |= {key: 0.5 for key in ("momentum", "weight_decay") if key in hyper}
    shapes = [(4, 4), (5, 4)] if name == "Muon" else [(4, 4), (3,), ()]
    params = [torch.empty(shape, device="cuda") for shape in shapes]
    columns = {key: [torch.empty_like(p) for p in params] for key in algorithm.buffers}
    steps = [torch.empty((), device="cuda") for _ in params]
    names = [str(index) for index in range(len(params))]
    grads = [torch.empty_like(param) for param in params]
    return Batch(algorithm, params, grads, columns, steps, hyper, names=names)


@pytest.mark.parametrize("operations", [key for key in OPERATIONS if key != "unchecked"])
def test_gradient_operations_copy_nothing_between_devices(operations):
    optimizer = lm.Plan("SGD", lr=0.1, **OPERATIONS[operations]).build(network())
    steps = [each for scope in optimizer._run_state.operations for each in scope]
    with FakeTensorMode(), torch.no_grad(), _Devices() as devices:
        batch = on_fake_cuda("SGD")
        checks = DeferredChecks()
        operate([batch], steps, dict.fromkeys(batch.names), 0, True, deferred=checks)
        flag = checks.found_inf(batch.params[0].device)
        assert flag.device.type == "cuda"
        assert flag.dtype is torch.float32
    assert devices.on_cpu == []


@pytest.mark.parametrize("name", ["RMSprop", "LARS", "LAMB", "LayerAdaptiveAdam", "Muon"])
def test_updates_copy_nothing_between_devices(name):
    with FakeTensorMode(), torch.no_grad(), _Devices() as devices:
        batch = on_fake_cuda(name)
        batch.scale = torch.empty((), device="cuda")
        batch.found_inf = torch.empty((), device="cuda")
        masked.run(Foreach(), [batch])
    assert devices.on_cpu == []


def test_a_read_of_a_device_is_seen_there():
    with FakeTensorMode(), _Devices() as devices:
        torch.empty(3, device="cuda").to("cpu")
    assert devices.on_cpu != []


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.5}])
def test_the_modes_see_the_reads_of_the_ordinary_policy(clip, accelerator, monkeypatch):
    accelerator.off()
    with pytest.raises(HostRead):
        trained(lm.Plan("SGD", lr=0.1, **clip), 1, reads=NoReads(monkeypatch))


# -------------------------------------------------------------------------------- skipped steps

STAYS: dict[str, list[dict[str, object]]] = {
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    "RMSprop": [{"momentum": 0.9, "centered": True}, {"weight_decay": 0.1}],
    "AdamW": [{"amsgrad": True}],
    "LARS": [{"momentum": 0.9, "weight_decay": 0.1}],
}


@pytest.mark.filterwarnings("ignore:updates-round-away")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skipped_steps_leave_all_as_it_was(name, dtype, accelerator, monkeypatch):
    """In any step, the first and the last one too, and several in a row."""
    monkeypatch.setattr(masked, "PORTION", 20)
    for settings in STAYS.get(name, [{}]):
        cases: list[set[int]] = [{0}, {2}, {0, 1, 4}, {3, 5}]
        for bad in cases:
            clip = {"clip_norm": 0.5} if 2 in bad else {}
            plan = lm.Plan(name, lr=lm.cosine(0.1), nonfinite="skip", **settings, **clip)
            accelerator.on()
            reads = NoReads(monkeypatch)
            model, optimizer = trained(plan, 6, reads=reads, bad=bad, dtype=dtype, run=100)
            assert all(step < now for step, now in reads.flags)
            ours, said = contents(model, optimizer), told(optimizer)
            accelerator.off()
            model, other = trained(plan, 6, bad=bad, dtype=dtype, run=100)
            assert_alike(ours, contents(model, other), name)
            assert said == told(other)
            assert optimizer.skipped == len(bad)
            assert {*optimizer.norms} == {*other.norms}


@pytest.mark.parametrize("prefer", ["fused", "foreach", "readable"])
def test_every_kernel_leaves_all_as_it_was(prefer, accelerator, monkeypatch):
    """Also the rule as it is written, and a group of two dtypes."""

    def run(bad, reads=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
        optimizer = lm.Plan("AdamW", lr=0.1, nonfinite="skip", clip_norm=0.5).build(model)
        if prefer != "fused":
            for group in optimizer.param_groups:
                group["foreach"] = prefer == "foreach"
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for param in model.parameters():
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if step == bad:
                model[0].bias.grad[0] = math.inf
            if reads is None:
                optimizer.step()
            else:
                reads.step(optimizer, step)
        return contents(model, optimizer), told(optimizer)

    for bad in (0, 2):
        accelerator.on()
        ours = run(bad, NoReads(monkeypatch))
        accelerator.off()
        theirs = run(bad)
        # beta ** step is a tensor in the readable rule
        close = {"rtol": 1e-6, "atol": 1e-7} if prefer == "readable" else {}
        assert_alike(ours[0], theirs[0], **close)
        assert ours[1] == theirs[1]


def test_norms_show_the_step_before_once_a_skip_is_known(accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1, clip_norm=0.5, nonfinite="skip").build(model)
    give_gradients(model, 0)
    optimizer.step()
    norm = next(iter(optimizer.norms.values()))
    assert isinstance(norm, torch.Tensor)
    assert math.isfinite(norm)
    give_gradients(model, 1, math.nan)
    optimizer.step()
    assert math.isnan(next(iter(optimizer.norms.values())))  # nothing was waited for
    assert optimizer.skipped == 1
    assert next(iter(optimizer.norms.values())) is norm


# ---------------------------------------------------------------------------- the late error


@pytest.mark.parametrize(
    ("operations", "pattern"),
    [
        ("none", r"gradient of '1\.weight' is NaN or infinite"),
        ("clip_norm", r"gradient of '1\.weight' is NaN or infinite, or its norm overflows"),
        ("agc", r"'1\.weight'"),
        ("clip_param_norm", r"'1\.weight'"),
        ("function", r"gradient of '1\.weight' that apply\(.*\) returned is NaN"),
    ],
)
def test_the_error_comes_with_the_next_step(operations, pattern, accelerator):
    model = network()
    optimizer = lm.Plan("AdamW", lr=lm.cosine(0.1), **OPERATIONS[operations]).build(model, steps=9)
    give_gradients(model, 0)
    optimizer.step()
    before = contents(model, optimizer)
    give_gradients(model, 1, math.inf)
    optimizer.step()
    give_gradients(model, 2)
    with pytest.raises(lm.NonFiniteError, match=pattern + r".* at step 1; the weights were not"):
        optimizer.step()
    assert_alike(before, contents(model, optimizer))
    assert (optimizer.clock, optimizer.skipped) == (1, 0)
    optimizer.step()  # with the gradients that are there: the step 1 is taken
    assert optimizer.clock == 2
    ours = contents(model, optimizer)
    accelerator.off()
    model = network()
    other = lm.Plan("AdamW", lr=lm.cosine(0.1), **OPERATIONS[operations]).build(model, steps=9)
    for step in (0, 2):
        give_gradients(model, step)
        other.step()
    assert_alike(ours, contents(model, other))


def test_a_norm_that_overflows_names_the_largest_gradient(accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1, clip_norm=0.5).build(model)
    give_gradients(model, 0)
    model[2].weight.grad.fill_(4e18)
    model[1].weight.grad.fill_(3e18)
    model[0].weight.grad.fill_(2e18)
    optimizer.step()
    with pytest.raises(lm.NonFiniteError, match=r"overflows, most of all that of '2\.weight'"):
        optimizer.synchronize()
    # without a norm nothing overflows, as on the CPU
    optimizer = lm.Plan("SGD", lr=0.1).build(network())
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, 1e38)
    optimizer.step()
    assert optimizer.clock == 1


READERS = {
    "clock": lambda optimizer: optimizer.clock,
    "skipped": lambda optimizer: optimizer.skipped,
    "applied": lambda optimizer: optimizer.applied,
    "state_dict": lambda optimizer: optimizer.state_dict(),
    "torch_state_dict": lambda optimizer: optimizer.torch_state_dict(),
    "synchronize": lambda optimizer: optimizer.synchronize(),
    "explain": lambda optimizer: optimizer.explain("1.weight"),
    "check": lambda optimizer: optimizer.check(nn.Linear(1, 1)),
    "override": lambda optimizer: optimizer.override(lr=0.5),
    "restart_state": lambda optimizer: optimizer.restart_state("*"),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict({}),
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: torch.save(optimizer, io.BytesIO()),
    "scheduler_view": lambda optimizer: optimizer.scheduler_view().get_last_lr(),
    "release": lambda optimizer: optimizer.release(),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_error_is_not_lost_where_something_asks_first(reader, accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1).build(model)
    give_gradients(model, 0, math.nan)
    optimizer.step()
    with pytest.raises(lm.NonFiniteError, match="at step 0"):
        READERS[reader](optimizer)
    assert (optimizer.clock, optimizer.skipped) == (0, 0)  # told once


def test_the_last_step_of_a_run_tells_at_once(accelerator, monkeypatch):
    for policy in ("raise", "skip"):
        model = network()
        optimizer = lm.Plan("SGD", lr=0.1, nonfinite=policy).build(model, steps=2)
        give_gradients(model, 0)
        optimizer.step()
        give_gradients(model, 1, math.nan)
        if policy == "raise":
            with pytest.raises(lm.NonFiniteError, match="at step 1"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer._run_state.pending is None
        assert optimizer.clock == 1


# ------------------------------------------------------------------------- what depends on a step


def test_a_foreign_write_is_told_though_the_step_before_was_skipped(accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=lm.cosine(0.1), nonfinite="skip").build(model, steps=9)
    give_gradients(model, 0, math.nan)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 7.0
    with pytest.raises(lm.OwnershipError, match=r"lr=7\.0"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 7.0


PLANS = {
    "thaw": lm.Plan(
        "AdamW", lr=lm.cosine(0.1), nonfinite="skip", rules=[lm.Rule("0.*", thaw="3 steps")]
    ),
    "freeze": lm.Plan(
        "AdamW",
        lr=lm.cosine(0.1),
        nonfinite="skip",
        clip_norm=0.5,
        rules=[lm.Rule("0.*", freeze="3 steps", frozen_state="drop")],
    ),
    "top-down": lm.Plan(
        "SGD",
        lr=0.1,
        nonfinite="skip",
        rules=[lm.Rule("0.*", thaw="4 steps"), lm.Rule("1.*", thaw="2 steps", clip_norm=0.1)],
    ),
    "plateau": lm.Plan(
        "SGD",
        lr=lm.cosine(0.1),
        feedback=lm.plateau("val_loss", patience=1, factor=0.5),
        stop=lm.early_stop("val_loss", patience=3),
        nonfinite="skip",
    ),
}


def eventful(plan, bad, reads=None):
    """A run with metrics, an override, and forward passes whose flags decide on gradients."""
    model = network()
    optimizer = plan.build(model, steps=12)
    for step in range(9):
        for _ in range(2):  # accumulated
            model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).sum().backward()
        if step in bad:
            model[2].weight.grad[0, 0] = math.nan
        if reads is None:
            optimizer.step()
        else:
            reads.step(optimizer, step)
        optimizer.zero_grad()
        if step == 5:
            optimizer.override(lr=0.07)
        if step % 2 and "val_loss" in repr(plan):
            optimizer.report(val_loss=1.0)
    return contents(model, optimizer), told(optimizer), optimizer.should_stop


@pytest.mark.parametrize("bad", [(), (2,), (1, 3), (3, 4, 7)])
@pytest.mark.parametrize("plan", PLANS)
def test_windows_metrics_and_overrides_are_those_of_the_cpu(plan, bad, accelerator, monkeypatch):
    """A window opens or closes only when the step before is known to be taken: one wait each."""
    reads = NoReads(monkeypatch)
    ours = eventful(PLANS[plan], bad, reads)
    changes = {"thaw": 1, "freeze": 1, "top-down": 2, "plateau": 0}[plan]
    in_their_own_step = [step for step, now in reads.flags if step == now]
    assert len(in_their_own_step) <= changes + len(bad)
    if not bad:
        assert len(in_their_own_step) == changes
    accelerator.off()
    theirs = eventful(PLANS[plan], bad)
    assert_alike(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("bad", [{1}, {2}, {3}, {2, 3}])
def test_a_checkpoint_of_a_pending_step_is_that_of_the_cpu(bad, accelerator):
    plan = lm.Plan("SGD", lr=lm.cosine(0.1), momentum=0.9, clip_norm=0.5, nonfinite="skip")

    def run():
        model, optimizer = trained(plan, 4, bad=bad, run=20)
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        model = network()
        model.load_state_dict(weights)
        resumed = plan.build(model, steps=20, resume=state)
        for step in range(4, 7):
            give_gradients(model, step)
            resumed.step()
        return state["param_groups"], contents(model, resumed), told(resumed)

    ours = run()
    accelerator.off()
    theirs = run()
    assert ours[0] == theirs[0]
    assert_alike(ours[1], theirs[1])
    assert ours[2] == theirs[2]


def test_a_loaded_state_replaces_a_pending_step(accelerator):
    plan = lm.Plan("AdamW", lr=0.1, nonfinite="skip")
    model, optimizer = trained(plan, 2, run=20)
    state = copy.deepcopy(optimizer.state_dict())
    give_gradients(model, 2, math.nan)
    optimizer.step()
    optimizer.load_state_dict(state)
    assert (optimizer.clock, optimizer.skipped) == (2, 1)


@pytest.mark.parametrize("bad", [(), (0,), (2,), (3,)])
def test_a_recorder_records_what_was_taken(bad, accelerator, monkeypatch):
    def run(reads=None):
        model = network()
        plan = lm.Plan("AdamW", lr=lm.cosine(0.1), clip_norm=0.5, nonfinite="skip")
        optimizer = plan.build(model, steps=20)
        with optimizer.recorder(every=2) as recorder:
            for step in range(5):
                give_gradients(model, step, math.nan if step in bad else None)
                if reads is None:
                    optimizer.step()
                else:
                    reads.step(optimizer, step)
                recorder.metrics(loss=torch.tensor(float(step)))
        record = recorder.record
        metrics = {
            name: [each.tolist() for each in record.series("", name)] for name in record.names()
        }
        series = {
            name: [each.tolist() for each in record.series("default", name)]
            for name in ("lr", "clip", "grad_norm", "update_norm", "weight_norm", "ratio")
        }
        return series, metrics, [(event.step, event.kind) for event in record.events]

    reads = NoReads(monkeypatch)
    ours = run(reads)
    assert all(step < now for step, now in reads.flags[:-1])
    accelerator.off()
    assert ours == run()


def test_closing_a_recorder_tells_of_the_last_step(tmp_path, accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1).build(model)
    recorder = optimizer.recorder(tmp_path / "run.jsonl", every=1)
    give_gradients(model, 0)
    optimizer.step()
    give_gradients(model, 1, math.nan)
    optimizer.step()
    with pytest.raises(lm.NonFiniteError, match="at step 1"):
        recorder.close()
    assert (tmp_path / "run.jsonl").read_text().count('"kind": "step"') == 1
    assert not optimizer._recorders.on


# ------------------------------------------------------------------------ what the host decides


class Quantized(torch.Tensor):
    """A class that nothing may be selected in."""


def halves(model):
    model[1].weight = nn.Parameter(model[1].weight.detach().as_subclass(Quantized))


def sparse(model):
    for param in model.parameters():
        param.grad = param.grad.to_sparse()


@pytest.mark.parametrize("case", ["guest", "audit", "class", "sparse"])
def test_where_the_device_cannot_decide_the_host_does_at_once(case, accelerator):
    model = network()
    if case == "class":
        halves(model)
    kind = torch.optim.SGD if case == "guest" else "SGD"
    optimizer = lm.Plan(kind, lr=0.1).build(model, audit=case == "audit")
    give_gradients(model, 0, math.nan)
    if case == "sparse":
        sparse(model)
    with pytest.raises(lm.NonFiniteError, match="at step 0"):
        optimizer.step()
    assert optimizer.clock == 0


@pytest.mark.parametrize("overflow", [(), (1,), (1, 2)])
def test_a_gradient_scaler_skips_as_on_the_cpu(overflow, accelerator, monkeypatch):
    """The scaler reads its own flag before it calls the step, as for torch's optimizers."""

    def run(reads=None):
        model = network()
        plan = lm.Plan("AdamW", lr=lm.cosine(0.1), clip_norm=0.5, nonfinite="skip")
        optimizer = plan.build(model, steps=20)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        if reads is not None:
            optimizer.step = lambda: reads.step(optimizer, "now")
        for step in range(4):
            give_gradients(model, step, math.inf if step in overflow else None)
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
        return contents(model, optimizer), told(optimizer), scaler.get_scale()

    ours = run(NoReads(monkeypatch))
    accelerator.off()
    theirs = run()
    assert_alike(ours[0], theirs[0])
    assert ours[1:] == theirs[1:]


def test_a_closure_is_evaluated_before_the_step_before_is_waited_for(accelerator):
    model = network()
    optimizer = lm.Plan("SGD", lr=0.1, nonfinite="skip").build(model)
    give_gradients(model, 0, math.nan)
    optimizer.step()
    pending = []

    def closure():
        pending.append(optimizer._run_state.pending)
        give_gradients(model, 1)
        return 0.0

    optimizer.step(closure)
    assert pending[0] is not None
    assert (optimizer.clock, optimizer.skipped) == (1, 1)


# ----------------------------------------------------------------------------------- CUDA graphs


def test_a_plan_refuses_to_be_captured(accelerator, monkeypatch):
    model = network()
    optimizer = lm.Plan("AdamW", lr=0.1, clip_norm=1.0).build(model)
    give_gradients(model, 0)
    before = contents(model, optimizer)
    with monkeypatch.context() as patched:
        patched.setattr(capture, "is_capturing", lambda device: True)
        with pytest.raises(lm.PlanError, match=r"cannot be recorded in a CUDA graph.*outside"):
            optimizer.step()
    assert before.keys() <= contents(model, optimizer).keys()
    assert all(torch.equal(value, contents(model, optimizer)[key]) for key, value in before.items())
    optimizer.step()
    assert optimizer.clock == 1


def test_a_captured_update_reads_no_hyperparameter_on_the_host(monkeypatch):
    """Tensors of the meta device stand for those of a GPU."""
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)

    def batches(optimizer):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.zeros_like(param)
        return optimizer._collect(optimizer.param_groups)

    params = [nn.Parameter(torch.ones(3))]
    lr = torch.tensor(0.1, device="meta")
    ours = batches(lm.AdamW(params, lr=0.1))
    with pytest.raises(lm.PlanError, match="without capturable=True"):
        capture.refuse_host_reads(ours)
    ours = batches(lm.AdamW(params, lr=0.1, capturable=True))
    capture.refuse_host_reads(ours)
    ours[0].hyper["lr"] = lr
    capture.refuse_host_reads(ours)
    ours[0].hyper["betas"] = (lr, 0.9)
    with pytest.raises(lm.PlanError, match="fused kernel reads betas, a tensor, on the host"):
        capture.refuse_host_reads(ours)
    ours = batches(lm.RMSprop(params, lr=0.1, capturable=True))
    ours[0].hyper["lr"] = lr
    with pytest.raises(lm.PlanError, match="foreach kernel reads lr, a tensor, on the host"):
        capture.refuse_host_reads(ours)


def test_a_complex_weight_stays_too(accelerator):
    def run():
        model = nn.Module()
        model.weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        optimizer = lm.Plan("AdamW", lr=0.1, nonfinite="skip").build(model)
        for number in (1 + 1j, complex(math.nan, 1), complex(1, math.inf), 2 - 1j):
            model.weight.grad = torch.full_like(model.weight, number)
            optimizer.step()
        return contents(model, optimizer), told(optimizer)

    ours = run()
    accelerator.off()
    theirs = run()
    assert_alike(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    assert ours[1] == theirs[1]
    assert ours[1][:2] == (2, 2)


def test_a_range_test_gives_the_same_curve(accelerator):
    """It ends at the first gradient that is not finite, and not one step later."""

    def loss(model, batch):
        value = model(batch).square().sum()
        if value < 1e4:
            return value
        return (value - value.detach()).abs().sqrt() + 5.0  # a finite loss, and NaN as its gradient

    def curve():
        model = network()
        optimizer = lm.Plan("SGD", lr=0.1).build(model)
        batches = [torch.randn(3, 4, generator=torch.Generator().manual_seed(n)) for n in range(4)]
        found = lm.find_lr(model, optimizer, loss, batches, low=1e-3, high=1e3, steps=30)
        return str(found), [len(each.loss) for each in found.curves]

    ours = curve()
    accelerator.off()
    assert ours == curve()


@pytest.mark.parametrize("bad", [(), (0,), (2,)])
@pytest.mark.parametrize("rounding", ["stochastic", "kahan", "master"])
def test_roundings_of_16_bit_weights_stay_on_the_device(rounding, bad, accelerator, monkeypatch):
    for name in ("SGD", "AdamW", "LAMB"):
        plan = lm.Plan(name, lr=0.1, rounding=rounding, clip_norm=0.5, nonfinite="skip")
        accelerator.on()
        reads = NoReads(monkeypatch)
        model, optimizer = trained(plan, 4, reads=reads, bad=bad, dtype=torch.bfloat16, run=100)
        assert all(step < now for step, now in reads.flags)
        ours, said = contents(model, optimizer), told(optimizer)
        accelerator.off()
        model, other = trained(plan, 4, bad=bad, dtype=torch.bfloat16, run=100)
        assert_alike(ours, contents(model, other))
        assert said == told(other)

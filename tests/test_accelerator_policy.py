"""A step on an accelerator reads nothing on the host; shown with tensors of the CPU.

The policy of accelerators is switched on for them, and modes of torch watch every read.
"""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lamina as lm
from lamina._util import tensors
from lamina.kernels import masked
from lamina.optimizer.pending_step import PendingStep

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
    forbidden = {
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
        was_taken = PendingStep.was_taken

        def watched(pending):
            modes, self._modes = self._modes, []
            for mode in reversed(modes):
                mode.__exit__(None, None, None)
            self.flags.append((pending.step, self.now))
            try:
                return was_taken(pending)
            finally:
                for mode in modes:
                    mode.__enter__()
                self._modes = modes

        monkeypatch.setattr(PendingStep, "was_taken", watched)

    def step(self, optimizer, now=None):
        self.now = now
        self._modes = [_Calls(), _Operators()]
        for mode in self._modes:
            mode.__enter__()
        try:
            optimizer.step()
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
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return (optimizer.clock, optimizer.skipped, optimizer.applied, optimizer.active, groups)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_and_gives_the_same(
    name, operations, dtype, accelerator, monkeypatch
):
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
